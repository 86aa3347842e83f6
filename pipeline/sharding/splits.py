"""Which segments and cameras are for training, validation and test.

Choices by fraction are made by hashing names with the seed, so that they are the same everywhere, and adding a
segment to a capture moves no other segment's hash.

The split files that come with Multiface are accepted as they are published: a camera split is a JSON object with the
lists ``train`` and ``test``, or several such objects by name; a test-segment file lists prefixes of segment names.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

from pydantic import Field

from lipflow.config import StrictConfig
from lipflow.errors import ConfigError
from lipflow.types import Camera
from pipeline import storage
from pipeline.sharding.segment_names import SEPARATOR

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class HasSegments(Protocol):
    """A capture, or several."""

    @property
    def segments(self) -> Mapping[str, tuple[str, ...]]:
        """Segment to its frames."""


class HasCameras(Protocol):
    """A capture, or several."""

    @property
    def cameras(self) -> tuple[Camera, ...]:
        """In calibration order."""

    @property
    def frontal_camera_id(self) -> str | None:
        """The camera that drives."""


class SplitConfig(StrictConfig):
    """How the segments and cameras of a capture, or of several, are divided.

    With several captures a segment is ``SEGMENT@CAPTURE``. A pattern with an ``@`` is compared with all of it, one
    without with the segment alone, in every capture; and by fraction a segment is drawn in all captures at once, so
    that no expression is held out in one and trained in another.

    Attributes:
        test_segments: shell patterns of the held-out segments; empty: a fraction is drawn.
        test_segments_file: path or URI of ``{"segment": [PREFIX, ...]}``; adds ``PREFIX*`` to ``test_segments``.
        val_segments: shell patterns of the validation segments, among those that are not held out.
        test_fraction: fraction of segments, at least one unless 0, that is held out where no pattern says.
        val_fraction: the same for validation, of the segments that remain.
        train_cameras: shell patterns of training cameras; empty: all that are not held out. With patterns, cameras
            that are in neither list are left out.
        test_cameras: shell patterns of held-out cameras; empty: a number is drawn.
        test_camera_count: held-out cameras, evenly spread over the list; None: one in ten.
        camera_split_file: path or URI of ``{"train": [...], "test": [...]}``, which sets both camera lists.
        camera_split_name: the split to take of a file that holds several by name.
        novel_views: whether held-out cameras are to be evaluated as novel views, so that a test camera that is also
            a training camera is an error. False: such a camera is for training alone.
        seed: of the drawing by fraction.
    """

    test_segments: tuple[str, ...] = ()
    test_segments_file: str | None = None
    val_segments: tuple[str, ...] = ()
    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    train_cameras: tuple[str, ...] = ()
    test_cameras: tuple[str, ...] = ()
    test_camera_count: int | None = Field(default=None, ge=0)
    camera_split_file: str | None = None
    camera_split_name: str | None = None
    novel_views: bool = True
    seed: int = 0


def with_split_files(config: SplitConfig) -> SplitConfig:
    """The same splits with the lists of the files in place of the files.

    Raises:
        ConfigError: a file that is no split, or one that is given beside the lists that it sets.
    """
    changes: dict[str, Any] = {"test_segments_file": None, "camera_split_file": None, "camera_split_name": None}
    if config.test_segments_file is not None:
        source = config.test_segments_file
        prefixes = _names_of(_json_object(source), "segment", source)
        changes["test_segments"] = (*config.test_segments, *(f"{prefix}*" for prefix in prefixes))
    if config.camera_split_file is not None:
        if config.train_cameras or config.test_cameras:
            raise ConfigError("splits.camera_split_file sets the camera lists: give it or them, not both")
        source, split = config.camera_split_file, _json_object(config.camera_split_file)
        named = [name for name, value in split.items() if isinstance(value, dict)]
        if named:
            name = config.camera_split_name or (named[0] if len(named) == 1 else None)
            if name not in named:
                raise ConfigError(f"{source}: set splits.camera_split_name to one of {', '.join(named)}")
            split = split[name]
        changes["train_cameras"] = _names_of(split, "train", source)
        changes["test_cameras"] = _names_of(split, "test", source)
    elif config.camera_split_name is not None:
        raise ConfigError("splits.camera_split_name chooses within splits.camera_split_file, which is not given")
    return config.model_copy(update=changes)


def hash_order(names: Iterable[str], seed: int, purpose: str) -> list[str]:
    """``names`` in a seeded pseudo-random order that depends on each name alone."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}\n{purpose}\n{name}".encode()).digest())


