"""A stack of real servers for tests: started by the command, used by processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.services.folder import StackRecord, open_record, read_env_file
from cluster.services.processes import family

ROOT = Path(__file__).resolve().parents[2]
ANSWER_S = 240
"""How long a command may take on a busy machine."""


@dataclass(frozen=True)
class RunningStack:
    """A stack and the environment of its users."""

    folder: Path
    variables: dict[str, str]

    @property
    def record(self) -> StackRecord:
        record = open_record(self.folder)
        assert record is not None
        return record

    def processes(self) -> list[psutil.Process]:
        """All processes of the stack, workers of running jobs included."""
        return family(self.record.servers, self.record.mark)

    def environment(self, **changes: str | None) -> dict[str, str]:
        """That of a user who loaded ``stack.env``, with ``changes``; None takes a variable away."""
        both = clean_environment() | self.variables | changes
        return {name: value for name, value in both.items() if value is not None}

    def start(self, *arguments: str, stdin: int = subprocess.DEVNULL, **changes: str | None) -> subprocess.Popen[str]:
        """A ``lipflow`` command, running."""
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=self.environment(**changes),
        )

    def run(self, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        """A ``lipflow`` command, finished."""
        process = self.start(*arguments, **changes)
        out, err = process.communicate(timeout=ANSWER_S)
        print(out, err)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run_ray(self, *arguments: str, timeout_s: float = ANSWER_S, **changes: str | None):
        """A ``ray`` command, finished."""
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=self.folder,
            env=self.environment(**changes),
        )
        print(done.stdout, done.stderr)
        return done


def clean_environment() -> dict[str, str]:
    """This process's, without the other servers of the tests."""
    foreign = ("AWS_", "RAY_", "MLFLOW_", "LIPFLOW_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def stack_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``lipflow stack ARGUMENTS``, finished."""
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "stack", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=clean_environment(),
    )


@contextmanager
def stack_of_our_own() -> Iterator[RunningStack]:
    """A stack in a folder of its own, ended and removed afterwards."""
    # Short: Ray's sockets have short names.
    folder = Path(tempfile.mkdtemp(prefix="lf-stack-"))
    try:
        up = stack_command("up", "--folder", str(folder), "--set", "num_cpus=2", "--set", "object_store_mib=256")
        assert up.returncode == 0, up.stderr
        yield RunningStack(folder, read_env_file(folder / "stack.env"))
    finally:
        down = stack_command("down", "--folder", str(folder))
        shutil.rmtree(folder, ignore_errors=True)
    assert down.returncode == 0, down.stderr
