"""Numba kernels on several cores.

The kernels release the GIL, so plain threads run them side by side. Numba's own threading layers are avoided: they
do not survive the forks of data loaders and of Ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

_T = TypeVar("_T")


def run_parallel(tasks: Iterable[Callable[[], _T]]) -> list[_T]:
    """Run tasks on ``torch.get_num_threads()`` threads; results come in the order of the tasks."""
    tasks = list(tasks)
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        return [task() for task in tasks]
    return [future.result() for future in [_pool(os.getpid(), threads).submit(task) for task in tasks]]


def row_bands(views: int, height: int) -> list[tuple[int, int, int]]:
    """(view, first row, row after the last): one band a view, more where there are fewer views than threads."""
    bands = min(max(1, -(-torch.get_num_threads() // max(views, 1))), max(height, 1))
    edges = [height * band // bands for band in range(bands + 1)]
    return [(view, edges[band], edges[band + 1]) for view in range(views) for band in range(bands)]


@lru_cache(maxsize=1)
def _pool(process_id: int, threads: int) -> ThreadPoolExecutor:
    """One pool a process: a forked child has none of its parent's threads, and makes its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"render-{process_id}")


__all__ = ["row_bands", "run_parallel"]
