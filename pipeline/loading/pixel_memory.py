"""Memory for the pixels of batches, written again once nobody holds the batch.

The pages of fresh memory are made one by one as they are first written, and given back when it is freed: for a batch
of full-size images that takes as long as writing to it. What the dimensions mean, and so the layout of the pixels, is
up to the caller (:meth:`pipeline.loading.frames.FrameReader.allocate`): a view in another order holds the memory just
as well.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from functools import partial

import numpy as np
import torch
from torch import Tensor


class PixelMemory:
    """Hands out uint8 tensors of any content.

    Args:
        keep: how many tensors of each shape are kept for another use after they were dropped.
    """

    def __init__(self, keep: int):
        self._dropped: dict[tuple[int, ...], deque[np.ndarray]] = defaultdict(partial(deque, maxlen=keep))

    def take(self, *shape: int) -> Tensor:
        """A C-contiguous tensor that shares its memory with no other that is still held, be it by a view of it."""
        dropped = self._dropped[shape]
        try:
            memory = dropped.pop()
        except IndexError:
            memory = np.empty(shape, np.uint8)
        # The tensor, and whatever is a view of it, keeps this one array object alive, and nobody else has it.
        held = memory.view()
        weakref.finalize(held, dropped.append, memory).atexit = False
        return torch.from_numpy(held)
