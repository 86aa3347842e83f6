"""Memory for pixels: that of pictures and batches that nobody holds any more is written again.

The pages of fresh memory are made one by one as they are first written, and given back when it is freed: for a batch
of full-size images that takes as long as writing to it. And a training or a fit asks for the same sizes again and
again. Used again, 16 rendered views of 1024x667 take 22 ms of CPU time each, mapped anew 24, and sometimes 40.
"""

from __future__ import annotations

import math
import os
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

KEPT_BYTES = 2**30
"""The most memory that is kept for another use."""

_LEAST_BYTES = 4 * 2**20
"""Smaller tensors are the allocator's, which keeps their pages itself. From here on numpy asks for huge pages."""


class ReusedMemory:
    """Hands out tensors of any content, and keeps the memory of those that were dropped.

    Args:
        most_bytes: what is kept; beyond it, the sizes that were not used for longest are given back.
    """

    def __init__(self, most_bytes: int):
        self._most_bytes = most_bytes
        self.forget()

    def forget(self) -> None:
        """Keep nothing that was dropped so far."""
        # Reentrant: a finalizer may run wherever Python allocates.
        self._lock = threading.RLock()
        self._dropped: dict[int, list[np.ndarray]] = {}
        self._bytes = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A C-contiguous tensor that shares its memory with no other that is still held, be it by a view of it."""
        numbers = torch.empty(0, dtype=dtype).numpy().dtype
        size = math.prod(shape) * numbers.itemsize
        with self._lock:
            kept = self._dropped.get(size)
            memory = kept.pop() if kept else None
            self._bytes -= 0 if memory is None else size
        if memory is None:
            memory = np.empty(size, np.uint8)
        # The tensor, and whatever is a view of it, keeps this one array object alive, and nobody else has it.
        held = memory.view(numbers).reshape(shape)
        weakref.finalize(held, self._keep, memory).atexit = False
        return torch.from_numpy(held)

    @property
    def kept_bytes(self) -> int:
        """What is kept now."""
        return self._bytes

    def _keep(self, memory: np.ndarray) -> None:
        if memory.nbytes > self._most_bytes:
            return
        with self._lock:
            kept = self._dropped.pop(memory.nbytes, [])
            kept.append(memory)
            self._dropped[memory.nbytes] = kept
            self._bytes += memory.nbytes
            while self._bytes > self._most_bytes:
                oldest = next(iter(self._dropped))
                self._bytes -= self._dropped[oldest].pop().nbytes
                if not self._dropped[oldest]:
                    del self._dropped[oldest]


_pixels = ReusedMemory(KEPT_BYTES)
os.register_at_fork(after_in_child=_pixels.forget)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor that is not filled in; a large one lies in kept memory, if there is some of its size."""
    if math.prod(shape) * dtype.itemsize < _LEAST_BYTES:
        return torch.empty(shape, dtype=dtype)
    return _pixels.take(shape, dtype)


__all__ = ["KEPT_BYTES", "ReusedMemory", "empty"]
