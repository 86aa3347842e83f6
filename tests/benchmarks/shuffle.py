"""How far the order of training data is from a uniform shuffle: ``python tests/benchmarks/shuffle.py``.

Each figure of the first two tables (a set of many shards, and one of fewer shards than lanes) is the mean over
epochs, divided by the mean of the same figure over uniform permutations of the same visits; the last row is one more
set of those, and shows how well 1 is told from 1:

- *displacement*: distance between a visit's place in the epoch and its frame's place in the shard set.
- *same shard, segment, frame*: probability that two visits of a global batch share it. The segments are laid over
  the shards twice: frames permuted over the shards as the shard job does, and in the order of the capture.
- *time between visits* of a shard, and of a frame: mean distance in batches between two of them.
- *frames in a tenth*: different frames that are seen in a tenth of an epoch.

*open* is the largest number of shards that a rank has open at a time, *read* the shards that a rank reads in an
epoch, *reads* the sum over ranks in units of the shards there are. The other tables show what a rank reads on other
worlds with the same global batch, and what the order of a large epoch costs to compute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.loading.order import Order

FRAMES_PER_SHARD, FRAMES_PER_SEGMENT, WORLD_SIZE = 8, 40, 8
MANY_SHARDS, FEW_SHARDS = 500, 20  # neither is a multiple of the lanes: cuts fall within shards; and no padding
ORDER = Order((FRAMES_PER_SHARD,) * MANY_SHARDS, 40, 4, 4, None, 1, seed=0)
FIGURES = (
    "displacement",
    "same shard",
    "same segment",
    "same segment, capture order",
    "same frame",
    "time between visits, shard",
    "time between visits, frame",
    "frames in a tenth",
)


def main() -> None:
    """Measure all tables and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40, help="epochs over which the figures are taken")
    epochs = parser.parse_args().epochs
    console = Console(width=180)
    for shards in (MANY_SHARDS, FEW_SHARDS):
        console.print(_quality(replace(ORDER, frames_per_shard=(FRAMES_PER_SHARD,) * shards), epochs))
    console.print(_locality())
    console.print(_cost())


def _quality(base: Order, epochs: int) -> Table:
    frames = sum(base.frames_per_shard)
    table = Table(
        title=f"in units of a uniform shuffle: {frames} frames in {len(base.frames_per_shard)} shards, {base.groups} "
        f"visits of each, {WORLD_SIZE} ranks x {base.frames_per_batch} frames, "
        f"{base.batches_per_epoch(WORLD_SIZE)} batches, {epochs} epochs"
    )
    for column in ("lanes", "window_shards", "open", "read", "reads", *FIGURES):
        table.add_column(column, justify="right")

    def uniform(seed: int) -> np.ndarray:
        visits = np.repeat(np.arange(frames), base.groups)
        return np.random.default_rng(seed).permutation(visits).reshape(base.batches_per_epoch(WORLD_SIZE), -1)

    expected = _mean_figures(uniform, range(1000, 1000 + epochs))
    for lanes in (None, WORLD_SIZE):
        for window_shards in (1, 2, 4, 8):
            order = replace(base, lanes=lanes, window_shards=window_shards)
            ratios = _mean_figures(partial(_global_batches, order), range(epochs)) / expected
            row = (str(order.lanes_of(WORLD_SIZE)), str(window_shards), *_reads(order, WORLD_SIZE))
            table.add_row(*row, *(f"{ratio:.3f}" for ratio in ratios))
    ratios = _mean_figures(uniform, range(2000, 2000 + epochs)) / expected
    table.add_row("uniform", "", "", "", "", *(f"{ratio:.3f}" for ratio in ratios))
    return table


