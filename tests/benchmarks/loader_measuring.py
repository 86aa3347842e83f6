"""Measuring the rows of ``loader.py``: groups of rows whose passes are taken in turns."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import loader_pictures as pictures
from loader_pictures import PHOTO_SIZE_HW, TRAINING_SIZE_HW, StoredImages
from timed_rows import Pass, Row, RowError

from pipeline.images.codecs import decode_image, encode_image

CAMERAS = 8
NAIVE_EQUAL, NAIVE_FULL, LIMIT, OURS = "naive, 2 PNG", "naive, 3 PNG", "limit", "ours"
_NAIVE_VIEWS = 4
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Group:
    """What is measured in turns.

    Attributes:
        stored: how our camera images are stored.
        copies: of each frame in an epoch; an even number of frames, of which two workers get as many each.
        times_naive: wanted views per second, in those of the naive loader; None: it is not among the rows.
        peers: the other libraries that read the same files, those with ``photo alone`` without an average texture.
        quick: whether ``--quick`` measures it.
        quick_peers: whether it measures the peers as well.
    """

    stored: StoredImages
    copies: int
    times_naive: float | None = None
    peers: tuple[str, ...] = ()
    quick: bool = False
    quick_peers: bool = False

    @property
    def name(self) -> str:
        """In the tables, and of its folder."""
        return self.stored.name


_PEERS = ("webdataset", "streaming", "litdata")
_PHOTO_ALONE = ", photo alone"
_JPEG = StoredImages("jpeg", "jpeg", PHOTO_SIZE_HW)
_JPEG_420 = StoredImages("jpeg-420", "jpeg", PHOTO_SIZE_HW, "420")
_JPEG_HALF = StoredImages("jpeg-half", "jpeg", TRAINING_SIZE_HW)
_JPEG_HALF_420 = StoredImages("jpeg-half-420", "jpeg", TRAINING_SIZE_HW, "420")
GROUPS = (
    Group(StoredImages("png", "png", PHOTO_SIZE_HW), 2, 2, _PEERS, quick=True),
    Group(StoredImages("webp", "webp", PHOTO_SIZE_HW), 2),
    Group(StoredImages("planar", "planar", PHOTO_SIZE_HW), 4, 4, quick=True),
    Group(_JPEG, 4, 8, (*_PEERS, *(name + _PHOTO_ALONE for name in _PEERS[1:])), quick=True, quick_peers=True),
    Group(_JPEG_420, 4, 8),
    Group(_JPEG_HALF, 6, 40, _PEERS, quick=True),
    Group(_JPEG_HALF_420, 6, 40),
)


@dataclass
class Measured:
    """What came out of a group.

    Attributes:
        group: which one.
        folders: row to the data that it reads.
        passes: (row, workers) to one pass a repetition.
        absent: row to the reason why it was not measured.
    """

    group: Group
    folders: dict[str, Path] = field(default_factory=dict)
    passes: dict[tuple[str, int], list[Pass]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _RowPlan:
    """A row, the numbers of workers with which it is measured, what it reads, and its process."""

    name: str
    workers: tuple[int, ...]
    folder: Path
    command: list[str]


@dataclass(frozen=True)
class Options:
    """What the command line says; ``epoch_times`` makes epochs longer."""

    quick: bool
    repeats: int
    clock: str
    peer_python: str | None
    scratch: Path
    face: Path | None
    markdown: bool
    only: tuple[str, ...]
    epoch_times: int = 1

    @property
    def frames(self) -> int:
        return 2 if self.quick else 3

    def copies(self, group: Group) -> int:
        """Of each frame, in this run."""
        return self.epoch_times * (max(2, group.copies // 2) if self.quick else group.copies)

    def rate(self, one: Pass, workers: int) -> float:
        """Views per second and core."""
        return one.views / (one.cpu_s if self.clock == "cpu" else one.seconds * workers)


def sets_folder(options: Options) -> Path:
    """Where our shard sets lie, by the name of their group."""
    return options.scratch / f"objects-{options.epoch_times}" / "shards"


def prepare(options: Options, groups: list[Group]) -> None:
    """Write what is not there yet: the capture, the shard sets, and the files from which peers write theirs."""
    capture = options.scratch / "capture"
    if not (options.scratch / "capture.done").exists():
        shutil.rmtree(capture, ignore_errors=True)
        options.scratch.mkdir(parents=True, exist_ok=True)
        pictures.write_capture(capture, CAMERAS, options.frames, options.face)
        (options.scratch / "capture.done").touch()
    base = options.scratch / "base"
    stored = [group.stored for group in groups if not (base / group.name / "manifest.json").exists()]
    pictures.write_sets(capture, base, stored)
    for group in groups:
        target = sets_folder(options) / group.name
        if not (target / "manifest.json").exists():
            shutil.rmtree(target, ignore_errors=True)
            pictures.repeat_set(base / group.stored.name, target, options.copies(group))


def measure(group: Group, options: Options) -> Measured:
    """All rows of a group in turns; a first pass of each is thrown away, which checks digests and starts workers."""
    note(f"measuring {group.name}")
    measured = Measured(group)
    rows: list[tuple[_RowPlan, Row]] = []
    plans = [*_own_plans(group, options), *_peer_plans(group, options, measured)]
    try:
        rows += [(plan, _row(plan.command, options)) for plan in plans]
        for plan, row in list(rows):
            try:
                row.wait_until_ready()
                row.run_pass(plan.workers[-1])
            except RowError as error:
                measured.absent[plan.name] = str(error)
                rows.remove((plan, row))
                row.close()
        for repeat in range(options.repeats):
            for plan, row in rows[:: 1 if repeat % 2 == 0 else -1]:
                for workers in plan.workers:
                    measured.passes.setdefault((plan.name, workers), []).append(row.run_pass(workers))
    finally:
        for _, row in rows:
            row.close()
    order = [(plan.name, workers) for plan in plans for workers in plan.workers]
    measured.passes = {key: measured.passes[key] for key in order if key in measured.passes}
    measured.folders = {plan.name: plan.folder for plan in plans if plan.name != LIMIT}
    return measured


def _own_plans(group: Group, options: Options) -> Iterator[_RowPlan]:
    capture, folder = options.scratch / "capture", sets_folder(options) / group.name
    naive = ((NAIVE_EQUAL, False), (NAIVE_FULL, True)) if group.times_naive is not None else ()
    for name, with_view_texture in naive:
        arguments = {"folder": str(capture), "count": _NAIVE_VIEWS, "batch": _NAIVE_VIEWS}
        command = _own_command("naive", arguments | {"with_view_texture": with_view_texture})
        yield _RowPlan(name, (1,), capture, command)
    yield _RowPlan(LIMIT, (1, 2), folder, _own_command("limit", {"folder": str(folder)}))
    for workers in (1, 2):  # a process each: what one loader keeps is not counted to the other
        yield _RowPlan(OURS, (workers,), folder, _own_command("ours", {"uri": str(folder), "views": CAMERAS}))


def _own_command(kind: str, arguments: dict) -> list[str]:
    return [sys.executable, str(_HERE / "loader_rows.py"), kind, json.dumps(arguments)]


def own_row(arguments: dict, options: Options) -> Row:
    """The process of our loader by itself; see :func:`loader_rows.ours`."""
    return _row(_own_command("ours", arguments), options)


def _row(command: list[str], options: Options) -> Row:
    handle, name = tempfile.mkstemp(suffix=".log", dir=options.scratch)
    os.close(handle)
    return Row(command, Path(name))


def _peer_plans(group: Group, options: Options, measured: Measured) -> Iterator[_RowPlan]:
    """The peers that can be had; why another cannot goes to ``measured.absent``."""
    for name in group.peers if group.quick_peers or not options.quick else ():
        kind, with_average = name.removesuffix(_PHOTO_ALONE), not name.endswith(_PHOTO_ALONE)
        python = sys.executable if kind == "webdataset" else options.peer_python
        if python is None:
            measured.absent[name] = "no --peer-python"
            continue
        try:
            folder = _peer_set(group, kind, python, options, with_average=with_average)
        except RowError as error:
            measured.absent[name] = str(error)
            continue
        arguments = json.dumps({"folder": str(folder), "batch": CAMERAS})
        command = [python, str(_HERE / "peers.py"), "read", kind, arguments]
        yield _RowPlan(name, (1, 2) if with_average and not options.quick else (1,), folder, command)


def _peer_set(group: Group, kind: str, python: str, options: Options, *, with_average: bool) -> Path:
    """A peer's data set of the very images of our shard set and its average textures as PNG, each frame once."""
    folder = options.scratch / "peers" / f"{kind}-{group.name}{'' if with_average else '-photo'}"
    done = folder.with_name(f"{folder.name}.done")
    if done.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    files = options.scratch / "files" / group.name
    files.mkdir(parents=True, exist_ok=True)
    views: list[tuple[str, str | None]] = []
    for place, (_, bodies) in enumerate(pictures.image_bodies(options.scratch / "base" / group.stored.name)):
        average = None
        for suffix, body in sorted(bodies.items(), key=lambda item: ".image." in item[0]):
            path = files / f"{place}-{suffix}"
            if ".image." in suffix:
                path.write_bytes(body)
                views.append((str(path), average if with_average else None))
            else:  # which others cannot read as we store it
                path = path.with_suffix(".png")
                path.write_bytes(encode_image(decode_image(body, suffix), "png"))
                average = str(path)
    listing = files / f"{kind}-{with_average}.json"
    listing.write_text(json.dumps(views))
    arguments = json.dumps({"listing": str(listing), "folder": str(folder)})
    command = [python, str(_HERE / "peers.py"), "write", kind, arguments]
    written = subprocess.run(command, capture_output=True, text=True, check=False)
    if written.returncode:
        raise RowError((written.stderr.strip().splitlines() or ["it wrote nothing"])[-1])
    done.touch()
    return folder


def ratio_of(measured: Measured, above: tuple[str, int], below: tuple[str, int], options: Options) -> float | None:
    """Median over the repetitions of the quotient of both rates per core."""
    if above not in measured.passes or below not in measured.passes:
        return None
    pairs = zip(measured.passes[above], measured.passes[below], strict=True)
    return statistics.median(options.rate(a, above[1]) / options.rate(b, below[1]) for a, b in pairs)


def note(text: str) -> None:
    """Tell the person in front of the screen; the tables alone go to standard output."""
    print(text, file=sys.stderr, flush=True)
