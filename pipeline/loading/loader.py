"""Batches of F frames x K views for training.

The order is that of :mod:`pipeline.loading.order`; shards come through :mod:`pipeline.loading.cache`, fetched and
checked before they are needed; images are decoded by a pool of threads, some batches ahead, straight into the memory of
their batch. What touches pixels gives the GIL back. Pixels stay uint8 until they are on the training device, where the
model normalises them. Going on in the middle of an epoch takes no more than its number: nothing that was seen is read
again. Errors are raised, never skipped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from lipflow.config import StrictConfig
from lipflow.errors import ConfigError, ShardSetError
from lipflow.types import DRIVING_SIGNALS, FrameBatch, map_tensors
from pipeline import storage
from pipeline.loading.cache import ShardCache, ShardCheck
from pipeline.loading.frames import BatchPixels, FrameArrays, FramePiece, FrameReader, MemberReader
from pipeline.loading.order import PADDING, Order
from pipeline.loading.shard_reads import CachedShardReads, ShardReads, SingleMemberReads
from pipeline.loading.shards_ahead import ShardsAhead
from pipeline.loading.shardset import ShardSet
from pipeline.manifest import SampleRecord
from pipeline.sharding.samples import image_suffix

PADDING_FRAME_ID = ""
"""The id of a frame that only fills a batch: none of its views is present, and it must not be counted."""

_LOCAL_CHECKS, _REMOTE_SHARDS, _REMOTE_MEMBERS = 1, 4, 16
"""Threads that make shards ready, or read single members, which wait for the network most of their time."""
_JOBS_PER_THREAD = 2
"""Of each batch: one would leave threads waiting for the one whose images are slower."""
_WORTH_SINGLE_READS = 0.25
"""The share of a shard's bytes below which its members are read alone: small requests cost more a byte."""


class LoaderConfig(StrictConfig):
    """How training data are drawn and read.

    Attributes:
        frames_per_batch: F, frames of each batch of each rank.
        views_per_frame: K, views of each frame in a batch.
        visits_per_epoch: visits of each frame in an epoch, each with K other views; None: until all were used.
        window_shards: shards that each of the frames_per_batch lanes has open at a time (see
            :mod:`pipeline.loading.order`): more mix better and take more of the local disk.
        seed: of the order.
        signals: driving signals that are decoded; the frontal image costs as much as one more view.
        decode_threads: threads that read and decode.
        prefetch_batches: batches that are prepared ahead.
        cache_max_bytes: bound of the copies of remote shards on the local disk.
        remote_reads: ``"shards"`` fetches remote shards whole into the cache, each once for all its frames;
            ``"members"`` reads the chosen views alone by range requests, and keeps nothing. ``"auto"`` takes members
            if an epoch wants less than a quarter of the shards' bytes and the shards of the split exceed
            ``cache_max_bytes`` (so that each epoch would fetch them again), and ``check_shards`` allows it.
        check_shards: ``"once"``: the SHA-256 of every shard is compared with the manifest at its first use by this
            process and whenever it was fetched; ``"each-epoch"``: in every epoch again, and members are never read
            alone; ``"size"``: sizes alone are compared, for large local sets of which few views are used, as a
            digest takes all bytes of a shard.
        pin_memory: decode into page-locked memory, from which :func:`prefetch_to_device` copies while the device
            computes; without CUDA it does nothing.
    """

    frames_per_batch: int = Field(default=4, gt=0)
    views_per_frame: int = Field(default=4, gt=0)
    visits_per_epoch: int | None = Field(default=None, gt=0)
    window_shards: int = Field(default=1, gt=0)
    seed: int = Field(default=0, ge=0)
    signals: tuple[str, ...] = DRIVING_SIGNALS
    decode_threads: int = Field(default=4, gt=0)
    prefetch_batches: int = Field(default=2, ge=0)
    cache_max_bytes: int = Field(default=50 * 2**30, gt=0)
    remote_reads: Literal["auto", "shards", "members"] = "auto"
    check_shards: ShardCheck = "once"
    pin_memory: bool = False

    @model_validator(mode="after")
    def _check(self) -> LoaderConfig:
        if self.remote_reads == "members" and self.check_shards == "each-epoch":
            raise ValueError(
                "remote_reads=members cannot compare the digests of shards as check_shards=each-epoch asks;"
                " set remote_reads=shards or check_shards=once"
            )
        return self