def _locality() -> Table:
    table = Table(title="the same global batches on other worlds, window_shards 1")
    for column in ("lanes", "ranks x frames", "open", "read", "reads"):
        table.add_column(column, justify="right")
    global_batch = ORDER.frames_per_batch * WORLD_SIZE
    for lanes in (None, WORLD_SIZE):
        for world_size in (1, 2, 4, 8, 16, 32):
            order = replace(ORDER, lanes=lanes, frames_per_batch=global_batch // world_size)
            row = (str(order.lanes_of(world_size)), f"{world_size} x {order.frames_per_batch}")
            table.add_row(*row, *_reads(order, world_size))
    return table


def _cost() -> Table:
    table = Table(title="seconds for one rank's order of 100,000 frames x 10 visits, best of 3")
    for column in ("frames per shard", "ranks", "s"):
        table.add_column(column, justify="right")
    for frames_per_shard in (8, 100):
        order = replace(ORDER, frames_per_shard=(frames_per_shard,) * (100_000 // frames_per_shard))
        for world_size in (1, 8, 64):
            seconds = min(_seconds(partial(order.visits, 0, 0, world_size)) for _ in range(3))
            table.add_row(str(frames_per_shard), str(world_size), f"{seconds:.3f}")
    return table


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _global_batches(order: Order, epoch: int) -> np.ndarray:
    """``(batches, G)``: the frame of each visit; there is no padding at these sizes."""
    return np.concatenate([order.visits(epoch, rank, WORLD_SIZE)[:, :, 0] for rank in range(WORLD_SIZE)], axis=1)


def _mean_figures(batches_of_epoch: Callable[[int], np.ndarray], epochs: range) -> np.ndarray:
    return np.mean([_figures(batches_of_epoch(epoch)) for epoch in epochs], axis=0)


def _figures(frames: np.ndarray) -> list[float]:
    """The figures of one epoch, in the order of :data:`FIGURES`."""
    batches, count = len(frames), int(frames.max()) + 1
    times = np.repeat(np.arange(batches), frames.shape[1])
    of_frame = times[np.argsort(frames.ravel(), kind="stable")].reshape(count, -1)
    segments = np.random.default_rng(0).permutation(count) // FRAMES_PER_SEGMENT
    stretches = np.array_split(frames, 10)
    return [
        float(np.abs((times + 0.5) / batches - (frames.ravel() + 0.5) / count).mean()),
        _same_in_batch(frames // FRAMES_PER_SHARD),
        _same_in_batch(segments[frames]),
        _same_in_batch(frames // FRAMES_PER_SEGMENT),
        _same_in_batch(frames),
        _mean_distance(np.sort(of_frame.reshape(count // FRAMES_PER_SHARD, -1), axis=1)),
        _mean_distance(of_frame),
        float(np.mean([len(np.unique(stretch)) for stretch in stretches])),
    ]


def _same_in_batch(keys: np.ndarray) -> float:
    """Probability that two visits of a batch have the same key."""
    numbered = keys + np.arange(len(keys))[:, None] * (keys.max() + 1)
    counts = np.unique(numbered, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (keys.size * (keys.shape[1] - 1)))


def _mean_distance(times: np.ndarray) -> float:
    """Mean distance of two of each row's sorted times."""
    count = times.shape[1]
    weights = 2 * np.arange(count) - count + 1
    return float((times * weights).sum(axis=1).mean() / (count * (count - 1) / 2))


def _reads(order: Order, world_size: int) -> tuple[str, str, str]:
    """Shards that a rank has open at most, that it reads in an epoch, and the sum of the latter in units of all."""
    most_open, read, count = 0, [], len(order.frames_per_shard)
    for rank in range(world_size):
        shards = order.visits(0, rank, world_size)[:, :, 0] // FRAMES_PER_SHARD
        first, last = np.full(count, len(shards)), np.full(count, -1)
        batch = np.repeat(np.arange(len(shards)), shards.shape[1])
        np.minimum.at(first, shards.ravel(), batch)
        np.maximum.at(last, shards.ravel(), batch)
        read.append(int((last >= 0).sum()))
        opened = np.bincount(first, minlength=len(shards) + 1)[:-1].cumsum()
        closed = np.bincount(last[last >= 0] + 1, minlength=len(shards) + 1)[:-1].cumsum()
        most_open = max(most_open, int((opened - closed).max()))
    return str(most_open), f"{max(read)}", f"{sum(read) / count:.2f}"


if __name__ == "__main__":
    main()
