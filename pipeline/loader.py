"""Batches of F frames x K views for training.

The order is that of :mod:`pipeline.order`; shards come through :mod:`pipeline.cache`; frames are decoded by a pool
of threads, some batches ahead. Going on in the middle of an epoch takes no more than its number: nothing that was
seen is read again. Errors are raised, never skipped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from pydantic import Field

from lipflow.config import StrictConfig
from lipflow.errors import ConfigError, ShardSetError
from lipflow.types import DRIVING_SIGNALS, FrameBatch
from pipeline.cache import ShardCache
from pipeline.frames import FrameArrays, FrameReader
from pipeline.manifest import SampleRecord, ShardRecord
from pipeline.order import PADDING, Order
from pipeline.shardset import ShardSet

PADDING_FRAME_ID = ""
"""The id of a frame that only fills a batch: none of its views is present, and it must not be counted."""


class LoaderConfig(StrictConfig):
    """How training data are drawn and read.

    Attributes:
        frames_per_batch: F, frames of each batch of each rank.
        views_per_frame: K, views of each frame in a batch.
        visits_per_epoch: visits of each frame in an epoch, each with K other views; None: until all were used.
        window_shards: shards from which frames are drawn at a time.
        seed: of the order.
        signals: driving signals that are decoded; the frontal image costs as much as one more view.
        decode_threads: threads that read and decode.
        prefetch_batches: batches that are prepared ahead.
        cache_max_bytes: bound of the copies of remote shards on the local disk.
    """

    frames_per_batch: int = Field(default=4, gt=0)
    views_per_frame: int = Field(default=4, gt=0)
    visits_per_epoch: int | None = Field(default=None, gt=0)
    window_shards: int = Field(default=4, gt=0)
    seed: int = Field(default=0, ge=0)
    signals: tuple[str, ...] = DRIVING_SIGNALS
    decode_threads: int = Field(default=4, gt=0)
    prefetch_batches: int = Field(default=2, ge=0)
    cache_max_bytes: int = Field(default=50 * 2**30, gt=0)


class ShardLoader:
    """The batches of one rank.

    Args:
        shard_set: the open set.
        split: ``"train"``, ``"val"`` or ``"test"``.
        camera_ids: the cameras from which views are drawn.
        config: sizes, order and resources.
        rank: of this process.
        world_size: number of processes that share the data.
        cache_dir: folder for copies of remote shards; None: a temporary one.

    Raises:
        ConfigError: an impossible rank, or more views than cameras.
        ShardSetError: an unknown split or camera, or a split without frames.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        split: str,
        camera_ids: Sequence[str],
        config: LoaderConfig,
        rank: int = 0,
        world_size: int = 1,
        cache_dir: str | Path | None = None,
    ):
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of a world of {world_size}; expected 0 <= rank < world_size")
        unknown = [signal for signal in config.signals if signal not in DRIVING_SIGNALS]
        if unknown:
            raise ConfigError(f"signals: {unknown[0]!r} is none; choose from {', '.join(DRIVING_SIGNALS)}")
        if not 0 < len(set(camera_ids)) == len(camera_ids):
            raise ConfigError("camera_ids: expected at least one camera, each once")
        self._set = shard_set
        self._config = config
        self._rank, self._world_size = rank, world_size
        self._camera_ids = list(camera_ids)
        self._places = np.array(shard_set.camera_places(camera_ids), np.int64)
        shards = [shard for shard in shard_set.shards(split) if shard.samples]
        if not shards:
            raise ShardSetError(f"{shard_set.uri}: split {split!r} has no frames; change the splits and shard again")
        self._frames: list[tuple[ShardRecord, SampleRecord]] = [(s, sample) for s in shards for sample in s.samples]
        self._order = Order(
            frames_per_shard=tuple(len(shard.samples) for shard in shards),
            cameras=len(camera_ids),
            frames_per_batch=config.frames_per_batch,
            views_per_frame=config.views_per_frame,
            visits_per_epoch=config.visits_per_epoch,
            window_shards=config.window_shards,
            seed=config.seed,
        )
        self._cache = ShardCache(shard_set.uri, cache_dir, config.cache_max_bytes)
        self._reader = FrameReader(shard_set.manifest, config.signals)

    @property
    def batches_per_epoch(self) -> int:
        """The same on every rank."""
        return self._order.batches_per_epoch(self._world_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[FrameBatch]:
        """The batches of an epoch, from number ``start_batch`` on.

        Padding at the end of an epoch is a frame with the id :data:`PADDING_FRAME_ID`, none of whose views is
        present; its mesh and texture are those of another frame, so that it can be computed with.

        Raises:
            ShardSetError: a shard or member is absent or damaged.
            StorageError: a shard cannot be read.
        """
        visits = self._order.visits(epoch, self._rank, self._world_size)
        filler = max(int(visits[0, 0, 0]), 0)
        pool = ThreadPoolExecutor(self._config.decode_threads, thread_name_prefix="lipflow-decode")
        waiting: deque[tuple[np.ndarray, np.ndarray, list[Future[FrameArrays]]]] = deque()
        try:
            for batch in visits[start_batch:]:
                waiting.append(self._submit(pool, epoch, batch, filler))
                if len(waiting) > self._config.prefetch_batches:
                    yield self._collect(*waiting.popleft())
            while waiting:
                yield self._collect(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, epoch: int, batch: np.ndarray, filler: int
    ) -> tuple[np.ndarray, np.ndarray, list[Future[FrameArrays]]]:
        views = np.full((len(batch), self._config.views_per_frame), PADDING, np.int64)
        for place, (frame, group) in enumerate(batch):
            if frame != PADDING:
                views[place] = self._order.views(epoch, int(frame), int(group))
        futures = [
            pool.submit(self._decode, filler if frame == PADDING else int(frame), row)
            for (frame, _), row in zip(batch, views, strict=True)
        ]
        return batch[:, 0], views, futures

    def _decode(self, frame: int, views: np.ndarray) -> FrameArrays:
        shard, sample = self._frames[frame]
        camera_ids = [None if view == PADDING else self._camera_ids[view] for view in views]
        return self._reader.read(sample, lambda offset, size: self._cache.read(shard, offset, size), camera_ids)

    def _collect(self, frames: np.ndarray, views: np.ndarray, futures: list[Future[FrameArrays]]) -> FrameBatch:
        arrays = [future.result() for future in futures]
        ids = [PADDING_FRAME_ID if frame == PADDING else self._frames[frame][1].frame_id for frame in frames]
        return self._set.batch(ids, arrays, self._places[np.maximum(views, 0)])


__all__ = ["PADDING_FRAME_ID", "LoaderConfig", "ShardLoader", "ShardSet"]
