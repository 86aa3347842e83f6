"""Which segments and cameras are for training, validation and test.

Choices by fraction are made by hashing names with the seed, so that they are the same everywhere, and adding a
segment to a capture moves no other segment's hash.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from lipflow.config import StrictConfig
from lipflow.errors import ConfigError
from pipeline.capture import Capture

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class SplitConfig(StrictConfig):
    """How a capture's segments and cameras are divided.

    Attributes:
        test_segments: shell patterns of the held-out segments; empty: a fraction is drawn.
        val_segments: shell patterns of the validation segments, among those that are not held out.
        test_fraction: fraction of segments, at least one unless 0, that is held out where no pattern says.
        val_fraction: the same for validation, of the segments that remain.
        test_cameras: shell patterns of held-out cameras; empty: a number is drawn.
        test_camera_count: held-out cameras, evenly spread over the list; None: one in ten.
        seed: of the drawing by fraction.
    """

    test_segments: tuple[str, ...] = ()
    val_segments: tuple[str, ...] = ()
    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    test_cameras: tuple[str, ...] = ()
    test_camera_count: int | None = Field(default=None, ge=0)
    seed: int = 0


def hash_order(names: Iterable[str], seed: int, purpose: str) -> list[str]:
    """``names`` in a seeded pseudo-random order that depends on each name alone."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}\n{purpose}\n{name}".encode()).digest())


def split_segments(capture: Capture, config: SplitConfig) -> dict[str, list[str]]:
    """Segments of ``"train"``, ``"val"`` and ``"test"``, disjoint, each sorted; together they are the capture.

    Raises:
        ConfigError: a pattern that fits nothing, a segment claimed twice, or nothing left for training.
    """
    segments = sorted(capture.segments)
    test = _chosen(segments, config.test_segments, config.test_fraction, config.seed, "test")
    val_by_pattern = _matching(segments, config.val_segments, "val_segments")
    both = sorted(set(test) & set(val_by_pattern))
    if both:
        raise ConfigError(f"segment {both[0]!r} is in test and in validation; correct splits.val_segments")
    rest = [segment for segment in segments if segment not in test]
    val = val_by_pattern or _chosen(rest, (), config.val_fraction, config.seed, "val")
    train = [segment for segment in rest if segment not in val]
    if not train:
        raise ConfigError(
            f"no segment is left for training ({len(test)} test, {len(val)} validation of {len(segments)});"
            " lower splits.test_fraction or splits.val_fraction, or name segments"
        )
    return {"train": train, "val": sorted(val), "test": sorted(test)}


def split_cameras(capture: Capture, config: SplitConfig) -> tuple[list[str], list[str]]:
    """Training and held-out camera ids, in calibration order. Drawn ones are never the anchor or the frontal one.

    Raises:
        ConfigError: a pattern that fits nothing, the anchor or frontal camera held out, or too few cameras.
    """
    ids = [camera.camera_id for camera in capture.cameras]
    protected = {ids[0], capture.frontal_camera_id}
    if config.test_cameras:
        test = _matching(ids, config.test_cameras, "test_cameras")
        clash = [camera for camera in test if camera in protected]
        if clash:
            raise ConfigError(f"camera {clash[0]!r} is the anchor or the frontal camera; take it out of test_cameras")
    else:
        candidates = [camera for camera in ids if camera not in protected]
        count = len(ids) // 10 if config.test_camera_count is None else config.test_camera_count
        if count > len(candidates):
            raise ConfigError(f"splits.test_camera_count={count}, but only {len(candidates)} cameras can be held out")
        test = [candidates[(2 * index + 1) * len(candidates) // (2 * count)] for index in range(count)]
    return [camera for camera in ids if camera not in test], test


def _chosen(names: Sequence[str], patterns: Sequence[str], fraction: float, seed: int, purpose: str) -> list[str]:
    if patterns:
        return _matching(names, patterns, f"{purpose}_segments")
    count = max(1, math.floor(fraction * len(names) + 0.5)) if fraction > 0 else 0
    return hash_order(names, seed, purpose)[:count]


def _matching(names: Sequence[str], patterns: Sequence[str], field: str) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"splits.{field}: {pattern!r} fits none of {', '.join(names[:8])}...; correct it")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def spread(names: Sequence[str], count: int | None) -> list[str]:
    """At most ``count`` of the names, at even distances and in their order; None: all."""
    if count is None or len(names) <= count:
        return list(names)
    if count <= 1:
        return [names[len(names) // 2]] * count
    return [names[round(index * (len(names) - 1) / (count - 1))] for index in range(count)]
