"""The capture in the Ava-256 layout that the tests of its reader share, and what they do to it."""

from __future__ import annotations

from pathlib import Path

from lipflow.errors import LipflowError
from pipeline.captures.ava256 import Ava256Capture
from tests.pipeline import ava256_layout as layout

CONFIG = layout.LAYOUT_CONFIG.model_copy(update={"missing_fraction": 0.2, "seed": 3})
"""Three cameras, two segments of two frames, some views missing."""

DISTORTION = (-0.073, 0.044, -0.0034, 0.003)
CAMERA = "400001"


def change_member(path: Path, name: str, body: bytes | None) -> None:
    """Put other bytes in the place of a zip's member, or take it out."""
    members = layout.read_zip(path) | {name: body or b""}
    layout.write_zip(path, {key: value for key, value in members.items() if key != name or body is not None})


def faults(capture: Ava256Capture) -> dict[str, LipflowError]:
    """What checking everything finds, by the name of the file."""
    frames = [(segment, stem) for segment, stems in capture.segments.items() for stem in stems]
    assets = [*capture.shared_assets(), *(asset for frame in frames for asset in capture.frame(*frame).assets())]
    found: dict[str, LipflowError] = {}
    for asset in assets:
        try:
            asset.check()
        except LipflowError as error:
            found[asset.source.removeprefix(f"{capture.uri}/")] = error
    return found


def first_frame(capture: Ava256Capture) -> tuple[str, str]:
    """Segment and stem."""
    segment = next(iter(capture.segments))
    return segment, capture.segments[segment][0]
