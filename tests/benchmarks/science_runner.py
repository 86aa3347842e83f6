"""Tasks of a study: each a pure function of its settings, run once, in worker processes of one core each.

The result of a task is ``SCRATCH/results/NAME.json``, written whole when the task is done. A run that was killed goes
on with the tasks that have no result; one whose settings changed, or those of a task before it, is done again. No Ray:
nothing here needs a cluster.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any, Self

from pipeline import storage

_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Task:
    """What is to be done, and under which name its result is kept.

    Attributes:
        name: of its files.
        kind: of :data:`science_tasks.KINDS`.
        settings: JSON values.
        needs: tasks that are done before, because it reads what they leave.
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    needs: tuple[Task, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Of all that the result follows from: a kept result counts only under the same one."""
        parts = [self.kind, self.settings, [task.digest for task in self.needs]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class StoppedEarly(Exception):
    """The time is over: what is running was finished, the rest was not begun."""


class Runner:
    """Runs tasks and keeps their results; a context that ends with its processes.

    Args:
        scratch: folder of everything that the study makes.
        workers: processes.
        stop_after_s: no task is begun after so long; None: all are.
    """

    def __init__(self, scratch: Path, workers: int, stop_after_s: float | None = None):
        self.scratch = scratch
        self._workers = workers
        self._began = time.perf_counter()
        self._stop_after_s = math.inf if stop_after_s is None else stop_after_s
        self._backlog: list[Task] = []
        self._running: dict[Future[dict[str, Any]], Task] = {}
        self._done: dict[str, Any] = {}
        self.cpu_s: dict[tuple[str, str], float] = {}
        """(kind, name) of every task whose result was used -> CPU seconds."""
        for name in _ONE_THREAD:
            os.environ[name] = "1"
        context = get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, _end_with, (os.getpid(),))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def later(self, tasks: Sequence[Task]) -> None:
        """What processes do that would otherwise wait for others, in this order."""
        self._backlog = _with_needs([*self._backlog, *tasks])

    def run(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Results by name; a task starts when those that it needs are done, otherwise in the order given.

        Raises:
            StoppedEarly: the time is over; :meth:`found` has what there is.
            Exception: whatever a task raises; what was done before is kept.
        """
        wanted = _with_needs(tasks)
        while missing := [task for task in wanted if not self._is_done(task)]:
            self._begin(missing)
            if not self._running:
                raise StoppedEarly
            finished, _ = wait(self._running, return_when=FIRST_COMPLETED)
            for future in finished:
                task = self._running.pop(future)
                document = future.result()
                self._file(task).parent.mkdir(parents=True, exist_ok=True)
                storage.write_bytes(self._file(task), json.dumps(document).encode())
                self._take(task, document)
                self.note(f"{task.name}: {document['cpu_s']:.0f} s of CPU, {len(missing) - 1} before the next stage")
        return self.found(tasks)

    def found(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Results by name of those tasks that are done."""
        return {task.name: self._done[task.digest] for task in tasks if self._is_done(task)}

    def _begin(self, missing: Sequence[Task]) -> None:
        """Give free processes what is ready, of ``missing`` before the backlog."""
        begun = {task.digest for task in self._running.values()}
        for task in [*missing, *self._backlog]:
            # No more than run at once: otherwise what becomes ready later could not be put first.
            if len(self._running) == self._workers or time.perf_counter() - self._began > self._stop_after_s:
                return
            ready = all(self._is_done(need) for need in task.needs)
            if ready and task.digest not in begun and not self._is_done(task):
                begun.add(task.digest)
                self._running[self._pool.submit(_call, task, str(self.scratch))] = task

    def note(self, line: str) -> None:
        """Progress, on standard error."""
        print(f"[{time.perf_counter() - self._began:6.0f} s] {line}", file=sys.stderr, flush=True)

    def _file(self, task: Task) -> Path:
        return self.scratch / "results" / f"{task.name}.json"

    def _is_done(self, task: Task) -> bool:
        if task.digest not in self._done and self._file(task).is_file():
            document = json.loads(self._file(task).read_text())
            if document["digest"] == task.digest:
                self._take(task, document)
        return task.digest in self._done

    def _take(self, task: Task, document: dict[str, Any]) -> None:
        self._done[task.digest] = document["result"]
        self.cpu_s[task.kind, task.name] = document["cpu_s"]


def _with_needs(tasks: Sequence[Task]) -> list[Task]:
    """Each task once, behind those that it needs."""
    found: dict[str, Task] = {}
    for task in tasks:
        found |= {needed.digest: needed for needed in _with_needs(task.needs)} | {task.digest: task}
    return list(found.values())


def _end_with(parent: int) -> None:
    """In a worker process: end when the run does, which may be killed and then tells nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _call(task: Task, scratch: str) -> dict[str, Any]:
    """In a worker process."""
    import torch
    from science_tasks import KINDS

    torch.set_num_threads(1)
    cpu_s, began = time.process_time(), time.perf_counter()
    result = KINDS[task.kind](Path(scratch), task.name, task.settings)
    return {
        "digest": task.digest,
        "settings": task.settings,
        "result": result,
        "cpu_s": time.process_time() - cpu_s,
        "wall_s": time.perf_counter() - began,
    }
