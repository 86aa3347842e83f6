"""The order of training data, as properties over many sizes of data, batches and worlds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipflow.errors import ConfigError
from pipeline.loading.order import PADDING, Order

epochs = st.integers(0, 1000)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@st.composite
def orders_and_worlds(draw: st.DrawFn, most_ranks: int = 6) -> tuple[Order, int]:
    """An order, and a world size on which it is legal."""
    frames_per_batch, world_size = draw(st.integers(1, 6)), draw(st.integers(1, most_ranks))
    order = Order(
        frames_per_shard=tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))),
        cameras=draw(st.integers(1, 9)),
        frames_per_batch=frames_per_batch,
        views_per_frame=draw(st.integers(1, 5)),
        visits_per_epoch=draw(st.none() | st.integers(1, 4)),
        window_shards=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**31)),
        lanes=draw(st.none() | st.sampled_from(_divisors(frames_per_batch * world_size))),
    )
    return order, world_size


def _global_batches(order: Order, epoch: int, world_size: int) -> np.ndarray:
    """``(batches, G, 2)``: the ranks' batches side by side."""
    return np.concatenate([order.visits(epoch, rank, world_size) for rank in range(world_size)], axis=1)


def _counted(visits: np.ndarray) -> Counter[tuple[int, int]]:
    seen = Counter(map(tuple, visits.reshape(-1, 2).tolist()))
    seen.pop((PADDING, PADDING), None)
    return seen


def _every_visit_once(order: Order) -> Counter[tuple[int, int]]:
    frames = sum(order.frames_per_shard)
    return Counter({(frame, group): 1 for frame in range(frames) for group in range(order.groups)})


def _shard_of_frame(order: Order) -> np.ndarray:
    return np.repeat(np.arange(len(order.frames_per_shard)), order.frames_per_shard)


@settings(deadline=None)
@given(orders_and_worlds(), epochs)
def test_ranks_share_every_visit_exactly_once_and_have_equal_batches(case: tuple[Order, int], epoch: int):
    order, world_size = case
    visits = [order.visits(epoch, rank, world_size) for rank in range(world_size)]
    shape = (order.batches_per_epoch(world_size), order.frames_per_batch, 2)
    assert all(rank.shape == shape for rank in visits)
    assert _counted(np.stack(visits)) == _every_visit_once(order)


@settings(deadline=None)
@given(orders_and_worlds(), epochs)
def test_padding_is_less_than_a_global_batch_and_all_in_the_last_one(case: tuple[Order, int], epoch: int):
    order, world_size = case
    padding = _global_batches(order, epoch, world_size)[:, :, 0] == PADDING
    assert not padding[:-1].any()
    assert padding.sum() < order.frames_per_batch * world_size
    if order.lanes is None or order.lanes % world_size == 0:
        per_rank = padding.reshape(len(padding), world_size, -1).sum(axis=(0, 2))
        assert per_rank.max() - per_rank.min() <= 1


@settings(deadline=None)
@given(orders_and_worlds(), epochs)
def test_a_frames_groups_hold_every_camera_once(case: tuple[Order, int], epoch: int):
    order, _ = case
    for frame in range(sum(order.frames_per_shard)):
        views = np.concatenate([order.views(epoch, frame, group) for group in range(order.groups)])
        chosen = views[views != PADDING]
        assert len(set(chosen.tolist())) == len(chosen) == min(order.cameras, order.groups * order.views_per_frame)
        if order.visits_per_epoch is None:
            assert sorted(chosen.tolist()) == list(range(order.cameras))


