"""The order of training data: a pure function of (seed, epoch, rank, world size), and its global batches of less.

A *visit* is a frame with one group of its views: each epoch the cameras are permuted for every frame anew and cut
into groups of ``views_per_frame``. So no view is seen twice in an epoch, and all are seen once unless
``visits_per_epoch`` bounds the groups.

**Lanes.** Each epoch the shards are permuted and their visits laid out in one row, which is cut into as many equal
lanes as the *global batch* (``frames_per_batch`` x world size) has places. A lane opens windows of ``window_shards``
shards, one window after the other, and draws the visits of a window in random order. Global batch i is the i-th
visit of every lane; a rank takes the places, and so the lanes, that are its own: neighbours, hence a contiguous
piece of the row. Where a cut falls within a shard, both lanes have it open at the same time (even lanes run
forwards, odd ones backwards), so that no shard is needed twice far apart.

**World size.** The lanes and their order depend on the size of the global batch and on nothing else of the world.
So 8 ranks x 1 frame, 4 x 2, 2 x 4 and 1 x 8 see the same global batches, visit by visit, and a run may change from
one to another at any batch, whatever the numbers. With another global batch an epoch is another order; every order
is whole (each visit once, ranks disjoint, equal numbers of batches), so that such a change belongs between two
epochs, unless ``lanes`` is given: then the visits seen after i batches of G are those after j batches of H
wherever iG = jH.

**Padding.** Batches are as few as can be: less than one global batch of places is left over, all of them in the
last one, spread to within one place over ranks that share no lane; there the visit is (-1, -1).

**How random.** ``tests/benchmarks/shuffle.py`` measures, in units of a uniform shuffle of all visits:

- *where in the epoch*: the shards are permuted uniformly, so a frame comes early or late as it would (displacement 1);
- *what shares a batch*: a batch takes one visit of each lane, so two of its visits come from one segment about as
  often (1), from one shard less often, and from one frame almost never. With fewer lanes than places, two visits of
  a lane fall into one batch, and share a shard the more often the fewer ``window_shards`` are (tens at 1);
- *how a frame's visits are spread*: not uniform. A lane dwells on its window, so the visits of a shard, and of a
  frame, lie within ``lanes x window_shards / shards`` of an epoch, and successive batches draw on the same shards:
  their distance, in units of the uniform one, is just that share. It is the price of reading each shard once; a wider
  window lowers it, and opens more shards at a time. Sets of no more shards than lanes do not pay it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lipflow.errors import ConfigError

PADDING = -1
_SHARD_STREAM, _VISIT_STREAM, _VIEW_STREAM = 1, 2, 3


@dataclass(frozen=True)
class Order:
    """What the order depends on besides epoch, rank and world size.

    Attributes:
        frames_per_shard: the number of frames in each shard; frames are numbered through in this order.
        cameras: the number of cameras to draw views from.
        frames_per_batch: F, of each rank.
        views_per_frame: K.
        visits_per_epoch: groups of views of a frame that are used in an epoch; None: all.
        window_shards: shards that a lane has open at a time.
        seed: of all permutations.
        lanes: parallel readings of an epoch, a divisor of the global batch; None: one for each of its places. With
            fewer, a rank has fewer shards open at a time (``window_shards`` for each of its lanes) and its batches
            are drawn from fewer; with fewer than ranks, several ranks read the same shards.
    """

    frames_per_shard: tuple[int, ...]
    cameras: int
    frames_per_batch: int
    views_per_frame: int
    visits_per_epoch: int | None
    window_shards: int
    seed: int
    lanes: int | None = None

    @property
    def groups(self) -> int:
        """Visits of each frame in an epoch."""
        groups = -(-self.cameras // self.views_per_frame)
        return groups if self.visits_per_epoch is None else min(groups, self.visits_per_epoch)

    def batches_per_epoch(self, world_size: int) -> int:
        """Batches of every rank: the fewest that hold all visits.

        Raises:
            ConfigError: ``lanes`` does not divide the global batch.
        """
        global_batch = self.lanes_of(world_size) * self._places_per_lane(world_size)
        return -(-sum(self.frames_per_shard) * self.groups // global_batch)

    def lanes_of(self, world_size: int) -> int:
        """The number of lanes in which an epoch is read.

        Raises:
            ConfigError: ``lanes`` does not divide the global batch.
        """
        global_batch = self.frames_per_batch * world_size
        if self.lanes is None:
            return global_batch
        if self.lanes < 1 or global_batch % self.lanes:
            raise ConfigError(
                f"lanes: {self.lanes} does not divide the global batch of {global_batch} frames ({world_size} ranks x "
                f"{self.frames_per_batch} frames_per_batch); choose a divisor, or leave it out for one lane a place"
            )
        return self.lanes

    def visits(self, epoch: int, rank: int, world_size: int) -> np.ndarray:
        """``(batches, F, 2)`` int64: (frame, group) of each place of each batch; (-1, -1) is padding.

        Side by side in order of rank, all ranks' batches of one number are the global batch of that number.

        Raises:
            ConfigError: ``lanes`` does not divide the global batch.
        """
        batches, per_lane = self.batches_per_epoch(world_size), self._places_per_lane(world_size)
        first, stop = rank * self.frames_per_batch, (rank + 1) * self.frames_per_batch
        lanes = range(first // per_lane, -(-stop // per_lane))
        numbers = np.full((len(lanes), batches * per_lane), PADDING, np.int64)
        for row, lane in zip(numbers, lanes, strict=True):
            place, generator = 0, self._generator(epoch, _VISIT_STREAM, lane)
            for window in self.windows(epoch, lane, world_size):
                drawn = generator.permutation(np.concatenate([np.arange(*visits) for visits in window]))
                row[place : place + len(drawn)] = drawn
                place += len(drawn)
        by_batch = numbers.reshape(len(lanes), batches, per_lane).swapaxes(0, 1).reshape(batches, -1)
        chosen = by_batch[:, first - lanes.start * per_lane :][:, : self.frames_per_batch]
        visits = np.stack(np.divmod(chosen, self.groups), axis=-1)
        visits[chosen == PADDING] = PADDING
        return visits

    def windows(self, epoch: int, lane: int, world_size: int) -> list[list[tuple[int, int]]]:
        """The windows of one lane; each is a list of ranges (start, stop) of visits, one range a shard.

        Visit number ``frame * groups + group`` is that of a frame and a group.

        Raises:
            ConfigError: ``lanes`` does not divide the global batch.
        """
        lanes = self.lanes_of(world_size)
        counts = np.array(self.frames_per_shard, np.int64) * self.groups
        numbers = np.cumsum(counts) - counts
        shards = self._generator(epoch, _SHARD_STREAM).permutation(len(counts))
        ends = np.cumsum(counts[shards])
        begin, end = (int(cut) * int(ends[-1]) // lanes for cut in (lane, lane + 1))
        ranges = []
        for place in range(int(np.searchsorted(ends, begin, side="right")), len(shards)):
            shard, row_end = shards[place], int(ends[place])
            row_start = row_end - int(counts[shard])
            if max(begin, row_start) >= end:
                break
            offset = int(numbers[shard]) - row_start
            ranges.append((max(begin, row_start) + offset, min(end, row_end) + offset))
        if lane % 2:
            ranges.reverse()
        return [ranges[i : i + self.window_shards] for i in range(0, len(ranges), self.window_shards)]

    def views(self, epoch: int, frame: int, group: int) -> np.ndarray:
        """``(K,)`` int64 camera places of one group of a frame's views; -1 is padding."""
        permutation = self._generator(epoch, _VIEW_STREAM, frame).permutation(self.cameras)
        chosen = permutation[group * self.views_per_frame : (group + 1) * self.views_per_frame]
        views = np.full(self.views_per_frame, PADDING, np.int64)
        views[: len(chosen)] = chosen
        return views

    def _places_per_lane(self, world_size: int) -> int:
        return self.frames_per_batch * world_size // self.lanes_of(world_size)

    def _generator(self, epoch: int, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, *stream])
