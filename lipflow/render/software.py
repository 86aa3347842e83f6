"""A backend without nvdiffrast: any rasteriser, with this package's own texture look-up and antialiasing.

On the CPU these are fused kernels; on other devices, plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lipflow.render.antialias import antialias, opposite_vertices
from lipflow.render.backend import NEAR_MM, Fragments
from lipflow.render.camera import image_points
from lipflow.render.texture import sample_bilinear, sample_trilinear, sample_weight, sample_weighted


class Rasterizer(Protocol):
    """The first third of a :class:`lipflow.render.backend.Backend`."""

    def rasterize(
        self, corners: Tensor, intrinsics: Tensor, image_size_hw: tuple[int, int], *, derivatives: bool = False
    ) -> Fragments:
        """Rasterise N views; see :class:`lipflow.render.backend.Backend`."""
        ...


@dataclass(kw_only=True)
class SoftwareFragments(Fragments):
    """What N views see at their pixels, with what antialiasing needs to know of it.

    Attributes:
        corners: ``(N, V, 3)`` camera-space vertices, mm.
        intrinsics: ``(N, 3, 3)``.
    """

    corners: Tensor
    intrinsics: Tensor


class SoftwareBackend:
    """Draws one topology; see :class:`lipflow.render.backend.Backend`.

    Args:
        rasterizer: of this topology, for instance :class:`lipflow.render.cpu.CpuBackend`.
        faces: ``(F, 3)`` int64.
    """

    def __init__(self, rasterizer: Rasterizer, faces: Tensor):
        self._rasterizer = rasterizer
        self._faces = faces
        self._opposite: Tensor | None = None

    def rasterize(
        self, corners: Tensor, intrinsics: Tensor, image_size_hw: tuple[int, int], *, derivatives: bool = False
    ) -> SoftwareFragments:
        """Rasterise N views; see :class:`lipflow.render.backend.Backend`."""
        seen = self._rasterizer.rasterize(corners, intrinsics, image_size_hw, derivatives=derivatives)
        return SoftwareFragments(
            seen.triangle_id, seen.uv, seen.depth, seen.uv_da, corners=corners, intrinsics=intrinsics
        )

    def sample(self, texture: Tensor, uv: Tensor, mask: Tensor, uv_da: Tensor | None = None) -> Tensor:
        """Look textures up in their own precision, at least float32; see :class:`lipflow.render.backend.Backend`."""
        texture = texture.to(torch.promote_types(texture.dtype, torch.float32))
        if uv_da is None:
            return sample_bilinear(texture, uv.to(texture.dtype), mask)
        return sample_trilinear(texture, uv.to(texture.dtype), uv_da.to(texture.dtype), mask)

    def sample_weighted(
        self, texture: Tensor, weight_mask: Tensor, uv: Tensor, mask: Tensor, uv_da: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Image and weight; see :class:`lipflow.render.backend.Backend`."""
        if uv_da is not None:
            return self.sample(texture, uv, mask, uv_da), sample_weight(weight_mask, uv, mask)
        texture = texture.to(torch.promote_types(texture.dtype, torch.float32))
        image, weight = sample_weighted(texture, weight_mask, uv.to(texture.dtype), mask)
        return image, weight.to(uv.dtype)

    def antialias(self, image: Tensor, fragments: SoftwareFragments) -> Tensor:
        """Blend pixels across silhouettes; see :class:`lipflow.render.backend.Backend`."""
        if self._opposite is None:
            self._opposite = opposite_vertices(self._faces)
        depth = torch.nan_to_num(fragments.corners.detach()[..., 2], nan=0.0)
        imaged = (depth >= NEAR_MM)[..., None]
        if imaged.all():
            pixels = image_points(fragments.corners, fragments.intrinsics)
        else:
            # What has no image must have finite pixels all the same: 0 times them is no gradient.
            pixels = image_points(torch.where(imaged, fragments.corners, 1.0), fragments.intrinsics)
            pixels = torch.where(imaged, pixels, 0.0)
        ids, depths = fragments.triangle_id, fragments.depth.detach()
        return antialias(image, ids, depths, pixels, depth, self._faces, self._opposite)


__all__ = ["SoftwareBackend", "SoftwareFragments"]