@settings(deadline=None)
@given(orders_and_worlds(most_ranks=4), epochs)
def test_global_batches_are_the_same_on_every_world_that_divides_them(case: tuple[Order, int], epoch: int):
    order, world_size = case
    global_batch = order.frames_per_batch * world_size
    expected = _global_batches(order, epoch, world_size)
    for other in _divisors(global_batch):
        resized = replace(order, frames_per_batch=global_batch // other)
        np.testing.assert_array_equal(_global_batches(resized, epoch, other), expected)


def test_a_large_epoch_is_the_same_whole_on_1_and_12_and_96_ranks():
    """4,001 frames of 40 cameras in shards of 7 and 8, 96 places a global batch; 10 visits of each frame."""
    order = Order((8, 7) * 266 + (11,), 40, 96, 4, None, 2, seed=5)
    expected = _global_batches(order, 9, 1)
    assert _counted(expected) == _every_visit_once(order)
    for world_size in (12, 96):
        resized = replace(order, frames_per_batch=96 // world_size)
        np.testing.assert_array_equal(_global_batches(resized, 9, world_size), expected)


@settings(deadline=None)
@given(orders_and_worlds(), epochs, st.lists(st.tuples(st.integers(0, 12), st.integers(0, 100)), max_size=4))
def test_a_run_that_moves_between_worlds_at_any_batch_sees_every_visit_once(
    case: tuple[Order, int], epoch: int, moves: list[tuple[int, int]]
):
    """The only state is the number of the batch: each part of the run builds its own order from the config."""
    order, world_size = case
    global_batch = order.frames_per_batch * world_size
    batches, done, parts = order.batches_per_epoch(world_size), 0, []
    for length, choice in [*moves, (order.batches_per_epoch(world_size), 0)]:
        world = _divisors(global_batch)[choice % len(_divisors(global_batch))]
        here = replace(order, frames_per_batch=global_batch // world)
        stop = min(done + length, batches)
        parts += [here.visits(epoch, rank, world)[done:stop] for rank in range(world)]
        done = stop
    assert _counted(np.concatenate([part.reshape(-1, 2) for part in parts])) == _every_visit_once(order)


@settings(deadline=None)
@given(orders_and_worlds(), epochs, st.integers(2, 4))
def test_with_given_lanes_a_larger_global_batch_takes_the_same_visits_in_larger_steps(
    case: tuple[Order, int], epoch: int, factor: int
):
    order, world_size = case
    fixed = replace(order, lanes=order.lanes_of(world_size))
    small, large = (_global_batches(fixed, epoch, ranks) for ranks in (world_size, world_size * factor))
    for batch in range(1, len(large)):
        assert _counted(large[:batch]) == _counted(small[: batch * factor])


@settings(deadline=None)
@given(orders_and_worlds(), epochs)
def test_a_lane_finishes_a_window_of_few_shards_before_it_opens_the_next(case: tuple[Order, int], epoch: int):
    order, world_size = case
    lanes, shard_of_frame = order.lanes_of(world_size), _shard_of_frame(order)
    batches = _global_batches(order, epoch, world_size)
    by_lane = batches.reshape(len(batches), lanes, -1, 2).swapaxes(0, 1).reshape(lanes, -1, 2)
    for lane, visits in enumerate(by_lane):
        place = 0
        for window in order.windows(epoch, lane, world_size):
            expected = {divmod(number, order.groups) for start, stop in window for number in range(start, stop)}
            assert set(_counted(visits[place : place + len(expected)])) == expected
            assert len({shard_of_frame[frame] for frame, _ in expected}) == len(window) <= order.window_shards
            place += len(expected)
        assert (visits[place:] == PADDING).all()


@settings(deadline=None)
@given(orders_and_worlds(), epochs)
def test_ranks_together_read_no_more_shards_than_there_are_and_one_for_each_cut(case: tuple[Order, int], epoch: int):
    order, world_size = case
    order = replace(order, lanes=None)
    shard_of_frame, reads = _shard_of_frame(order), 0
    for rank in range(world_size):
        frames = order.visits(epoch, rank, world_size)[:, :, 0]
        reads += len(set(shard_of_frame[frames[frames != PADDING]].tolist()))
    assert reads <= len(order.frames_per_shard) + world_size - 1


@settings(deadline=None)
@given(orders_and_worlds(), epochs)
def test_a_shard_that_two_lanes_share_is_open_in_both_at_the_same_end_of_the_epoch(case: tuple[Order, int], epoch: int):
    order, world_size = case
    shard_of_frame = _shard_of_frame(order)
    lanes = [order.windows(epoch, lane, world_size) for lane in range(order.lanes_of(world_size))]
    shards = [
        [{shard_of_frame[start // order.groups] for start, _ in window} for window in windows] for windows in lanes
    ]
    for lane, (left, right) in enumerate(pairwise(shards)):
        if left and right and set().union(*left) & set().union(*right):
            end = -1 if lane % 2 == 0 else 0
            assert left[end] & right[end]


def test_seeds_epochs_and_lanes_have_different_orders():
    order = Order((8,) * 8, 8, 2, 2, None, 2, seed=0)
    seen = [replace(order, seed=seed).visits(epoch, 0, 1) for seed in range(5) for epoch in range(5)]
    assert len({visits.tobytes() for visits in seen}) == len(seen)
    views = [order.views(epoch, frame, 0) for epoch in range(3) for frame in range(40)]
    assert len({chosen.tobytes() for chosen in views}) > 40  # of 56 ordered pairs; 49 are expected
    within_lanes = [lane - lane.min() for lane in Order((64,) * 4, 1, 4, 1, 1, 1, 0).visits(0, 0, 1)[:, :, 0].T]
    assert len({lane.tobytes() for lane in within_lanes}) == 4


def test_over_epochs_every_frame_comes_as_early_as_late():
    """400 epochs: the mean position is within 4.5 standard errors of the middle; worst of six seeds: 3.6."""
    order = Order((6, 6, 6, 6, 6, 6, 6, 6, 0), 1, 4, 1, 1, 1, seed=3)
    batches = order.batches_per_epoch(1)
    positions = np.stack(
        [np.argsort(order.visits(epoch, 0, 1)[:, :, 0].ravel(), kind="stable") // 4 for epoch in range(400)]
    )
    standard_error = np.sqrt((batches**2 - 1) / 12 / len(positions))
    assert np.abs(positions.mean(axis=0) - (batches - 1) / 2).max() < 4.5 * standard_error


def test_the_order_of_a_seed_is_the_same_in_every_release():
    """A checkpoint holds only the number of a batch: another order under it would repeat and lose visits."""
    order = Order((3, 2, 3), 5, 2, 2, 2, 1, seed=7)
    assert order.visits(1, 0, 2).tolist() == [[[5, 1], [0, 1]], [[6, 0], [0, 0]], [[6, 1], [7, 1]], [[5, 0], [7, 0]]]
    assert [order.views(1, 4, group).tolist() for group in range(2)] == [[3, 0], [4, 2]]


def test_lanes_that_do_not_divide_the_global_batch_are_refused():
    order = Order((4, 4), 4, 3, 2, None, 1, seed=0, lanes=4)
    assert order.batches_per_epoch(4) == 2
    for call in (lambda: order.batches_per_epoch(2), lambda: order.visits(0, 0, 2)):
        with pytest.raises(ConfigError, match=r"lanes: 4 does not divide the global batch of 6 frames \(2 ranks x 3"):
            call()
