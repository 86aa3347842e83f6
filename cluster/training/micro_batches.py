"""The global batch of a step in pieces that belong to no process.

A step's batch consists of ``micro_batches`` pieces. Each is a rank of its own to the loader and has a seed of its own,
so that it is a function of (seed, step, number of the piece). Worker r of W computes the pieces r, r + W, r + 2 W, ...
and adds up their gradients: accumulation, another number of workers and a restart with fewer nodes are one thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lipflow.types import FrameBatch
from pipeline.loading.loader import LoaderConfig, ShardLoader, ShardSet


class MicroBatches:
    """The pieces of one worker.

    Args:
        shards: the open set, of whose training split and training cameras they are.
        config: of a piece. Threads and batches ahead are those of the worker, shared by its pieces, which are read in
            turn.
        micro_batches: pieces of a step, over all workers; at least ``world_size``.
        rank: of this worker.
        world_size: number of workers.
        cache_dir: for copies of remote shards.
        step: the step that comes first.

    Attributes:
        numbers: those of this worker's pieces.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: LoaderConfig,
        *,
        micro_batches: int,
        rank: int,
        world_size: int,
        cache_dir: str | Path | None,
        step: int,
    ):
        self.numbers = range(rank, micro_batches, world_size)
        share = config.model_copy(
            update={
                "decode_threads": max(1, config.decode_threads // len(self.numbers)),
                "prefetch_batches": -(-config.prefetch_batches // len(self.numbers)),
            }
        )
        loaders = [
            ShardLoader(
                shards, "train", shards.train_camera_ids, share, rank=number, world_size=micro_batches,
                cache_dir=cache_dir,
            )
            for number in self.numbers
        ]  # fmt: skip
        self._streams = [batches_from(loader, step) for loader in loaders]

    def of_step(self) -> Iterator[FrameBatch]:
        """The batch of each of :attr:`numbers` for the next step; take them all before the step after it."""
        return map(next, self._streams)


def batches_from(loader: ShardLoader, step: int) -> Iterator[FrameBatch]:
    """Batches for ``step`` and all later steps, epoch after epoch."""
    epoch, start = divmod(step, loader.batches_per_epoch)
    while True:
        yield from loader.epoch(epoch, start_batch=start)
        epoch, start = epoch + 1, 0


def seed_of(*parts: int) -> int:
    """One well-mixed seed for a tuple of integers such as (seed, step, piece)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
