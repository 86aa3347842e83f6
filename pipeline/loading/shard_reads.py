"""Two ways from a shard to a frame's members: through the local cache, or each alone from remote storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

from pipeline import storage
from pipeline.loading.cache import ShardCache
from pipeline.loading.frames import MemberReader
from pipeline.loading.member_reads import fetch_members
from pipeline.loading.shards_ahead import ShardsAhead
from pipeline.manifest import SampleRecord, ShardRecord


class ShardReads(Protocol):
    """Where an epoch's members come from."""

    def advance(self, batch: int) -> None:
        """Tell that the batches before ``batch`` are done."""

    def request(self, shard: int, sample: SampleRecord, suffixes: Iterable[str]) -> Callable[[], MemberReader]:
        """Ask for members of a sample, without waiting; what is returned waits for them, in any thread."""

    def close(self) -> None:
        """End all reads."""


class CachedShardReads:
    """Whole shards in the cache, made ready ahead of their first use."""

    def __init__(self, cache: ShardCache, shards: Sequence[ShardRecord], ahead: ShardsAhead):
        self._cache, self._shards, self._ahead = cache, shards, ahead

    def advance(self, batch: int) -> None:
        """See :class:`ShardReads`."""
        self._ahead.advance(batch)

    def request(self, shard: int, sample: SampleRecord, suffixes: Iterable[str]) -> Callable[[], MemberReader]:
        """See :class:`ShardReads`."""

        def ready() -> MemberReader:
            self._ahead.wait(shard)
            return partial(self._cache.read, self._shards[shard])

        return ready

    def close(self) -> None:
        """See :class:`ShardReads`."""
        self._ahead.close()


class SingleMemberReads:
    """Chosen members by range requests, ``threads`` at a time; nothing is kept."""

    def __init__(self, shards_uri: str, shards: Sequence[ShardRecord], threads: int):
        self._uris = [storage.join(shards_uri, shard.name) for shard in shards]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lipflow-members")

    def advance(self, batch: int) -> None:
        """See :class:`ShardReads`."""

    def request(self, shard: int, sample: SampleRecord, suffixes: Iterable[str]) -> Callable[[], MemberReader]:
        """See :class:`ShardReads`."""
        return self._pool.submit(fetch_members, self._uris[shard], sample, suffixes).result

    def close(self) -> None:
        """See :class:`ShardReads`."""
        self._pool.shutdown(wait=True, cancel_futures=True)
