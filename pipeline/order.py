"""The order of training data: a pure function of (seed, epoch, rank, world size).

Each epoch the shards are permuted and their frames laid out in a row, which is cut into one piece a rank, of
sizes that differ by at most one frame. In its piece a rank opens windows of a few shards, and draws the *visits*
of a window in random order. A visit is a frame with one group of its views: each epoch the cameras are permuted
for every frame anew and cut into groups of ``views_per_frame``. So no view is seen twice in an epoch, and all are
seen once unless ``visits_per_epoch`` bounds the groups. Every rank gets the same number of batches; -1 pads what
is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PADDING = -1
_SHARD_STREAM, _VISIT_STREAM, _VIEW_STREAM = 1, 2, 3


@dataclass(frozen=True)
class Order:
    """What the order depends on besides epoch, rank and world size.

    Attributes:
        frames_per_shard: the number of frames in each shard; frames are numbered through in this order.
        cameras: the number of cameras to draw views from.
        frames_per_batch: F.
        views_per_frame: K.
        visits_per_epoch: groups of views of a frame that are used in an epoch; None: all.
        window_shards: shards that are open at a time.
        seed: of all permutations.
    """

    frames_per_shard: tuple[int, ...]
    cameras: int
    frames_per_batch: int
    views_per_frame: int
    visits_per_epoch: int | None
    window_shards: int
    seed: int

    @property
    def groups(self) -> int:
        """Visits of each frame in an epoch."""
        groups = -(-self.cameras // self.views_per_frame)
        return groups if self.visits_per_epoch is None else min(groups, self.visits_per_epoch)

    def batches_per_epoch(self, world_size: int) -> int:
        """Batches of every rank: enough for the rank with the most frames."""
        most_frames = -(-sum(self.frames_per_shard) // world_size)
        return -(-most_frames * self.groups // self.frames_per_batch)

    def visits(self, epoch: int, rank: int, world_size: int) -> np.ndarray:
        """``(batches, F, 2)`` int64: (frame, group) of each place of each batch; (-1, -1) is padding."""
        rows = []
        for window, shards in enumerate(self.windows(epoch, rank, world_size)):
            frames = np.concatenate([np.arange(start, stop) for start, stop in shards])
            pairs = np.stack(np.meshgrid(frames, np.arange(self.groups), indexing="ij"), axis=-1).reshape(-1, 2)
            rows.append(self._generator(epoch, _VISIT_STREAM, rank, window).permutation(pairs))
        batches = self.batches_per_epoch(world_size)
        padded = np.full((batches * self.frames_per_batch, 2), PADDING, np.int64)
        if rows:
            visits = np.concatenate(rows)
            padded[: len(visits)] = visits
        return padded.reshape(batches, self.frames_per_batch, 2)

    def windows(self, epoch: int, rank: int, world_size: int) -> list[list[tuple[int, int]]]:
        """The rank's windows; each is a list of frame ranges (start, stop), one a shard."""
        starts = np.concatenate([[0], np.cumsum(self.frames_per_shard)]).astype(int)
        total = int(starts[-1])
        first, last = rank * total // world_size, (rank + 1) * total // world_size
        ranges, place = [], 0
        for shard in self._generator(epoch, _SHARD_STREAM).permutation(len(self.frames_per_shard)):
            count = self.frames_per_shard[shard]
            begin, end = max(first - place, 0), min(last - place, count)
            if begin < end:
                ranges.append((int(starts[shard]) + begin, int(starts[shard]) + end))
            place += count
        return [ranges[i : i + self.window_shards] for i in range(0, len(ranges), self.window_shards)]

    def views(self, epoch: int, frame: int, group: int) -> np.ndarray:
        """``(K,)`` int64 camera places of one group of a frame's views; -1 is padding."""
        permutation = self._generator(epoch, _VIEW_STREAM, frame).permutation(self.cameras)
        chosen = permutation[group * self.views_per_frame : (group + 1) * self.views_per_frame]
        views = np.full(self.views_per_frame, PADDING, np.int64)
        views[: len(chosen)] = chosen
        return views

    def _generator(self, epoch: int, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, *stream])
