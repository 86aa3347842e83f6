"""SIGKILL for the processes of a sharding job, and what the job had done when they were hit.

What lies in the target is seen by names in a folder of this machine, which the S3 server's objects lie in, too: that
tells the stage of a job without asking it.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from pipeline import storage

Stage = Literal["planning", "claimed", "writing", "statistics", "commit", "committed"]
STAGES: tuple[Stage, ...] = ("planning", "claimed", "writing", "statistics", "commit", "committed")
"""Before the claim; before the first shard; before the last one; before the set's files; before the manifest; after."""

_LOOK_EVERY_S = 0.0005
_CLAIM = re.compile(r"\.job-[0-9a-f]{64}-[0-9a-f]{32}\.json")
_SHARD_FILE = re.compile(r"(train|val|test)-\d{6}\.(tar|json)")
UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.partial|\.rclone_temp_multipart_.+")
"""A file that is being written: on a disk, and in the folder of an S3 server, which shows it to nobody."""
_UNFINISHED_SHARD = re.compile(r"\.(train|val|test)-\d{6}\.tar\.[0-9a-f]{32}\.partial|\.rclone_temp_multipart_.+")


@dataclass(frozen=True)
class Target:
    """Where a set is written, and the folder of this machine in which that lies."""

    uri: str
    folder: Path

    def names(self) -> set[str]:
        """Of all files in the folder, hidden ones among them."""
        with contextlib.suppress(FileNotFoundError):
            return set(os.listdir(self.folder))
        return set()

    def stage(self, shards: int) -> Stage:
        """How far a set of so many shards is."""
        names = self.names()
        if "manifest.json" in names:
            return "committed"
        if "topology.npz" in names:
            return "commit"
        found = [name for name in names if _SHARD_FILE.fullmatch(name)]
        if len(found) == 2 * shards:
            return "statistics"
        if found or any(_UNFINISHED_SHARD.fullmatch(name) for name in names):
            return "writing"
        return "claimed" if any(_CLAIM.fullmatch(name) for name in names) else "planning"

    def unfinished_bytes(self) -> int:
        """Of shards that are being written."""
        total = 0
        for name in self.names():
            if _UNFINISHED_SHARD.fullmatch(name):
                path = self.folder / name
                with contextlib.suppress(FileNotFoundError):
                    total += sum(part.stat().st_size for part in ([path] if path.is_file() else path.iterdir()))
        return total

    def finished_shards(self) -> int:
        """How many there are."""
        return sum(name.endswith(".tar") for name in self.names())

    def wait_for(self, stage: Stage, finished_shards: int, shards: int, is_alive: Callable[[], bool]) -> None:
        """Wait until a job has come to ``stage`` and has finished so many of its shards, or has ended."""
        wanted = STAGES.index(stage)
        while STAGES.index(self.stage(shards)) < wanted or self.finished_shards() < finished_shards:
            if not is_alive():
                return
            time.sleep(_LOOK_EVERY_S)


def digests(uri: str) -> dict[str, str]:
    """SHA-256 of all objects of a folder that storage shows."""
    return {name: storage.sha256_hex(storage.join(uri, name)) for name in storage.listdir(uri)}


def is_left_by_a_killed_job(name: str) -> bool:
    """Whether it is a claim, or an unfinished file, which no reader takes for a part of the set."""
    return _CLAIM.fullmatch(name) is not None or UNFINISHED.fullmatch(name) is not None


@contextlib.contextmanager
def suspended(process: psutil.Process) -> Iterator[None]:
    """Stopped within the block, so that what it has done can be looked at; killed after it."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.kill()


class WorkerKill(threading.Thread):
    """Kills one Ray worker that is at work on a shard.

    Args:
        ray_pid: the process above all of Ray's.
        target: of the job.
        finished_shards: after so many.
        delay_s: after that, once a worker is seen at work.
        generator: chooses among the workers at work.

    Attributes:
        written_bytes: of unfinished shards at the kill; None if none was killed.
        held_a_file: whether the victim itself had an unfinished file open; None on S3.
    """

    def __init__(self, ray_pid: int, target: Target, finished_shards: int, delay_s: float, generator: random.Random):
        super().__init__(daemon=True)
        self.written_bytes: int | None = None
        self.held_a_file: bool | None = None
        self._ray, self._target = psutil.Process(ray_pid), target
        self._finished_shards, self._delay_s, self._generator = finished_shards, delay_s, generator
        self._ended = threading.Event()

    def run(self) -> None:
        """Wait for work, then for the moment, and kill whoever is at work then."""
        due_s = None
        while not self._ended.wait(0.01):
            busy = [process for process in self._ray.children(recursive=True) if runs_shard_task(process)]
            if busy and due_s is None and self._target.finished_shards() >= self._finished_shards:
                due_s = time.monotonic() + self._delay_s
            if busy and due_s is not None and time.monotonic() >= due_s and self._kill(self._generator.choice(busy)):
                return

    def _kill(self, victim: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess), suspended(victim):
            if not runs_shard_task(victim):
                return True
            if storage.is_local(self._target.uri):
                self.held_a_file = any(
                    _UNFINISHED_SHARD.fullmatch(Path(file.path).name) for file in victim.open_files()
                )
            self.written_bytes = self._target.unfinished_bytes()
            return True
        return False

    def end(self) -> None:
        """Kill nobody any more."""
        self._ended.set()
        self.join()


def runs_shard_task(process: psutil.Process) -> bool:
    """Ray names a worker after the task that it runs."""
    try:
        return (process.cmdline() or [""])[0].startswith("ray::_finish_shard")
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