def split_segments(
    capture: HasSegments, config: SplitConfig, segment_of: Callable[[str], str] = str
) -> dict[str, list[str]]:
    """Segments of ``"train"``, ``"val"`` and ``"test"``, disjoint, each sorted; together they are the capture.

    Args:
        capture: one, or several.
        config: how they are divided.
        segment_of: from the name of a segment to that which it has in its own capture.

    Raises:
        ConfigError: a pattern that fits nothing, a segment claimed twice, or nothing left for training.
    """
    segments = sorted(capture.segments)
    test = _chosen(segments, config.test_segments, config.test_fraction, config.seed, "test", segment_of)
    val_by_pattern = _matching(segments, config.val_segments, "val_segments", segment_of)
    both = sorted(set(test) & set(val_by_pattern))
    if both:
        raise ConfigError(f"segment {both[0]!r} is in test and in validation; correct splits.val_segments")
    rest = [segment for segment in segments if segment not in test]
    val = val_by_pattern or _chosen(rest, (), config.val_fraction, config.seed, "val", segment_of)
    train = [segment for segment in rest if segment not in val]
    if not train:
        raise ConfigError(
            f"no segment is left for training ({len(test)} test, {len(val)} validation of {len(segments)});"
            " lower splits.test_fraction or splits.val_fraction, or name segments"
        )
    return {"train": train, "val": sorted(val), "test": sorted(test)}


def split_cameras(capture: HasCameras, config: SplitConfig) -> tuple[list[str], list[str]]:
    """Training and held-out camera ids, in calibration order. Neither the first nor the frontal one is ever drawn.

    Cameras in neither list are left out, which only happens where ``train_cameras`` are given.

    Raises:
        ConfigError: a pattern that fits nothing, a camera in both lists, a frontal camera that is not among the
            training cameras, or too few cameras.
    """
    ids = [camera.camera_id for camera in capture.cameras]
    test = _matching(ids, config.test_cameras, "test_cameras")
    listed = _matching(ids, config.train_cameras, "train_cameras") or [camera for camera in ids if camera not in test]
    both = [camera for camera in test if camera in listed]
    if both and config.novel_views:
        raise ConfigError(
            f"{len(both)} of {len(test)} test cameras are training cameras, too: {', '.join(both)}; "
            "their images are no novel views. Take them out of one list, or set splits.novel_views=false to train on "
            "them and hold out the others alone"
        )
    test = [camera for camera in test if camera not in both]
    kept = [camera for camera in ids if camera in listed or camera in test]
    frontal = capture.frontal_camera_id
    if frontal is not None and (frontal in test or frontal not in kept):
        raise ConfigError(
            f"camera {frontal!r} is the frontal camera, which drives: it has to be among the training cameras"
        )
    if not config.test_cameras:
        candidates = [camera for camera in kept[1:] if camera != frontal]
        count = len(kept) // 10 if config.test_camera_count is None else config.test_camera_count
        if count > len(candidates):
            raise ConfigError(f"splits.test_camera_count={count}, but only {len(candidates)} cameras can be held out")
        test = [candidates[(2 * index + 1) * len(candidates) // (2 * count)] for index in range(count)]
    train = [camera for camera in kept if camera not in test]
    if not train:
        raise ConfigError(f"all {len(test)} cameras are test cameras; leave at least one for training")
    return train, test


def _chosen(
    names: Sequence[str],
    patterns: Sequence[str],
    fraction: float,
    seed: int,
    purpose: str,
    segment_of: Callable[[str], str],
) -> list[str]:
    if patterns:
        return _matching(names, patterns, f"{purpose}_segments", segment_of)
    segments = {segment_of(name) for name in names}
    count = max(1, math.floor(fraction * len(segments) + 0.5)) if fraction > 0 else 0
    drawn = set(hash_order(segments, seed, purpose)[:count])
    return [name for name in names if segment_of(name) in drawn]


def _json_object(uri: str) -> dict[str, Any]:
    try:
        found = json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise ConfigError(f"{uri}: not a JSON file ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{uri}: expected a JSON object, found a {type(found).__name__}")
    return found


def _names_of(split: dict[str, Any], key: str, source: str) -> tuple[str, ...]:
    names = split.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{source}: expected a list of names under {key!r}, found {', '.join(map(str, split))}")
    return tuple(names)


def _matching(
    names: Sequence[str], patterns: Sequence[str], field: str, short_of: Callable[[str], str] = str
) -> list[str]:
    def fits(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or (SEPARATOR not in pattern and fnmatchcase(short_of(name), pattern))

    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            raise ConfigError(f"splits.{field}: {pattern!r} fits none of {', '.join(names[:8])}...; correct it")
    return [name for name in names if any(fits(name, pattern) for pattern in patterns)]


def spread(names: Sequence[str], count: int | None) -> list[str]:
    """At most ``count`` of the names, at even distances and in their order; None: all."""
    if count is None or len(names) <= count:
        return list(names)
    if count <= 1:
        return [names[len(names) // 2]] * count
    return [names[round(index * (len(names) - 1) / (count - 1))] for index in range(count)]
