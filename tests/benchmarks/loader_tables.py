"""The tables that ``loader.py`` prints."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import loader_pictures as pictures
import numpy as np
from loader_measuring import (
    CAMERAS,
    LIMIT,
    NAIVE_EQUAL,
    NAIVE_FULL,
    OURS,
    Group,
    Measured,
    Options,
    ratio_of,
    sets_folder,
)
from loader_rows import decode_in_place, decode_to_array
from rich.console import Console
from rich.table import Table
from timed_rows import Pass

from pipeline.images.codecs import decode_image_into

_HERE = Path(__file__).resolve().parent


def facts_table(options: Options) -> Table:
    """Command, date, commit, machine and versions."""
    git = ["git", "-C", str(_HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    query = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in %r), sep=', ')"
    versions = {sys.executable: ("torch", "numpy", "pillow", "simplejpeg", "imagecodecs", "zstandard", "webdataset")}
    if options.peer_python is not None:
        versions[options.peer_python] = ("torch", "torchvision", "numpy", "pillow", "mosaicml-streaming", "litdata")
    found = []
    for python, names in versions.items():
        asked = subprocess.run([python, "-c", query % (names,)], capture_output=True, text=True, check=False)
        found.append(asked.stdout.strip() or (asked.stderr.strip().splitlines() or ["unknown"])[-1])
    table = Table(title="this run")
    table.add_column("fact")
    table.add_column("value")
    table.add_row("command", shlex.join(["python", "tests/benchmarks/loader.py", *sys.argv[1:]]))
    table.add_row("date", datetime.date.today().isoformat())
    table.add_row("commit", commit)
    table.add_row(
        "machine", f"{model}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} at the start"
    )
    table.add_row("pictures", "a real photo and texture" if options.face else "one synthetic view")
    table.add_row("ours", f"Python {platform.python_version()}, {found[0]}")
    if len(found) > 1:
        table.add_row("peers", found[1])
    return table


def decode_table(options: Options, groups: list[Group]) -> Table:
    """The bare codecs on single pictures, on one core.

    ``limit`` is the codec alone; ``array`` is what a plain script does, ``numpy.asarray`` of Pillow's image, or the
    planar decoder into fresh memory; ``ours`` is the loader's own function, checks and layout included, into memory
    that is there already.
    """
    table = Table(title="decoding one picture on one core, ms of CPU time")
    for column in ("picture", "MB", "limit", "array", "ours"):
        table.add_column(column, justify="left" if column == "picture" else "right")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        for group in groups:
            _, bodies = next(pictures.image_bodies(sets_folder(options) / group.name))
            images = {name: body for name, body in bodies.items() if ".image." in name}
            if group is groups[0]:
                textures = {name: body for name, body in bodies.items() if name not in images}
                table.add_row("average texture", *_decode_cells(textures))
            table.add_row(group.name, *_decode_cells(images))
    finally:
        os.sched_setaffinity(0, cores)
    return table


def _decode_cells(bodies: dict[str, bytes], passes: int = 5) -> Iterator[str]:
    yield f"{statistics.mean(map(len, bodies.values())) / 1e6:.2f}"
    shapes = {name: decode_to_array(name, body).shape for name, body in bodies.items()}
    memory = {name: np.empty(shape, np.uint8) for name, shape in shapes.items()}
    targets = {name: pixels if len(pixels) == 3 else pixels.transpose(2, 0, 1) for name, pixels in memory.items()}
    decoders: tuple[Callable[[str, bytes], object], ...] = (
        decode_in_place,
        decode_to_array,
        lambda name, body: decode_image_into(body, name, targets[name]),
    )
    times: list[list[float]] = [[] for _ in decoders]
    for _ in range(passes + 1):
        for place, decode in enumerate(decoders):
            start = time.process_time()
            for name, body in bodies.items():
                decode(name, body)
            times[place].append((time.process_time() - start) / len(bodies))
    yield from (f"{1e3 * statistics.median(found[1:]):.1f}" for found in times)


def rows_table(all_measured: list[Measured], options: Options) -> Table:
    title = f"median of {options.repeats} paired passes, {options.clock} time, {CAMERAS} views a frame"
    table = Table(title=title)
    for column in (
        "images",
        "loader",
        "workers",
        "views/s",
        "views/s per core",
        "of limit",
        "x naive, 2 PNG",
        "x naive, 3 PNG",
        "kB read a view",
        "peak MB",
    ):
        table.add_column(column, justify="left" if column in ("images", "loader") else "right")
    for measured in all_measured:
        for (name, workers), passes in measured.passes.items():
            per_core = statistics.median(options.rate(one, workers) for one in passes)
            table.add_row(
                measured.group.name,
                name,
                str(workers),
                f"{statistics.median(one.views / one.seconds for one in passes):.1f}",
                f"{per_core:.1f}",
                _ratio_text(measured, (name, workers), (LIMIT, workers), options, digits=2),
                _ratio_text(measured, (name, workers), (NAIVE_EQUAL, 1), options, digits=1),
                _ratio_text(measured, (name, workers), (NAIVE_FULL, 1), options, digits=1),
                _bytes_text(measured, name, passes),
                f"{statistics.median(one.peak_mb for one in passes):.0f}" if workers == 1 else "-",
            )
        for name, reason in measured.absent.items():
            table.add_row(measured.group.name, name, f"not measured: {reason}")
        table.add_section()
    return table


def _bytes_text(measured: Measured, name: str, passes: list[Pass]) -> str:
    """kB a view by system calls; with ``~`` the size of the data set, for a loader that maps its files."""
    if name not in measured.folders:
        return "-"
    called = statistics.median(one.bytes_read / one.views for one in passes)
    stored = sum(path.stat().st_size for path in measured.folders[name].rglob("*") if path.is_file()) / passes[0].views
    return f"~{stored / 1e3:.0f}" if called < stored / 10 else f"{called / 1e3:.0f}"


def _ratio_text(
    measured: Measured, above: tuple[str, int], below: tuple[str, int], options: Options, *, digits: int
) -> str:
    ratio = ratio_of(measured, above, below, options)
    return "-" if ratio is None else f"{ratio:.{digits}f}"


def targets_table(all_measured: list[Measured], options: Options) -> Table:
    """What was wanted, and what came out."""
    table = Table(title="targets")
    for column in ("images", "target", "found", "met"):
        table.add_column(column)
    for measured in all_measured:
        group = measured.group
        wanted: list[tuple[str, float, float | None]] = [
            (f"of limit, {workers} workers", 0.9, ratio_of(measured, (OURS, workers), (LIMIT, workers), options))
            for workers in (1, 2)
        ]
        for peer in (name for name in ("streaming", "litdata") if name in group.peers):
            for workers in (1, 2):
                ratio = ratio_of(measured, (OURS, workers), (peer, workers), options)
                wanted.append((f"x {peer}, {workers} workers", 1.0, ratio))
        if group.times_naive is not None:
            for naive in (NAIVE_EQUAL, NAIVE_FULL):
                wanted.append((f"x {naive}", group.times_naive, ratio_of(measured, (OURS, 1), (naive, 1), options)))
        for name, least, ratio in wanted:
            if ratio is not None:
                table.add_row(group.name, f"{least:g} {name}", f"{ratio:.2f}", "yes" if ratio >= least else "no")
    return table


def show(tables: list[Table], options: Options) -> None:
    for table in tables:
        if not options.markdown:
            Console(width=150).print(table)
            continue
        cells = [list(column.cells) for column in table.columns]
        marks = ["---:" if column.justify == "right" else "---" for column in table.columns]
        lines = [[str(column.header) for column in table.columns], marks, *zip(*cells, strict=True)]
        print(f"\n{table.title}:\n")
        for line in lines:
            print(f"| {' | '.join(str(cell) for cell in line)} |")
