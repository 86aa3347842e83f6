"""How much a capture's reader costs over a plain loop: ``python tests/benchmarks/capture_reading.py``.

The same image files are read and decoded twice, in turns, in one process on one core: through
``open_capture(...).frame(...).image_file(...)``, and by a bare loop over the paths (for zips: over one open
``zipfile.ZipFile`` a camera). Both decode with the same function; the capture is opened once, before the clock runs.
The ratio is plain time over ours: 1 means that the reader costs nothing, and less than 0.9 would be a defect.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.capture import Capture
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.images.codecs import decode_any_image


def main() -> None:
    """Measure all layouts and sizes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="pairs of passes over the files")
    repeats = parser.parse_args().repeats
    table = Table(title=f"capture reading, one core, median of {repeats} paired passes")
    for column in ("layout", "image", "files", "plain, views/s", "ours, views/s", "plain time / ours"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as scratch:
        for layout, size_hw in (
            ("multiface", (1024, 667)),
            ("multiface", (2048, 1334)),
            ("ava-256", (1024, 667)),
        ):
            folder = Path(scratch, f"{layout}-{size_hw[0]}")
            config = DomeConfig(
                cameras=4, image_size_hw=size_hw, texture_size=64, segments=1, frames_per_segment=4, supersampling=1
            )
            _write(layout, folder, config)
            files, ours, plain = _measure(layout, folder, repeats)
            ratio = statistics.median(theirs / own for theirs, own in zip(plain, ours, strict=True))
            rates = [f"{files / statistics.median(times):.1f}" for times in (plain, ours)]
            table.add_row(layout, f"{size_hw[0]}x{size_hw[1]}", str(files), *rates, f"{ratio:.3f}")
    Console().print(table)


def _write(layout: str, folder: Path, config: DomeConfig) -> None:
    if layout == "multiface":
        write_dome(config, str(folder))
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))
    from ava256_layout import write_ava256

    write_ava256(folder, config)


def _measure(layout: str, folder: Path, repeats: int) -> tuple[int, list[float], list[float]]:
    """Number of files, and the seconds of each pass, ours and plain; the first pair is thrown away."""
    capture = open_capture(folder)
    ours, plain = [], []
    for _ in range(repeats + 1):
        ours.append(_seconds(lambda: _bodies_through_reader(capture)))
        plain.append(_seconds(lambda: _bodies_in_plain_loop(layout, folder)))
    return sum(1 for _ in _bodies_through_reader(capture)), ours[1:], plain[1:]


def _seconds(bodies: Callable[[], Iterator[bytes]]) -> float:
    start = time.process_time()
    for body in bodies():
        decode_any_image(body, "image")
    return time.process_time() - start


def _bodies_through_reader(capture: Capture) -> Iterator[bytes]:
    for segment, frames in capture.segments.items():
        for stem in frames:
            frame = capture.frame(segment, stem)
            for camera in capture.cameras:
                body = frame.image_file(camera.camera_id)
                if body is not None:
                    yield body


def _bodies_in_plain_loop(layout: str, folder: Path) -> Iterator[bytes]:
    if layout == "multiface":
        for path in sorted((folder / "images").rglob("*.png")):
            yield path.read_bytes()
        return
    for path in sorted((folder / "decoder" / "image").glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".avif"):
                    yield archive.read(name)


if __name__ == "__main__":
    main()
