"""The order of training data, as properties over all small worlds."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import PADDING, Order

orders = st.builds(
    Order,
    frames_per_shard=st.lists(st.integers(1, 6), min_size=1, max_size=6).map(tuple),
    cameras=st.integers(1, 9),
    frames_per_batch=st.integers(1, 5),
    views_per_frame=st.integers(1, 5),
    visits_per_epoch=st.none() | st.integers(1, 4),
    window_shards=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
worlds = st.integers(1, 5)
epochs = st.integers(0, 1000)


def _all_visits(order: Order, epoch: int, world_size: int) -> list[np.ndarray]:
    return [order.visits(epoch, rank, world_size) for rank in range(world_size)]


@settings(deadline=None)
@given(orders, epochs, worlds)
def test_ranks_share_every_visit_exactly_once_and_have_equal_batches(order: Order, epoch: int, world_size: int):
    visits = _all_visits(order, epoch, world_size)
    shape = (order.batches_per_epoch(world_size), order.frames_per_batch, 2)
    assert all(rank.shape == shape for rank in visits)
    seen = Counter(map(tuple, np.concatenate(visits).reshape(-1, 2).tolist()))
    seen.pop((PADDING, PADDING), None)
    frames = sum(order.frames_per_shard)
    assert seen == Counter({(frame, group): 1 for frame in range(frames) for group in range(order.groups)})


@settings(deadline=None)
@given(orders, epochs, worlds)
def test_padding_comes_last_and_is_less_than_a_batch_and_a_frame_a_rank(order: Order, epoch: int, world_size: int):
    for rank in _all_visits(order, epoch, world_size):
        padding = rank.reshape(-1, 2)[:, 0] == PADDING
        assert (np.diff(padding.astype(int)) >= 0).all()
        assert padding.sum() < order.frames_per_batch + order.groups


@settings(deadline=None)
@given(orders, epochs)
def test_a_frames_groups_hold_every_camera_once(order: Order, epoch: int):
    for frame in range(sum(order.frames_per_shard)):
        views = np.concatenate([order.views(epoch, frame, group) for group in range(order.groups)])
        chosen = views[views != PADDING]
        assert len(set(chosen.tolist())) == len(chosen)
        if order.visits_per_epoch is None:
            assert sorted(chosen.tolist()) == list(range(order.cameras))


@settings(deadline=None)
@given(orders, epochs, worlds)
def test_the_order_is_a_pure_function_of_its_arguments(order: Order, epoch: int, world_size: int):
    for first, second in zip(_all_visits(order, epoch, world_size), _all_visits(order, epoch, world_size), strict=True):
        np.testing.assert_array_equal(first, second)


@settings(deadline=None)
@given(orders, epochs, worlds)
def test_no_more_than_a_window_of_shards_is_open_at_a_time(order: Order, epoch: int, world_size: int):
    """Each window's visits are finished before the next one's begin."""
    for rank in range(world_size):
        place = 0
        flat = order.visits(epoch, rank, world_size).reshape(-1, 2)
        for window in order.windows(epoch, rank, world_size):
            assert len(window) <= order.window_shards
            frames = {frame for start, stop in window for frame in range(start, stop)}
            count = len(frames) * order.groups
            assert set(flat[place : place + count, 0].tolist()) == frames
            place += count


def test_epochs_and_seeds_have_different_orders():
    order = Order((5, 5, 5), 8, 2, 2, None, 2, seed=0)
    first, second = order.visits(0, 0, 1), order.visits(1, 0, 1)
    assert not np.array_equal(first, second)
    other = Order((5, 5, 5), 8, 2, 2, None, 2, seed=1).visits(0, 0, 1)
    assert not np.array_equal(first, other)
