"""Antialiased pictures of a textured mesh, without gradients: the dome's fast path.

Visibility is the renderer's own (:mod:`lipflow.render.cpu`) on a finer grid; the visible points are then looked up
in the texture and averaged over each pixel in one pass. The result is that of
:class:`lipflow.render.renderer.Renderer` with a box filter over the same grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

from lipflow.render.camera import compose
from lipflow.render.cpu import NEAR_MM, rasterize_view
from lipflow.types import Camera, Topology


def take_pictures(
    topology: Topology,
    vertices: np.ndarray,
    textures: np.ndarray,
    cameras: Sequence[Camera],
    world_from_head: np.ndarray,
    supersampling: int,
) -> np.ndarray:
    """Pictures of one frame by cameras with images of one size.

    Args:
        topology: faces and atlas.
        vertices: ``(V, 3)`` mm, head frame.
        textures: ``(K, T, T, 3)`` float32, row 0 is v = 0, one for each camera.
        cameras: K cameras.
        world_from_head: ``(3, 4)``.
        supersampling: samples along each axis of a pixel.

    Returns:
        ``(K, H, W, 4)`` float32: colour times coverage, and coverage in 0..1.
    """
    height, width = cameras[0].image_size_hw
    pictures = np.zeros((len(cameras), height, width, 4), np.float32)
    fine = (height * supersampling, width * supersampling)
    triangle_id, depth = np.empty(fine, np.int32), np.empty(fine, np.float64)
    face_uvs = topology.uvs[topology.uv_faces].astype(np.float64)
    mesh = np.asarray(vertices, np.float64)
    for index, camera in enumerate(cameras):
        cam_from_head = compose(camera.cam_from_world, world_from_head)
        corners = np.ascontiguousarray(mesh @ cam_from_head[:, :3].T + cam_from_head[:, 3])
        intrinsics = np.diag([supersampling, supersampling, 1.0]) @ camera.intrinsics
        rasterize_view(corners, topology.faces, intrinsics, triangle_id, depth, NEAR_MM)
        _look_up(
            corners,
            topology.faces,
            face_uvs,
            intrinsics,
            textures[index],
            triangle_id,
            supersampling,
            pictures[index],
        )
    return pictures


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _look_up(corners, faces, face_uvs, intrinsics, texture, triangle_id, supersampling, picture):
    """Add every visible sample's colour and coverage to its pixel of ``picture (H, W, 4)``."""
    size = texture.shape[0]
    share = 1.0 / (supersampling * supersampling)
    for row in range(triangle_id.shape[0]):
        ray_y = (row + 0.5 - intrinsics[1, 2]) / intrinsics[1, 1]
        for column in range(triangle_id.shape[1]):
            face = triangle_id[row, column]
            if face < 0:
                continue
            ray_x = (column + 0.5 - intrinsics[0, 2] - intrinsics[0, 1] * ray_y) / intrinsics[0, 0]
            a, b, c = corners[faces[face, 0]], corners[faces[face, 1]], corners[faces[face, 2]]
            weight_a = _beside(ray_x, ray_y, b, c)
            weight_b = _beside(ray_x, ray_y, c, a)
            weight_c = _beside(ray_x, ray_y, a, b)
            total = weight_a + weight_b + weight_c
            uv = face_uvs[face]
            x = (weight_a * uv[0, 0] + weight_b * uv[1, 0] + weight_c * uv[2, 0]) / total * size - 0.5
            y = (weight_a * uv[0, 1] + weight_b * uv[1, 1] + weight_c * uv[2, 1]) / total * size - 0.5
            x, y = min(max(x, 0.0), size - 1.0), min(max(y, 0.0), size - 1.0)
            left, low = int(x), int(y)
            right, high = min(left + 1, size - 1), min(low + 1, size - 1)
            across, up = x - left, y - low
            pixel = picture[row // supersampling, column // supersampling]
            for channel in range(3):
                lower = texture[low, left, channel] * (1 - across) + texture[low, right, channel] * across
                upper = texture[high, left, channel] * (1 - across) + texture[high, right, channel] * across
                pixel[channel] += share * (lower * (1 - up) + upper * up)
            pixel[3] += share


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _beside(ray_x, ray_y, first, second):
    """Triple product of the ray ``(x, y, 1)`` and two corners."""
    return (
        ray_x * (first[1] * second[2] - first[2] * second[1])
        + ray_y * (first[2] * second[0] - first[0] * second[2])
        + (first[0] * second[1] - first[1] * second[0])
    )