@dataclass
class _Waiting:
    """A batch that is being decoded: ``frames (F,)``, ``views (F, K)``, and where its parts will be."""

    frames: np.ndarray
    views: np.ndarray
    pixels: BatchPixels
    arrays: list[FrameArrays]
    jobs: list[Future[None]]


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
        self._shards = shards
        self._frames: list[SampleRecord] = [sample for shard in shards for sample in shard.samples]
        self._shard_of_frame = np.repeat(np.arange(len(shards)), [len(shard.samples) for shard in shards])
        self._order = Order(
            frames_per_shard=tuple(len(shard.samples) for shard in shards),
            cameras=len(camera_ids),
            frames_per_batch=config.frames_per_batch,
            views_per_frame=config.views_per_frame,
            visits_per_epoch=config.visits_per_epoch,
            window_shards=config.window_shards,
            seed=config.seed,
        )
        self._cache = ShardCache(shard_set.uri, cache_dir, config.cache_max_bytes, config.check_shards)
        self._reader = FrameReader(shard_set.manifest, config.signals)
        self._pinned = config.pin_memory and torch.cuda.is_available()
        self.reads_members = self._chooses_members()
        """Whether chosen members are read alone, see :attr:`LoaderConfig.remote_reads`."""

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
        self._cache.start_epoch()
        waiting: deque[_Waiting] = deque()
        with ExitStack() as stack:
            reads = self._reads(visits[start_batch:])
            stack.callback(reads.close)
            pool = ThreadPoolExecutor(self._config.decode_threads, thread_name_prefix="lipflow-decode")
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            for number, batch in enumerate(visits[start_batch:]):
                reads.advance(max(number - self._config.prefetch_batches, 0))
                waiting.append(self._submit(pool, reads, epoch, batch, filler))
                if len(waiting) > self._config.prefetch_batches:
                    yield self._collect(waiting.popleft())
            while waiting:
                yield self._collect(waiting.popleft())

    def _chooses_members(self) -> bool:
        config = self._config
        if config.remote_reads != "auto" or storage.is_local(self._set.uri):
            return config.remote_reads == "members" and not storage.is_local(self._set.uri)
        if config.check_shards == "each-epoch":
            return False
        if sum(shard.size_bytes for shard in self._shards) <= config.cache_max_bytes:
            return False
        return self._wanted_share() < _WORTH_SINGLE_READS

    def _wanted_share(self) -> float:
        """The share of its bytes that an epoch uses of the first shard; the others are about the same."""
        shard, groups = self._shards[0], self._order.groups
        codec = str(self._set.manifest.config["codec"])
        views = [image_suffix(camera_id, codec) for camera_id in self._camera_ids]
        used_views = min(groups * self._config.views_per_frame, len(views)) / len(views)
        wanted = 0.0
        for sample in shard.samples:
            sizes = {suffix: size for suffix, (_, size, _) in sample.members.items()}
            wanted += used_views * sum(sizes.get(suffix, 0) for suffix in views)
            wanted += groups * sum(sizes.get(suffix, 0) for suffix in self._reader.suffixes([]))
        return wanted / shard.size_bytes

    def _reads(self, visits: np.ndarray) -> ShardReads:
        if self.reads_members:
            return SingleMemberReads(self._set.uri, self._shards, _REMOTE_MEMBERS)
        frames = visits[..., 0]
        local, window = storage.is_local(self._set.uri), self._config.window_shards
        ahead = ShardsAhead(
            lambda shard: self._cache.ensure(self._shards[shard]),
            np.where(frames == PADDING, -1, self._shard_of_frame[frames]),
            [shard.size_bytes for shard in self._shards],
            self._config.cache_max_bytes,
            max_shards=window if local else window * self._config.frames_per_batch,
            threads=_LOCAL_CHECKS if local else _REMOTE_SHARDS,
        )
        return CachedShardReads(self._cache, self._shards, ahead)

    def _submit(
        self, pool: ThreadPoolExecutor, reads: ShardReads, epoch: int, batch: np.ndarray, filler: int
    ) -> _Waiting:
        views = np.full((len(batch), self._config.views_per_frame), PADDING, np.int64)
        pixels = self._reader.allocate(*views.shape, pinned=self._pinned)
        arrays: list[FrameArrays] = []
        pieces: list[Callable[[], None]] = []
        for place, (visited, group) in enumerate(batch):
            frame = filler if visited == PADDING else int(visited)
            if visited != PADDING:
                views[place] = self._order.views(epoch, frame, int(group))
            camera_ids = [None if view == PADDING else self._camera_ids[view] for view in views[place]]
            sample = self._frames[frame]
            members = reads.request(int(self._shard_of_frame[frame]), sample, self._reader.suffixes(camera_ids))
            frame_arrays, frame_pieces = self._reader.pieces(sample, camera_ids, pixels.frame(place))
            arrays.append(frame_arrays)
            pieces += [partial(_decode, piece, members) for piece in frame_pieces]
        # By image and not by frame, so that all threads are busy with a batch of few frames; and some at a time, since
        # small images take little longer than what a job of a pool costs.
        jobs = min(len(pieces), _JOBS_PER_THREAD * self._config.decode_threads)
        futures = [pool.submit(_call_all, pieces[job::jobs]) for job in range(jobs)]
        return _Waiting(batch[:, 0], views, pixels, arrays, futures)

    def _collect(self, batch: _Waiting) -> FrameBatch:
        for job in batch.jobs:
            job.result()
        ids = [PADDING_FRAME_ID if frame == PADDING else self._frames[frame].frame_id for frame in batch.frames]
        return self._set.batch(ids, batch.arrays, batch.pixels, self._places[np.maximum(batch.views, 0)])


def _decode(piece: FramePiece, members: Callable[[], MemberReader]) -> None:
    piece(members())


def _call_all(pieces: Sequence[Callable[[], None]]) -> None:
    for piece in pieces:
        piece()


def prefetch_to_device(batches: Iterable[FrameBatch], device: torch.device | str) -> Iterator[FrameBatch]:
    """The same batches on ``device``, copied one batch ahead of the one that is used.

    On CUDA the copies run on a stream of their own while the device computes, if the pixels lie in pinned memory
    (``LoaderConfig.pin_memory``). Pixels stay uint8: a quarter of the bytes of float32. Elsewhere nothing is ahead, and
    tensors that are on the device already are passed through as they are.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)
    waiting: tuple[FrameBatch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            following = batch.to(device), stream.record_event()
        if waiting is not None:
            yield _handed_over(*waiting)
        waiting = following
    if waiting is not None:
        yield _handed_over(*waiting)


def _handed_over(batch: FrameBatch, copied: torch.cuda.Event) -> FrameBatch:
    """Make the current stream wait for the copy, and the allocator for the current stream."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(copied)

    def used_here(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(current)
        return tensor

    return map_tensors(batch, used_here)


__all__ = ["PADDING_FRAME_ID", "LoaderConfig", "ShardLoader", "ShardSet", "prefetch_to_device"]
