"""Sharding that is killed anywhere ends, when it is run again, in the very same set.

Most kills hit the writer itself, in processes forked off a warm one, which makes a kill cheap: it is the code that a
Ray task runs, and the one that commits. Ray's workers and the driver of the whole job are killed a few times, too.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.recipe import dump_recipe
from cluster.records.tracking import TrackingConfig
from cluster.shard import ShardRecipe, shard
from lipflow.errors import ConfigError
from pipeline import storage
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.manifest import Manifest
from pipeline.sharding.shards import ShardConfig, write_shards
from tests.integration.shard_kills import runs_shard_task

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

# Lossless webp is slow, which gives a kill something to hit: a shard takes 0.05 s of a core, the set 0.7 s.
CONFIG = ShardConfig(frames_per_shard=1, codec="webp")
PARTIAL = re.compile(r"^\..+\.[0-9a-f]{32}\.partial$")


@dataclass(frozen=True)
class Undisturbed:
    """A capture, its set, and how long the writing of it takes in a warm process."""

    capture: str
    files: dict[str, bytes]
    digest: str
    seconds: float


@pytest.fixture(scope="module")
def start(s3_server) -> Callable[[str, str], multiprocessing.process.BaseProcess]:
    """Starts a writer as a process of its own: ``start(capture, out)``. The S3 server's keys are inherited."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pipeline.sharding.shards", "pipeline.captures.multiface", "s3fs", "PIL.WebPImagePlugin"]
    )

    def started(capture: str, out: str) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=write_shards, args=(capture, CONFIG, out))
        process.start()
        return process

    return started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, start) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed")
    dome = DomeConfig(
        cameras=4, image_size_hw=(96, 64), texture_size=32, segments=4, frames_per_segment=3, supersampling=1
    )
    write_dome(dome, str(root / "capture"))
    capture = storage.normalize_uri(root / "capture")
    for out in ("warm-up", "shards"):
        started_s = time.monotonic()
        process = start(capture, str(root / out))
        process.join()
        seconds = time.monotonic() - started_s
        assert process.exitcode == 0
    files = contents(str(root / "shards"))
    assert sum(name.endswith(".tar") for name in files) >= 10
    return Undisturbed(capture, files, Manifest.load(str(root / "shards")).digest, seconds)


def contents(out: str) -> dict[str, bytes]:
    """All objects of a folder."""
    return {name: storage.read_bytes(storage.join(out, name)) for name in storage.listdir(out)}


def names_in(out: str) -> list[str]:
    return storage.listdir(out) if storage.exists(out) else []


def assert_restored(out: str, expected: Undisturbed) -> None:
    """The set is the undisturbed one, to the byte, and nothing beside it has a name that a reader would take."""
    assert contents(out) == expected.files
    assert Manifest.load(out).digest == expected.digest
    if storage.is_local(out):
        beside = {path.name for path in storage.local_path(out).iterdir()} - set(expected.files)
        assert all(PARTIAL.match(name) for name in beside), beside


def kill_at_random_points(start, expected: Undisturbed, out: str, kills: int, seed: int) -> int:
    """SIGKILL to writer after writer on one target; how many of them were hit while they were at work.

    Before it is run to its end, each killed run must have left either no manifest or a whole set.
    """
    generator = random.Random(seed)
    hit = 0
    for _ in range(kills):
        process = start(expected.capture, out)
        process.join(timeout=generator.uniform(0, expected.seconds))
        hit += process.is_alive()
        process.kill()
        process.join()
        if storage.exists(storage.join(out, "manifest.json")):
            assert_restored_apart_from_claims(out, expected)
            storage.delete_dir(out)
    last = start(expected.capture, out)
    last.join()
    assert last.exitcode == 0
    assert_restored(out, expected)
    return hit


def assert_restored_apart_from_claims(out: str, expected: Undisturbed) -> None:
    """As :func:`assert_restored`, for a writer that was killed between its commit and its end."""
    found = contents(out)
    assert {name: body for name, body in found.items() if not name.startswith(".job-")} == expected.files


def test_a_writer_killed_again_and_again_ends_in_the_undisturbed_set(start, undisturbed: Undisturbed, tmp_path: Path):
    assert kill_at_random_points(start, undisturbed, str(tmp_path / "out"), 6, seed=1) >= 3


