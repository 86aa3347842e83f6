"""Where a worker of a training runs: all that the loop needs to know of Ray Train, torchrun or a lone process.

A process that has to go is told so first, by SIGTERM. The loop asks between steps, and leaves with a checkpoint.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType

import ray.train
import ray.train.torch
import torch

_sigterm = threading.Event()


@dataclass(frozen=True)
class Worker:
    """One process of a training.

    Attributes:
        rank: of 0 to ``world_size - 1``; with more than one, torch's default process group connects them.
        world_size: number of workers.
        device: on which it computes.
        report: called on every worker with the same metrics at every validation.
        asked_to_leave: whether this process is about to be ended.
    """

    rank: int
    world_size: int
    device: torch.device
    report: Callable[[Mapping[str, float]], None]
    asked_to_leave: Callable[[], bool]

    def anyone_asked_to_leave(self) -> bool:
        """The same answer on all workers, which must all ask at the same time."""
        asked = self.asked_to_leave()
        if self.world_size == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def from_first(self, value: str | None) -> str | None:
        """What the first worker has, on all workers."""
        if self.world_size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]


def ray_worker() -> Worker:
    """This process as a worker of Ray Train."""
    context = ray.train.get_context()
    return Worker(
        context.get_world_rank(),
        context.get_world_size(),
        ray.train.torch.get_device(),
        report=lambda metrics: ray.train.report(dict(metrics)),
        asked_to_leave=sigterm_came,
    )


def sigterm_came() -> bool:
    """Whether this process had a SIGTERM since :func:`listen_for_sigterm`."""
    return _sigterm.is_set()


def listen_for_sigterm() -> None:
    """Note the first SIGTERM in place of what it did before, which the second one does.

    From the main thread, which handles signals: Ray Train runs the training function in another one.
    """
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        if _sigterm.is_set() and callable(before):
            before(number, frame)
        _sigterm.set()

    signal.signal(signal.SIGTERM, note)
