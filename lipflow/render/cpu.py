"""Visibility on the CPU: which triangle is seen at each pixel centre (numba, homogeneous rasterisation).

Edge functions are evaluated along camera rays in three dimensions (Olano and Greer, "Triangle Scan Conversion
using 2D Homogeneous Coordinates", 1997). With camera-space corners ``v0, v1, v2`` and the ray ``d = (x, y, 1)``
through a pixel centre, ``e_i = d . (v_j x v_k)`` has the sign of the ray's side of edge i, the perspective-correct
barycentric weight of corner i is ``e_i / (e_0 + e_1 + e_2)``, and the depth is ``det / (e_0 + e_1 + e_2)``. No
clipping against the near plane is needed: a triangle that reaches behind the camera is drawn exactly where it is
in front.

An edge shared by two triangles gives bitwise opposite edge functions, and a ray exactly on an edge belongs to one
side by the sign of the edge's plane, so there are neither cracks nor double hits.
"""

from __future__ import annotations

import numba
import numpy as np

NEAR_MM = 1.0
"""Depths below this are not drawn."""


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _edge_plane(a, b):
    return (
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    )


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _owns_boundary(plane):
    # A shared edge has opposite planes in its two triangles: exactly one of them passes.
    if plane[0] != 0.0:
        return plane[0] > 0.0
    if plane[1] != 0.0:
        return plane[1] > 0.0
    return plane[2] > 0.0


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _pixel_span(low, high, count):
    # Pixel indices whose centres (index + 0.5) lie in [low, high], clipped to the image.
    first = max(0, int(np.ceil(max(low, -1.0) - 0.5)))
    last = min(count - 1, int(np.floor(min(high, count + 1.0) - 0.5)))
    return first, last


@numba.njit(nogil=True, cache=True, error_model="numpy")
def rasterize_view(corners, faces, intrinsics, triangle_id, depth, near):
    """Draw one view; ``triangle_id`` ``(H, W)`` int32 and ``depth`` ``(H, W)`` float64 are filled in place.

    Args:
        corners: ``(V, 3)`` float64 camera-space vertices, mm.
        faces: ``(F, 3)`` int64, counter-clockwise from outside; back faces are culled.
        intrinsics: ``(3, 3)`` float64 K, upper triangular with last row (0, 0, 1).
        triangle_id: output; -1 where nothing is seen. Equal depths go to the lower triangle index.
        depth: output; infinity where nothing is seen.
        near: smallest depth drawn, mm.
    """
    height, width = triangle_id.shape
    triangle_id[:] = -1
    depth[:] = np.inf
    fx, skew, cx = intrinsics[0, 0], intrinsics[0, 1], intrinsics[0, 2]
    fy, cy = intrinsics[1, 1], intrinsics[1, 2]
    for face in range(faces.shape[0]):
        a, b, c = corners[faces[face, 0]], corners[faces[face, 1]], corners[faces[face, 2]]
        if a[2] < near and b[2] < near and c[2] < near:
            continue
        plane_a, plane_b, plane_c = _edge_plane(c, b), _edge_plane(a, c), _edge_plane(b, a)
        volume = a[0] * plane_a[0] + a[1] * plane_a[1] + a[2] * plane_a[2]
        if not volume > 0.0:  # seen from behind, edge-on, or not finite
            continue
        x_first, x_last, y_first, y_last = 0, width - 1, 0, height - 1
        if a[2] >= near and b[2] >= near and c[2] >= near:
            ay, by, cy_px = fy * a[1] / a[2] + cy, fy * b[1] / b[2] + cy, fy * c[1] / c[2] + cy
            ax = (fx * a[0] + skew * a[1]) / a[2] + cx
            bx = (fx * b[0] + skew * b[1]) / b[2] + cx
            cx_px = (fx * c[0] + skew * c[1]) / c[2] + cx
            # One thousandth of a pixel of slack: rounding of the box must not decide what is covered.
            x_first, x_last = _pixel_span(min(ax, bx, cx_px) - 1e-3, max(ax, bx, cx_px) + 1e-3, width)
            y_first, y_last = _pixel_span(min(ay, by, cy_px) - 1e-3, max(ay, by, cy_px) + 1e-3, height)
        own_a, own_b, own_c = _owns_boundary(plane_a), _owns_boundary(plane_b), _owns_boundary(plane_c)
        for row in range(y_first, y_last + 1):
            ray_y = (row + 0.5 - cy) / fy
            for column in range(x_first, x_last + 1):
                ray_x = (column + 0.5 - cx - skew * ray_y) / fx
                edge_a = ray_x * plane_a[0] + ray_y * plane_a[1] + plane_a[2]
                if edge_a < 0.0 or (edge_a == 0.0 and not own_a):
                    continue
                edge_b = ray_x * plane_b[0] + ray_y * plane_b[1] + plane_b[2]
                if edge_b < 0.0 or (edge_b == 0.0 and not own_b):
                    continue
                edge_c = ray_x * plane_c[0] + ray_y * plane_c[1] + plane_c[2]
                if edge_c < 0.0 or (edge_c == 0.0 and not own_c):
                    continue
                total = edge_a + edge_b + edge_c
                if total <= 0.0:
                    continue
                z = volume / total
                if z >= near and z < depth[row, column]:
                    depth[row, column] = z
                    triangle_id[row, column] = face


def rasterize(
    corners: np.ndarray, faces: np.ndarray, intrinsics: np.ndarray, image_size_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw N views.

    Args:
        corners: ``(N, V, 3)`` camera-space vertices, mm.
        faces: ``(F, 3)`` int64.
        intrinsics: ``(N, 3, 3)`` K in pixels of ``image_size_hw``.
        image_size_hw: (height, width) in pixels.

    Returns:
        Triangle ids ``(N, H, W)`` int32, -1 outside, and depths ``(N, H, W)`` float64, infinite outside.
    """
    count = corners.shape[0]
    triangle_id = np.empty((count, *image_size_hw), np.int32)
    depth = np.empty((count, *image_size_hw), np.float64)
    corners = np.ascontiguousarray(corners, np.float64)
    intrinsics = np.ascontiguousarray(intrinsics, np.float64)
    for view in range(count):
        rasterize_view(corners[view], faces, intrinsics[view], triangle_id[view], depth[view], NEAR_MM)
    return triangle_id, depth