def test_a_writer_to_s3_killed_again_and_again_ends_in_the_undisturbed_set(start, undisturbed, s3_server):
    assert kill_at_random_points(start, undisturbed, s3_server.uri("killed"), 3, seed=2) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_thirty_kills_end_in_the_undisturbed_set(start, undisturbed: Undisturbed, tmp_path: Path, s3_server, where):
    out = str(tmp_path / "out") if where == "disk" else s3_server.uri("killed-30")
    assert kill_at_random_points(start, undisturbed, out, 30, seed=3) >= 20


def test_two_writers_at_once_give_the_undisturbed_set(start, undisturbed: Undisturbed, tmp_path: Path):
    writers = [start(undisturbed.capture, str(tmp_path / "out")) for _ in range(2)]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert_restored(str(tmp_path / "out"), undisturbed)


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_writer_of_another_plan_is_refused_while_one_is_at_work(
    start, undisturbed: Undisturbed, tmp_path: Path, s3_server, where: str
):
    """The first writer is suspended, not dead, and finishes its set after the refusal."""
    out = str(tmp_path / "out") if where == "disk" else s3_server.uri("contended")
    first = start(undisturbed.capture, out)
    while not names_in(out):
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        before = set(storage.listdir(out))
        with pytest.raises(ConfigError, match=rf"a job of another recipe .* process {first.pid}, .* give another OUT"):
            write_shards(undisturbed.capture, ShardConfig(frames_per_shard=5), out)
        assert set(storage.listdir(out)) == before
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 0
    assert_restored(out, undisturbed)


def test_unfinished_files_of_killed_writers_are_removed_once_they_are_stale(start, undisturbed, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    stale, fresh = (out / f".train-00000{n}.tar.{n:032x}.partial" for n in (0, 1))
    for path in (stale, fresh):
        path.write_bytes(b"half a shard")
    os.utime(stale, (time.time() - 7200, time.time() - 7200))
    process = start(undisturbed.capture, str(out))
    process.join()
    assert_restored(str(out), undisturbed)
    assert not stale.exists()
    assert fresh.exists()


class WorkerKiller(threading.Thread):
    """Kills a worker of a Ray cluster that runs a shard task, at random times, so many times."""

    def __init__(self, ray_pid: int, kills: int, seed: int):
        super().__init__(daemon=True)
        self.kills, self.done = kills, 0
        self._ray = psutil.Process(ray_pid)
        self._generator = random.Random(seed)
        self._ended = threading.Event()

    def run(self) -> None:
        while self.done < self.kills and not self._ended.wait(self._generator.uniform(0.02, 0.3)):
            busy = [process for process in self._ray.children(recursive=True) if runs_shard_task(process)]
            if busy:
                self._generator.choice(busy).kill()
                self.done += 1

    def end(self) -> None:
        self._ended.set()
        self.join()


def test_a_job_whose_ray_workers_are_killed_ends_in_the_undisturbed_set(
    ray_session, shards, undisturbed: Undisturbed, tmp_path: Path
):
    killer = WorkerKiller(ray_session.pid, kills=2, seed=4)
    killer.start()
    try:
        recipe = ShardRecipe(shard=CONFIG, tracking=TrackingConfig(uri=shards.tracking.uri, experiment="killed"))
        summary = shard(undisturbed.capture, str(tmp_path / "out"), recipe)
    finally:
        killer.end()
    assert killer.done >= 1
    assert summary.digest == undisturbed.digest
    assert_restored(str(tmp_path / "out"), undisturbed)


@contextlib.contextmanager
def driver(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A job's driver, in a process group that is killed at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | environment, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def test_a_killed_driver_leaves_what_the_next_run_completes(ray_head, shards, undisturbed: Undisturbed, tmp_path: Path):
    out, recipe, log = tmp_path / "out", tmp_path / "recipe.yaml", tmp_path / "driver.log"
    tracking = TrackingConfig(uri=shards.tracking.uri, experiment="killed")
    dump_recipe(ShardRecipe(shard=CONFIG, tracking=tracking), recipe)
    command = [sys.executable, "-m", "cluster.cli", "shard", undisturbed.capture, str(out), "--recipe", str(recipe)]
    environment = {"RAY_ADDRESS": ray_head.address, "OMP_NUM_THREADS": "1"}
    generator = random.Random(5)
    after = generator.randrange(1, 6)
    with driver(command, log, environment) as process:
        deadline = time.monotonic() + 90
        while len(list(out.glob("*.tar"))) < after and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, log.read_text()[-2000:]
    assert not (out / "manifest.json").exists()
    assert list(out.glob("*.tar"))
    again = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert summary["shards_kept"] >= 1
    assert summary["shards_written"] >= 1
    assert_restored(str(out), undisturbed)
