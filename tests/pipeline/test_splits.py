"""Splits are disjoint, complete, seeded by name or read from published files, and never hold out the frontal camera."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipflow.errors import ConfigError
from pipeline.sharding.splits import SplitConfig, split_cameras, split_segments, with_split_files


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
    with pytest.raises(ConfigError, match="'400005' is the frontal camera"):
        split_cameras(_capture(), SplitConfig(test_cameras=("400005",)))
    without_frontal = SimpleNamespace(**vars(_capture()) | {"frontal_camera_id": None})
    with pytest.raises(ConfigError, match="all 12 cameras are test cameras; leave at least one for training"):
        split_cameras(without_frontal, SplitConfig(test_cameras=("*",)))


PUBLISHED = {"full": {"train": ["400000", "400001", "400005"], "test": ["400003", "400001"], "visual": ["400003"]}}


def _written(folder: Path, name: str, content: object) -> str:
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def test_published_camera_split_whose_lists_overlap_is_refused_with_the_overlap_named(tmp_path: Path):
    config = with_split_files(SplitConfig(camera_split_file=_written(tmp_path, "split.json", PUBLISHED)))
    with pytest.raises(ConfigError, match=r"1 of 2 test cameras are training cameras, too: 400001;"):
        split_cameras(_capture(), config)
    train, test = split_cameras(_capture(), config.model_copy(update={"novel_views": False}))
    assert train == ["400000", "400001", "400005"]
    assert test == ["400003"]


def test_published_split_without_overlap_leaves_unlisted_cameras_out(tmp_path: Path):
    flat = {"train": ["400005", "400000"], "test": ["400003"]}
    config = with_split_files(SplitConfig(camera_split_file=_written(tmp_path, "split.json", flat)))
    assert split_cameras(_capture(), config) == (["400000", "400005"], ["400003"])
    assert config.camera_split_file is None


def test_published_segment_prefixes_choose_test_segments(tmp_path: Path):
    source = _written(tmp_path, "test_segment.json", {"segment": ["SEG_0", "SEG_11"]})
    parts = split_segments(_capture(segments=13), with_split_files(SplitConfig(test_segments_file=source)))
    assert parts["test"] == [*(f"SEG_{index:02d}" for index in range(10)), "SEG_11"]


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ({"a": {"train": [], "test": []}, "b": {}}, {}, "camera_split_name to one of a, b"),
        ({"a": {"train": []}}, {}, "expected a list of names under 'test', found train"),
        ({"train": "400001", "test": []}, {}, "expected a list of names under 'train'"),
        ([1], {}, "expected a JSON object, found a list"),
        (PUBLISHED, {"test_cameras": ("4*",)}, "give it or them, not both"),
    ],
)
def test_files_that_are_no_splits_are_refused(tmp_path: Path, content: object, changes: dict, message: str):
    config = SplitConfig(camera_split_file=_written(tmp_path, "split.json", content), **changes)
    with pytest.raises(ConfigError, match=message):
        with_split_files(config)


def test_split_name_without_a_file_is_refused():
    with pytest.raises(ConfigError, match="camera_split_file, which is not given"):
        with_split_files(SplitConfig(camera_split_name="full"))
