"""Intervals by hand, where the bootstrap has few outcomes, and against the textbook, where it has many."""

import math

import pytest
import torch

from lipflow.bootstrap import bootstrap_interval, bootstrap_ratio


def test_interval_of_normal_values_is_the_textbook_one():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    interval = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std().item() / 20
    assert interval.mean == pytest.approx(values.mean().item())
    # Measured: 4 % and 1 % off.
    assert interval.high - interval.mean == pytest.approx(half, rel=0.1)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.1)
    assert interval.frames == 400


def test_it_repeats_with_its_seed_and_narrows_with_confidence():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    wide, narrow = bootstrap_interval(values), bootstrap_interval(values, confidence=0.5)
    assert narrow.high - narrow.low < wide.high - wide.low


def test_a_mean_of_drawn_blocks_is_that_of_all_their_frames_by_hand():
    """Blocks A = 0, 0 and B = 3: AA gives 0, BB gives 3, AB and BA give 3 / 3 frames = 1, and are half of all draws."""
    values, blocks = torch.tensor([0.0, 0.0, 3.0]), ["A", "A", "B"]
    whole = bootstrap_interval(values, blocks=blocks)
    assert (whole.mean, whole.low, whole.high) == pytest.approx((1.0, 0.0, 3.0))
    inner = bootstrap_interval(values, blocks=blocks, confidence=0.4)
    assert (inner.low, inner.high) == pytest.approx((1.0, 1.0))


def test_frames_that_repeat_their_segment_count_once_if_segments_are_resampled():
    """Of 40 segments with ten equal frames each, frames claim an interval sqrt(10) times too narrow."""
    of_segment = torch.randn(40, generator=torch.Generator().manual_seed(2)).double()
    values, blocks = of_segment.repeat_interleave(10), [f"s{i // 10}" for i in range(400)]
    by_segment, by_frame = bootstrap_interval(values, blocks=blocks), bootstrap_interval(values)
    half = 1.96 * of_segment.std().item() / math.sqrt(40)
    # Measured: 3 % and 2 % off.
    assert (by_segment.high - by_segment.low) / 2 == pytest.approx(half, rel=0.1)
    assert (by_segment.high - by_segment.low) / (by_frame.high - by_frame.low) == pytest.approx(10**0.5, rel=0.1)


def test_seeds_are_averaged_and_resampled_by_hand():
    """Two seeds with 1 and 3 in every frame: both drawn twice in a quarter of the draws each, else 2."""
    values = torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    whole, inner = bootstrap_interval(values), bootstrap_interval(values, confidence=0.4)
    assert (whole.mean, whole.low, whole.high, whole.frames) == pytest.approx((2.0, 1.0, 3.0, 3))
    assert (inner.low, inner.high) == pytest.approx((2.0, 2.0))


def test_a_paired_ratio_of_proportional_errors_is_exact_however_hard_the_frames_are():
    errors = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    found = bootstrap_ratio(0.9 * errors, errors)
    assert (found.mean, found.low, found.high) == pytest.approx((0.9, 0.9, 0.9))


def test_a_ratio_is_of_means_and_not_the_mean_of_ratios_by_hand():
    """Frames (1, 2) and (6, 4): 7 / 6, not (1/2 + 3/2) / 2; drawn twice, a frame gives 1/2 or 3/2."""
    found = bootstrap_ratio(torch.tensor([1.0, 6.0]), torch.tensor([2.0, 4.0]))
    assert (found.mean, found.low, found.high) == pytest.approx((7 / 6, 0.5, 1.5))


def test_the_seeds_of_a_ratio_are_separate_trainings_by_hand():
    """Each side is 1, 2 or 3: 1/3 and 3 come in one of 16 draws each, which is more than a tail of 2.5 %."""
    seeds = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    found = bootstrap_ratio(seeds, seeds)
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1 / 3, 3.0))


def test_a_ratio_takes_several_seeds_over_one():
    found = bootstrap_ratio(torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([4.0, 4.0]))
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.25, 0.75))


@pytest.mark.parametrize("values", [torch.zeros(0), torch.tensor([1.0, math.nan]), torch.zeros(2, 2, 2)])
def test_what_cannot_be_averaged_is_refused(values):
    with pytest.raises(ValueError, match="finite values"):
        bootstrap_interval(values)


def test_unpaired_frames_wrong_blocks_and_errors_of_zero_are_refused():
    with pytest.raises(ValueError, match="same frames, found 3 and 2"):
        bootstrap_ratio(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="2 block names for 3 frames"):
        bootstrap_interval(torch.ones(3), blocks=["a", "b"])
    with pytest.raises(ValueError, match="positive"):
        bootstrap_ratio(torch.ones(2), torch.tensor([1.0, 0.0]))
