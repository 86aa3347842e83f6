"""Memory for what the CPU's kernels fill in."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor that is not filled in, from numpy's allocator.

    It asks the kernel for huge pages from 4 MiB on. The pictures of many views are mapped anew for every render, and
    page by page, faults cost as much as a fifth of the render does.
    """
    return torch.from_numpy(np.empty(shape, torch.empty(0, dtype=dtype).numpy().dtype))


__all__ = ["empty"]
