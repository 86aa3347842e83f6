"""Sharding on Ray, killed at thirty points: the set is the undisturbed one to the byte, and nothing lies beside it.

Fifteen times a worker that is at work on a shard is killed, and fifteen times the driver of the job, at moments that
are drawn over all of its stages; two thirds on a disk and a third on S3, where shards are uploads of several parts.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from cluster.records.tracking import TrackingConfig
from cluster.shard import ShardRecipe, ShardSummary, shard
from pipeline import storage
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.loading.shardset import ShardSet
from pipeline.sharding.shards import ShardConfig
from tests.integration.shard_kills import (
    STAGES,
    UNFINISHED,
    Stage,
    Target,
    WorkerKill,
    digests,
    is_left_by_a_killed_job,
    suspended,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    # Raised inside MLflow, about its own use of SQLAlchemy.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

# A frame is 6 MB and takes 0.24 s of a core. On S3, a shard is an upload of three parts.
CONFIGS = {name: ShardConfig(frames_per_shard=count, codec="planar") for name, count in (("disk", 3), ("s3", 6))}
SHARDS = {"disk": 8, "s3": 4}
DOME = DomeConfig(
    cameras=12, image_size_hw=(768, 512), texture_size=256, segments=4, frames_per_segment=2, supersampling=1
)
FRAMES_PER_SEGMENT = 6
SEED = 11
WORKER_KILLS = {"disk": 10, "s3": 5}
DRIVER_KILLS: dict[str, dict[Stage, int]] = {
    "disk": {"planning": 1, "claimed": 1, "writing": 5, "statistics": 1, "commit": 1, "committed": 1},
    "s3": {"claimed": 1, "writing": 3, "commit": 1},
}


@dataclass
class Tally:
    """What the kills hit."""

    kills: int = 0
    while_writing: int = 0
    runs_again: int = 0
    identical: int = 0
    stages: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Undisturbed:
    """A capture, and what becomes of it when nobody is killed.

    Attributes:
        recipe: of the job.
        digests: of all files of the set.
        shards: their number.
        stage_starts_s: when the job came to each stage, after its driver was started in a warm process.
        seconds: until its end.
    """

    capture: str
    recipe: ShardRecipe
    digests: dict[str, str]
    shards: int
    stage_starts_s: dict[Stage, float]
    seconds: float

    def window_s(self, stage: Stage) -> float:
        """How long the job is in a stage."""
        later = STAGES[STAGES.index(stage) + 1 :]
        end_s = min((self.stage_starts_s[name] for name in later if name in self.stage_starts_s), default=self.seconds)
        return end_s - self.stage_starts_s[stage]

    def moment(self, stage: Stage, generator: random.Random) -> tuple[int, float]:
        """A random one within a stage: after how many finished shards, and how much later."""
        if stage != "writing":
            return 0, generator.uniform(0, 0.9 * self.window_s(stage))
        return generator.randrange(self.shards), generator.uniform(0, self.window_s(stage) / self.shards)


Start = Callable[[str, str, ShardRecipe], multiprocessing.process.BaseProcess]


def _drive(address: str, capture: str, out: str, recipe: ShardRecipe) -> None:
    os.environ["RAY_ADDRESS"] = address
    shard(capture, out, recipe)


@pytest.fixture(scope="module")
def start(ray_head) -> Start:
    """Starts the driver of a job as a process of its own: ``start(capture, out, recipe)``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cluster.shard", "pipeline.captures.multiface", "mlflow", "s3fs"])

    def started(capture: str, out: str, recipe: ShardRecipe) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=_drive, args=(ray_head.address, capture, out, recipe))
        process.start()
        return process

    return started


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("capture")
    write_dome(DOME, str(folder))
    _lengthen(folder)
    return storage.normalize_uri(folder)


@pytest.fixture(scope="module")
def undisturbed(new_target, where: str, capture: str, start: Start, shards) -> Undisturbed:
    recipe = ShardRecipe(shard=CONFIGS[where], tracking=TrackingConfig(uri=shards.tracking.uri, experiment="killed"))
    starts_s: dict[Stage, float] = {}
    seconds = 0.0
    for name in ("warm-up", "set"):
        target = new_target(name)
        process = start(capture, target.uri, recipe)
        begun_s = time.monotonic()
        starts_s = {"planning": 0.0}
        while process.is_alive():
            starts_s.setdefault(target.stage(SHARDS[where]), time.monotonic() - begun_s)
            time.sleep(0.0005)
        seconds = time.monotonic() - begun_s
        assert process.exitcode == 0
    found = digests(target.uri)
    assert target.finished_shards() == SHARDS[where]
    assert all(path.stat().st_size > 17e6 for path in target.folder.glob("*.tar"))
    return Undisturbed(capture, recipe, found, SHARDS[where], starts_s, seconds)


def _lengthen(capture: Path) -> None:
    """Repeat the two frames of each segment by hard links, until it has six."""
    for path in [path for path in capture.rglob("00000?*") if path.is_file()]:
        original = int(path.name[:6])
        for number in range(original + 2, FRAMES_PER_SEGMENT, 2):
            os.link(path, path.with_name(f"{number:06d}{path.name[6:]}"))
    segments = sorted(path.name for path in (capture / "images").iterdir())
    lines = [f"{segment} {number:06d}\n" for segment in segments for number in range(FRAMES_PER_SEGMENT)]
    (capture / "frame_list.txt").write_text("".join(lines))


