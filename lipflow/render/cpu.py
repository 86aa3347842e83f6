"""The CPU backend: visibility by scan conversion (:mod:`lipflow.render.visibility`), fused interpolation.

Views run side by side on torch's number of threads; where there are fewer views than threads, so do bands of rows.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from lipflow.memory import empty
from lipflow.render.backend import NEAR_MM, Fragments
from lipflow.render.interpolate import interpolate_cpu
from lipflow.render.parallel import row_bands, run_parallel
from lipflow.render.reference import interpolate
from lipflow.render.visibility import draw_rows, set_up_view


class CpuBackend:
    """Rasterises one topology; see :class:`lipflow.render.backend.Backend`.

    Tensors on other devices are served too, for machines without nvdiffrast: their visibility is found on the CPU,
    the rest is computed on the device in plain torch.

    Args:
        faces: ``(F, 3)`` int64.
        face_uvs: ``(F, 3, 2)``.
    """

    def __init__(self, faces: Tensor, face_uvs: Tensor):
        self.faces = faces
        self.face_uvs = face_uvs
        self._faces = faces.cpu().numpy()

    def rasterize(
        self, corners: Tensor, intrinsics: Tensor, image_size_hw: tuple[int, int], *, derivatives: bool = False
    ) -> Fragments:
        """Rasterise N views; see :class:`lipflow.render.backend.Backend`."""
        views, (height, width) = len(corners), image_size_hw
        triangle_id = empty((views, height, width), torch.int32)
        find_visible(
            corners.detach().cpu().numpy(), self._faces, intrinsics.detach().cpu().numpy(), triangle_id.numpy()
        )
        triangle_id = triangle_id.to(corners.device)
        function = interpolate_cpu if corners.device.type == "cpu" else interpolate
        uv, depth, uv_da = function(
            corners, intrinsics, triangle_id, self.faces, self.face_uvs, derivatives=derivatives
        )
        return Fragments(triangle_id, uv, depth, uv_da)


def find_visible(
    corners: np.ndarray,
    faces: np.ndarray,
    intrinsics: np.ndarray,
    triangle_id: np.ndarray,
    nearness: np.ndarray | None = None,
    near: float = NEAR_MM,
) -> None:
    """Draw N views.

    Args:
        corners: ``(N, V, 3)`` camera-space vertices, mm, float32 or float64.
        faces: ``(F, 3)`` int64, counter-clockwise from outside; back faces are culled.
        intrinsics: ``(N, 3, 3)`` K in pixels of the image.
        triangle_id: output ``(N, H, W)`` int32, -1 where nothing is seen.
        nearness: output ``(N, H, W)`` float64, 1 / depth in 1 / mm, 0 where nothing is seen. If None, each task has
            one of its own while it draws: no view's memory is touched that nobody reads.
        near: smallest depth drawn, mm.
    """
    views, height, width = triangle_id.shape
    corners, faces, intrinsics = map(np.ascontiguousarray, (corners, faces, intrinsics))

    def set_up(view: int):
        return set_up_view(corners[view], faces, intrinsics[view], near, height, width)

    def draw(triangles, view: int, begin: int, stop: int) -> None:
        depths = np.empty((stop - begin, width)) if nearness is None else nearness[view, begin:stop]
        draw_rows(triangles, near, begin, triangle_id[view, begin:stop], depths)

    def draw_view(view: int) -> None:
        draw(set_up(view), view, 0, height)

    bands = row_bands(views, height)
    if len(bands) == views:
        run_parallel(partial(draw_view, view) for view in range(views))
    else:
        triangles = run_parallel(partial(set_up, view) for view in range(views))
        run_parallel(partial(draw, triangles[view], view, begin, stop) for view, begin, stop in bands)


def rasterize(
    corners: np.ndarray, faces: np.ndarray, intrinsics: np.ndarray, image_size_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Triangle ids ``(N, H, W)`` int32 as :func:`find_visible` finds them, and depths ``(N, H, W)`` float64 in mm,
    infinite where nothing is seen.
    """
    shape = (len(corners), *image_size_hw)
    triangle_id, nearness = np.empty(shape, np.int32), np.empty(shape)
    find_visible(corners, faces, intrinsics, triangle_id, nearness)
    with np.errstate(divide="ignore"):
        return triangle_id, np.divide(1.0, nearness, out=nearness)


def rasterize_view(
    corners: np.ndarray,
    faces: np.ndarray,
    intrinsics: np.ndarray,
    triangle_id: np.ndarray,
    nearness: np.ndarray,
    near: float = NEAR_MM,
) -> None:
    """Draw one view into buffers of the caller's: ``triangle_id`` ``(H, W)`` and ``nearness`` as in `draw_rows`.

    Args:
        corners: ``(V, 3)`` camera-space vertices, mm.
        faces: ``(F, 3)`` int64.
        intrinsics: ``(3, 3)`` K.
        triangle_id: output int32.
        nearness: output float64, 1 / depth, 0 where nothing is seen.
        near: smallest depth drawn, mm.
    """
    height, width = triangle_id.shape
    triangles = set_up_view(corners, faces, intrinsics, near, height, width)
    draw_rows(triangles, near, 0, triangle_id, nearness)


__all__ = ["NEAR_MM", "CpuBackend", "find_visible", "rasterize", "rasterize_view"]
