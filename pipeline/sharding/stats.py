"""Statistics of the training frames: one mean texture and mesh, one scalar deviation each (DESIGN: Normalisation).

Partial sums are float64 and are merged in the order of their shards, whoever computed them and whenever. Sums of
textures are sums of integers and therefore exact; those of vertices depend on the order only, which is fixed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from lipflow.errors import CaptureError
from lipflow.types import Normalization


@dataclass(frozen=True)
class FrameSums:
    """Sums over some frames.

    Attributes:
        key: the place in the order of merging, e.g. the shard's name.
        count: frames.
        texture: ``(3, T, T)`` float64 sum, 0..255 a frame, row 0 is v = 0.
        texture_squares: sum of squares over frames, channels and texels.
        vertices: ``(V, 3)`` float64 sum, mm.
        vertices_squares: sum of squares over frames, vertices and axes.
    """

    key: str
    count: int
    texture: np.ndarray
    texture_squares: float
    vertices: np.ndarray
    vertices_squares: float


def sum_frames(key: str, frames: Iterable[tuple[np.ndarray, np.ndarray]]) -> FrameSums:
    """Sums over frames, each a texture ``(3, T, T)`` uint8 and vertices ``(V, 3)`` mm, in the order given.

    Raises:
        CaptureError: there is no frame.
    """
    total: FrameSums | None = None
    for texture, vertices in frames:
        texture, vertices = texture.astype(np.float64), vertices.astype(np.float64)
        one = FrameSums(key, 1, texture, float(np.square(texture).sum()), vertices, float(np.square(vertices).sum()))
        total = one if total is None else _add(total, one)
    if total is None:
        raise CaptureError(f"{key}: no frame to take statistics of; check the splits")
    return total


def merge(partials: Iterable[FrameSums]) -> FrameSums:
    """All partial sums in one, added in the order of their keys.

    Raises:
        CaptureError: there is none.
    """
    ordered = sorted(partials, key=lambda partial: partial.key)
    if not ordered:
        raise CaptureError("no training frame to take statistics of; check the splits")
    total = ordered[0]
    for partial in ordered[1:]:
        total = _add(total, partial)
    return total


class OrderedSums:
    """Adds partial sums as they come, in any order, to what :func:`merge` gives, in the memory of a few of them.

    Sums of textures are large, and exact in any order: they are added at once. The others wait for those before them.

    Args:
        keys: of all partial sums that will come.
    """

    def __init__(self, keys: Iterable[str]):
        self._keys = sorted(keys)
        self._next = 0
        self._waiting: dict[str, FrameSums | None] = {}
        self._texture: np.ndarray | None = None
        self._total: FrameSums | None = None

    def add(self, key: str, part: FrameSums | None) -> None:
        """The partial sums of one shard; None for a shard without frames."""
        if part is not None:
            self._texture = part.texture if self._texture is None else self._texture + part.texture
            part = replace(part, texture=_NO_TEXTURE)
        self._waiting[key] = part
        while self._next < len(self._keys) and self._keys[self._next] in self._waiting:
            ready = self._waiting.pop(self._keys[self._next])
            self._next += 1
            if ready is not None:
                self._total = ready if self._total is None else _add(self._total, ready)

    def total(self) -> FrameSums | None:
        """All sums in one; None if no shard had a frame.

        Raises:
            ValueError: some have not come.
        """
        if self._next < len(self._keys):
            raise ValueError(f"the sums of {self._keys[self._next]} are missing")
        if self._total is None or self._texture is None:
            return None
        return replace(self._total, texture=self._texture)


_NO_TEXTURE = np.zeros(())


def normalization_from(sums: FrameSums) -> Normalization:
    """Means over frames, and the deviation from those means over frames and elements."""
    texture_mean, vertices_mean = sums.texture / sums.count, sums.vertices / sums.count
    texture_std = _deviation(sums.texture_squares, texture_mean, sums.count)
    vertices_std = _deviation(sums.vertices_squares, vertices_mean, sums.count)
    return Normalization(texture_mean.astype(np.float32), texture_std, vertices_mean.astype(np.float32), vertices_std)


def _add(first: FrameSums, second: FrameSums) -> FrameSums:
    return FrameSums(
        first.key,
        first.count + second.count,
        first.texture + second.texture,
        first.texture_squares + second.texture_squares,
        first.vertices + second.vertices,
        first.vertices_squares + second.vertices_squares,
    )


def _deviation(squares: float, mean: np.ndarray, count: int) -> float:
    """Scalar standard deviation; 1 where nothing varies, so that it can always be divided by."""
    variance = squares / (count * mean.size) - float(np.square(mean).mean())
    # below that, the difference of the two terms is rounding, not variance
    rounding = 1e-12 * squares / (count * mean.size)
    return float(np.sqrt(variance)) if variance > rounding else 1.0
