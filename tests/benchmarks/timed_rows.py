"""The two ends of a timed process: a row of a benchmark's table runs in a process of its own, and answers by JSON.

Needs the standard library alone, so that a peer's environment can import it. :func:`serve` is the row's end,
:class:`Row` the end of the benchmark.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class RowError(RuntimeError):
    """A row that could not be measured, with the last line that its process wrote."""


@dataclass(frozen=True)
class Pass:
    """One pass of a row over its views.

    Attributes:
        views: that came out.
        seconds: of wall time.
        cpu_s: of all threads and child processes.
        bytes_read: by system calls of the process and its children, cached by the kernel or not.
        peak_mb: highest resident memory of the process in this pass above that after its imports, MB.
    """

    views: int
    seconds: float
    cpu_s: float
    bytes_read: int
    peak_mb: float


def serve(run_pass: Callable[[int], int]) -> None:
    """Answer each line ``{"workers": N}`` on standard input with a :class:`Pass`, until the input ends.

    Args:
        run_pass: reads all views once with so many workers, and returns their number.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cores = sorted(os.sched_getaffinity(0))
    after_imports_mb = _status_mb("VmRSS")
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        workers = int(json.loads(line)["workers"])
        os.sched_setaffinity(0, set(cores[:workers]))
        # Resets VmHWM to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        start, cpu_s, bytes_read = time.perf_counter(), _cpu_s(), _bytes_read()
        views = run_pass(workers)
        measured = Pass(
            views=views,
            seconds=time.perf_counter() - start,
            cpu_s=_cpu_s() - cpu_s,
            bytes_read=_bytes_read() - bytes_read,
            peak_mb=_status_mb("VmHWM") - after_imports_mb,
        )
        print(json.dumps(vars(measured)), file=answers, flush=True)


class Row:
    """A process that serves passes.

    Args:
        command: interpreter, script and arguments.
        log: where its standard error goes.
    """

    def __init__(self, command: list[str], log: Path):
        self._log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, env=environment, text=True
            )

    def wait_until_ready(self) -> None:
        """Until it has imported and opened what it needs.

        Raises:
            RowError: it ended before.
        """
        self._answer()

    def run_pass(self, workers: int) -> Pass:
        """Have it read all its views once.

        Raises:
            RowError: it ended instead.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"workers": workers}) + "\n")
            self._process.stdin.flush()
        return Pass(**self._answer())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            written = self._log.read_text(errors="replace").strip().splitlines() or ["it wrote nothing"]
            raise RowError(f"exit code {self._process.wait()}: {written[-1]}")
        return json.loads(line)


def _children() -> Iterator[Path]:
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            yield from (Path("/proc", child) for child in (task / "children").read_text().split())


def _cpu_s() -> float:
    """Of this process, of its ended children and of its running ones."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    running_ns = 0
    for child in _children():
        with suppress(OSError):
            running_ns += sum(int((task / "schedstat").read_text().split()[0]) for task in (child / "task").iterdir())
    return time.process_time() + ended.ru_utime + ended.ru_stime + running_ns / 1e9


def _bytes_read() -> int:
    total = 0
    for process in (Path("/proc/self"), *_children()):
        with suppress(OSError):
            total += int((process / "io").read_text().split()[1])
    return total


def _status_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1e3
