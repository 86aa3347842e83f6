"""Shards are fetched and checked before their first frame is asked for, in the order in which an epoch needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np


class ShardsAhead:
    """Calls ``fetch`` for the shards that come next, as far ahead as the bounds allow; use :meth:`close` at the end.

    A shard occupies the bound from its fetch to the last batch that uses it, so that what is fetched ahead never
    drives out what is still needed.

    Args:
        fetch: makes a shard ready, given its number; errors are raised by :meth:`wait`.
        shards_of_batches: ``(batches, F)`` the shards that each batch uses; -1 for none.
        sizes_bytes: of every shard.
        max_bytes: of the shards that are ready and still needed.
        max_shards: of those among them that no batch has used yet.
        threads: fetches at a time.
    """

    def __init__(
        self,
        fetch: Callable[[int], object],
        shards_of_batches: np.ndarray,
        sizes_bytes: Sequence[int],
        max_bytes: int,
        max_shards: int,
        threads: int,
    ):
        self._fetch = fetch
        self._sizes_bytes, self._max_bytes, self._max_shards = sizes_bytes, max_bytes, max_shards
        per_batch = max(shards_of_batches.shape[1], 1)
        row = shards_of_batches.ravel()
        shards, first = np.unique(row, return_index=True)
        last = len(row) - 1 - np.unique(row[::-1], return_index=True)[1]
        order = [place for place in np.argsort(first) if shards[place] >= 0]
        self._coming = deque((int(shards[p]), int(first[p]) // per_batch, int(last[p]) // per_batch) for p in order)
        self._live: list[tuple[int, int, int]] = []
        self._fetched: dict[int, Future] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lipflow-shards")

    def advance(self, batch: int) -> None:
        """Tell that the batches before ``batch`` are done; starts what the bounds now allow."""
        self._live = [entry for entry in self._live if entry[2] >= batch]
        while self._coming:
            shard, _, _ = self._coming[0]
            unused = sum(first > batch for _, first, _ in self._live)
            occupied = sum(self._sizes_bytes[live] for live, _, _ in self._live)
            if unused >= self._max_shards or occupied + self._sizes_bytes[shard] > self._max_bytes:
                return
            self._live.append(self._coming.popleft())
            self._fetched[shard] = self._pool.submit(self._fetch, shard)

    def wait(self, shard: int) -> None:
        """Return when the shard is ready, or at once if it was not fetched ahead.

        Raises:
            LipflowError: what ``fetch`` raised.
        """
        if shard in self._fetched:
            self._fetched[shard].result()

    def close(self) -> None:
        """Start nothing more, and wait for what is under way."""
        self._pool.shutdown(wait=True, cancel_futures=True)