@pytest.fixture(scope="module", params=["disk", "s3"])
def where(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def new_target(where: str, tmp_path_factory: pytest.TempPathFactory, s3_server) -> Callable[[str], Target]:
    """An empty target: ``new_target(name)``."""
    root = tmp_path_factory.mktemp("killed")

    def made(name: str) -> Target:
        if where == "disk":
            return Target(str(root / name), root / name)
        return Target(s3_server.uri("kill-points", name), s3_server.folder / s3_server.bucket / "kill-points" / name)

    return made


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], None]]:
    """Prints a line of progress at once."""

    def told(line: str) -> None:
        with capsys.disabled():
            print(f"    {line}", flush=True)

    return told


def assert_nothing_half_done_is_visible(target: Target, expected: Undisturbed) -> None:
    """What lies there after a kill: whole files of the undisturbed set, and what no reader takes."""
    visible = digests(target.uri) if target.folder.exists() else {}
    for name, digest in visible.items():
        assert expected.digests.get(name) == digest or is_left_by_a_killed_job(name), name
    if "manifest.json" in visible:
        assert visible.keys() >= expected.digests.keys()


def assert_restored(target: Target, expected: Undisturbed) -> None:
    """Every object that storage shows is of the set and is the very same; beside it, there are unfinished files."""
    assert digests(target.uri) == expected.digests
    strays = target.names() - expected.digests.keys()
    assert all(UNFINISHED.fullmatch(name) for name in strays), strays
    assert len(ShardSet.open(target.uri).manifest.shards) == expected.shards


def run_again(target: Target, expected: Undisturbed) -> ShardSummary:
    return shard(expected.capture, target.uri, expected.recipe)


def assert_cleaned_up_in_the_end(target: Target, expected: Undisturbed) -> None:
    """Unfinished files that have lost their writer for an hour are removed by any later run."""
    for name in target.names() - expected.digests.keys():
        long_ago_s = time.time() - 7200
        os.utime(target.folder / name, (long_ago_s, long_ago_s))
    assert not run_again(target, expected).written
    if storage.is_local(target.uri):
        assert target.names() == expected.digests.keys()


def test_jobs_whose_workers_are_killed_end_in_the_undisturbed_set(
    ray_session, undisturbed: Undisturbed, where: str, new_target, tell
):
    generator, tally = random.Random(f"{SEED} worker {where}"), Tally()
    tell(f"{where}: undisturbed {undisturbed.seconds:.1f} s, writing {undisturbed.window_s('writing'):.1f} s")
    while tally.kills < WORKER_KILLS[where]:
        target = new_target(f"worker-{tally.runs_again}")
        finished, delay_s = undisturbed.moment("writing", generator)
        kill = WorkerKill(ray_session.pid, target, finished, delay_s, generator)
        kill.start()
        try:
            summary = run_again(target, undisturbed)
        finally:
            kill.end()
        tally.runs_again += 1
        assert tally.runs_again < 2 * WORKER_KILLS[where], "most kills come too late"
        if kill.written_bytes is None:
            continue
        tally.kills += 1
        tally.while_writing += bool(kill.written_bytes if kill.held_a_file is None else kill.held_a_file)
        assert summary.shards_written + summary.shards_kept == undisturbed.shards
        assert_restored(target, undisturbed)
        assert_cleaned_up_in_the_end(target, undisturbed)
        tally.identical += 1
        held = {None: "", True: ", its own among them", False: ", not its own"}[kill.held_a_file]
        tell(f"worker {tally.kills}: {finished} shards finished, {kill.written_bytes / 1e6:.1f} MB unfinished{held}")
        storage.delete_dir(target.uri)
    tell(f"{where}, workers: {tally}")
    assert tally.identical == WORKER_KILLS[where]
    # On S3, what a worker holds of a shard is in its memory most of the time, and cannot be seen.
    assert where == "s3" or tally.while_writing >= WORKER_KILLS[where] / 3


def test_killed_drivers_leave_what_the_next_run_completes(
    ray_session, start: Start, undisturbed: Undisturbed, where: str, new_target, tell
):
    generator, tally = random.Random(f"{SEED} driver {where}"), Tally()
    wanted = [stage for stage, count in DRIVER_KILLS[where].items() for _ in range(count)]
    started = 0
    while tally.kills < len(wanted):
        stage, target = wanted[tally.kills], new_target(f"driver-{started}")
        finished, delay_s = undisturbed.moment(stage, generator)
        started += 1
        assert started < 2 * len(wanted), "most kills come too late"
        process = start(undisturbed.capture, target.uri, undisturbed.recipe)
        target.wait_for(stage, finished, undisturbed.shards, process.is_alive)
        process.join(timeout=delay_s)
        hit = unfinished = None
        with contextlib.suppress(psutil.NoSuchProcess), suspended(psutil.Process(process.pid)):
            hit, unfinished = target.stage(undisturbed.shards), target.unfinished_bytes()
        process.join()
        if hit is None or unfinished is None or process.exitcode == 0:
            continue
        assert process.exitcode == -signal.SIGKILL
        assert_nothing_half_done_is_visible(target, undisturbed)
        summary = run_again(target, undisturbed)
        tally.kills += 1
        tally.runs_again += 1
        tally.stages[hit] += 1
        tally.while_writing += unfinished > 0
        assert summary.written == (hit != "committed")
        assert_restored(target, undisturbed)
        assert_cleaned_up_in_the_end(target, undisturbed)
        tally.identical += 1
        tell(
            f"driver {tally.kills}: at {hit} ({stage} was meant), {unfinished / 1e6:.1f} MB unfinished; "
            f"then {summary.shards_kept} kept, {summary.shards_written} written"
        )
        storage.delete_dir(target.uri)
    tell(f"{where}, drivers: {tally}")
    assert tally.identical == len(wanted)
    assert tally.while_writing >= DRIVER_KILLS[where]["writing"] / 2
