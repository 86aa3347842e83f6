"""Statistics equal those of all frames at once, however the frames were parted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipflow.errors import CaptureError
from pipeline.capture import Capture
from pipeline.loading.shardset import ShardSet
from pipeline.sharding.shards import ShardConfig, plan_shards, reduce_statistics, shard_statistics
from pipeline.sharding.stats import merge, normalization_from, sum_frames


def _frames(count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return [
        (generator.integers(0, 256, (3, 4, 4), np.uint8), generator.normal(50, 5, (7, 3)).astype(np.float32))
        for _ in range(count)
    ]


def test_the_deviation_is_about_the_mean_of_each_element():
    frames = _frames(20, 0)
    textures = np.stack([texture for texture, _ in frames]).astype(np.float64)
    vertices = np.stack([mesh for _, mesh in frames]).astype(np.float64)
    result = normalization_from(sum_frames("all", frames))
    np.testing.assert_allclose(result.texture_mean, textures.mean(0), rtol=1e-6)
    np.testing.assert_allclose(result.vertices_mean, vertices.mean(0), rtol=1e-6)
    assert result.texture_std == pytest.approx(np.sqrt(np.square(textures - textures.mean(0)).mean()), rel=1e-10)
    assert result.vertices_std == pytest.approx(np.sqrt(np.square(vertices - vertices.mean(0)).mean()), rel=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.randoms())
def test_partial_sums_in_any_order_give_bitwise_the_same(count: int, shards: int, shuffler):
    frames = _frames(count, 1)
    parts = [frames[i::shards] for i in range(shards)]
    partials = [sum_frames(f"train-{i:06d}", part) for i, part in enumerate(parts) if part]
    first = normalization_from(merge(partials))
    shuffler.shuffle(partials)
    second = normalization_from(merge(partials))
    np.testing.assert_array_equal(first.texture_mean, second.texture_mean)
    np.testing.assert_array_equal(first.vertices_mean, second.vertices_mean)
    assert (first.texture_std, first.vertices_std) == (second.texture_std, second.vertices_std)


def test_what_never_varies_has_a_deviation_that_can_be_divided_by():
    result = normalization_from(sum_frames("one", _frames(1, 2)))
    assert (result.texture_std, result.vertices_std) == (1.0, 1.0)


def test_no_frame_is_an_error():
    with pytest.raises(CaptureError, match="splits"):
        merge([])


def test_the_set_is_normalised_by_its_training_segments_alone(shards_folder: Path):
    shard_set = ShardSet.open(shards_folder)
    batch = shard_set.frames(shard_set.frame_ids("train"), [])
    vertices = batch.vertices.double().numpy()
    textures = batch.average_texture.double().numpy()
    result = shard_set.normalization
    np.testing.assert_allclose(result.vertices_mean, vertices.mean(0), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(result.texture_mean, textures.mean(0), rtol=1e-6)
    assert result.vertices_std == pytest.approx(np.sqrt(np.square(vertices - vertices.mean(0)).mean()), rel=1e-6)
    assert result.texture_std == pytest.approx(np.sqrt(np.square(textures - textures.mean(0)).mean()), rel=1e-6)


def test_the_captures_own_statistics_are_taken_only_on_request(dome: Capture, shards_folder: Path):
    shard_set = ShardSet.open(shards_folder)
    own = dome.normalization()
    assert own is not None
    config = ShardConfig(frames_per_shard=4, statistics="capture")
    taken = reduce_statistics(plan_shards(dome, config), [])
    np.testing.assert_array_equal(taken.texture_mean, own.texture_mean)
    assert np.abs(own.vertices_mean - shard_set.normalization.vertices_mean).max() > 0
    assert plan_shards(dome, config).fingerprint != shard_set.manifest.fingerprint


def test_a_shard_without_frames_has_no_statistics(shards_folder: Path):
    record = ShardSet.open(shards_folder).manifest.shards[0].model_copy(update={"samples": ()})
    assert shard_statistics(str(shards_folder), record) is None
