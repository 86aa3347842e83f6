"""Splits are disjoint, complete, seeded by name, and never hold out the anchor or the frontal camera."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipflow.errors import ConfigError
from pipeline.splits import SplitConfig, split_cameras, split_segments


def _capture(segments: int = 10, cameras: int = 12, frontal: int = 5) -> SimpleNamespace:
    return SimpleNamespace(
        segments={f"SEG_{index:02d}": ("000000",) for index in range(segments)},
        cameras=tuple(SimpleNamespace(camera_id=f"{400000 + index}") for index in range(cameras)),
        frontal_camera_id=f"{400000 + frontal}",
    )


@given(st.integers(3, 40), st.floats(0, 0.4), st.floats(0, 0.4), st.integers(0, 1000))
def test_segments_are_parted_without_overlap_or_loss(count: int, test: float, val: float, seed: int):
    capture = _capture(segments=count)
    parts = split_segments(capture, SplitConfig(test_fraction=test, val_fraction=val, seed=seed))
    together = parts["train"] + parts["val"] + parts["test"]
    assert sorted(together) == sorted(capture.segments)
    assert parts["train"]
    assert bool(parts["test"]) == (test > 0)
    assert bool(parts["val"]) == (val > 0)
    assert parts == split_segments(capture, SplitConfig(test_fraction=test, val_fraction=val, seed=seed))


def test_patterns_choose_segments():
    config = SplitConfig(test_segments=("SEG_0[12]",), val_segments=("SEG_09",))
    parts = split_segments(_capture(), config)
    assert parts["test"] == ["SEG_01", "SEG_02"]
    assert parts["val"] == ["SEG_09"]
    assert len(parts["train"]) == 7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SplitConfig(test_segments=("NONE*",)), "NONE"),
        (SplitConfig(test_segments=("SEG_01",), val_segments=("SEG_01",)), "in test and in validation"),
        (SplitConfig(test_segments=("SEG_*",)), "left for training"),
    ],
)
def test_impossible_segment_splits_are_refused(config: SplitConfig, message: str):
    with pytest.raises(ConfigError, match=message):
        split_segments(_capture(), config)


@given(st.integers(3, 200), st.integers(0, 50), st.integers(0, 199))
def test_drawn_cameras_are_spread_and_spare_anchor_and_frontal(cameras: int, count: int, frontal: int):
    capture = _capture(cameras=cameras, frontal=frontal % cameras)
    candidates = cameras - len({"400000", capture.frontal_camera_id})
    config = SplitConfig(test_camera_count=count)
    if count > candidates:
        with pytest.raises(ConfigError, match="test_camera_count"):
            split_cameras(capture, config)
        return
    train, test = split_cameras(capture, config)
    assert len(test) == len(set(test)) == count
    assert sorted(train + test) == [camera.camera_id for camera in capture.cameras]
    assert {"400000", capture.frontal_camera_id} <= set(train)


def test_cameras_can_be_named():
    train, test = split_cameras(_capture(), SplitConfig(test_cameras=("40000[34]",)))
    assert test == ["400003", "400004"]
    assert len(train) == 10
    with pytest.raises(ConfigError, match="anchor or the frontal"):
        split_cameras(_capture(), SplitConfig(test_cameras=("400005",)))
