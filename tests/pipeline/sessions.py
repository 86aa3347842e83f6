"""Two sessions of one face, as captures: other head motion, another calibration, one camera less."""

from __future__ import annotations

from pathlib import Path

from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.sharding.shards import ShardConfig
from pipeline.sharding.splits import SplitConfig

DOME = DomeConfig(
    cameras=5,
    image_size_hw=(32, 24),
    texture_size=32,
    segments=4,
    frames_per_segment=2,
    missing_fraction=0.05,
    headset_image_size_hw=(8, 10),
    supersampling=1,
)
ABSENT = "400005"
"""The camera that session B lacks."""
CONFIG = ShardConfig(frames_per_shard=2, splits=SplitConfig(test_camera_count=1))


def write_sessions(root: Path) -> dict[str, Path]:
    """Session ``a``, and ``b``, which was recalibrated and lacks a camera."""
    write_dome(DOME, str(root / "a"))
    write_dome(DOME.model_copy(update={"head_translation_mm": 9.0, "frames_per_segment": 3}), str(root / "b"))
    _recalibrate(root / "b")
    return {"a": root / "a", "b": root / "b"}


def _recalibrate(folder: Path) -> None:
    """Another focal length and another place for every camera, and one camera less: as after a rebuild of the dome."""
    blocks = [block.splitlines() for block in (folder / "KRT").read_text().strip().split("\n\n")]
    written = []
    for block in blocks:
        if block[0].strip() == ABSENT:
            continue
        rows = [[float(number) for number in line.split()] for line in block[1:]]
        rows[0][0] *= 1.0625
        for row in rows[-3:]:
            row[3] += 7.5
        written.append("\n".join([block[0], *(" ".join(f"{number!r}" for number in row) for row in rows)]))
    (folder / "KRT").write_text("\n\n".join(written) + "\n\n")
