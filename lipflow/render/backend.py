"""What every backend offers the renderer.

Conventions that all backends keep. Corners are camera-space positions in mm (x right, y down, z forward); a pixel's
ray goes through its centre, at +0.5; a triangle is drawn where it is seen from its front (counter-clockwise) at a
depth of at least :data:`NEAR_MM`, and triangles that reach behind the camera are drawn exactly where they are in
front. A pixel centre exactly on the edge of two triangles belongs to one of them. Equal depths go to the lower
triangle index. Triangles without area, and those with a corner that is not finite, are not drawn; a camera without
a finite inverse of K sees nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from torch import Tensor

BackendName = Literal["auto", "reference", "cpu", "cuda"]

NEAR_MM = 1.0
"""Depths below this are not drawn."""


@dataclass
class Fragments:
    """What N views see at their pixels.

    Attributes:
        triangle_id: ``(N, H, W)`` int32, -1 where nothing is seen.
        uv: ``(N, H, W, 2)`` texture coordinates, 0 outside.
        depth: ``(N, H, W)`` mm along the optical axis, 0 outside.
        uv_da: ``(N, H, W, 2, 2)``, ``uv_da[..., i, j]`` the change of ``uv[..., i]`` per pixel along x (j = 0) or y
            (j = 1), 0 outside; None unless asked for.
    """

    triangle_id: Tensor
    uv: Tensor
    depth: Tensor
    uv_da: Tensor | None = None


FragmentsT = TypeVar("FragmentsT", bound=Fragments)
"""A backend's own fragments, which may hold what it needs to blend silhouettes later."""


class Backend(Protocol[FragmentsT]):
    """Draws one topology: made from ``faces (F, 3)`` int64 and ``face_uvs (F, 3, 2)``."""

    def rasterize(
        self, corners: Tensor, intrinsics: Tensor, image_size_hw: tuple[int, int], *, derivatives: bool = False
    ) -> FragmentsT:
        """Rasterise N views; uv, depth and uv_da are differentiable in corners, intrinsics and face_uvs.

        Args:
            corners: ``(N, V, 3)`` camera-space vertices, mm, float32 or float64.
            intrinsics: ``(N, 3, 3)`` K in pixels, upper triangular, last row (0, 0, 1).
            image_size_hw: (height, width) in pixels.
            derivatives: also compute ``uv_da``.

        Returns:
            Fragments on the device and in the dtype of ``corners``.
        """
        ...

    def sample(self, texture: Tensor, uv: Tensor, mask: Tensor, uv_da: Tensor | None = None) -> Tensor:
        """Look textures up, clamped at the border: bilinear, or trilinear over mip maps where ``uv_da`` is given.

        Args:
            texture: ``(M, C, T, T)``, row 0 is v = 0; texture m belongs to views m N/M to (m + 1) N/M - 1.
            uv: ``(N, H, W, 2)``.
            mask: ``(N, H, W)`` bool, the pixels to look up.
            uv_da: ``(N, H, W, 2, 2)``, as in :class:`Fragments`.

        Returns:
            ``(N, C, H, W)``, 0 outside the mask; differentiable in all but the mask.
        """
        ...

    def sample_weighted(
        self, texture: Tensor, weight_mask: Tensor, uv: Tensor, mask: Tensor, uv_da: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`sample`, and ``(N, H, W)`` a weight mask ``(S, S)`` looked up bilinearly at the same places.

        The weight has no gradient, and is 0 outside the mask.
        """
        ...

    def antialias(self, image: Tensor, fragments: FragmentsT) -> Tensor:
        """Blend ``image (N, C, H, W)`` across silhouettes (:mod:`lipflow.render.antialias`).

        Args:
            image: of these fragments.
            fragments: of :meth:`rasterize`, whose corners and intrinsics get the gradients of what moves there.
        """
        ...


__all__ = ["NEAR_MM", "Backend", "BackendName", "Fragments", "FragmentsT"]
