"""Antialiased pictures of a textured mesh, without gradients: the dome's fast path.

Visibility is the renderer's own (:mod:`lipflow.render.cpu`) on a finer grid; the visible points are then looked up
in the texture and averaged over each pixel in one pass. The result is that of
:class:`lipflow.render.renderer.Renderer` with a box filter over the same grid.
"""

from __future__ import annotations

import numba
import numpy as np

from lipflow.render.camera import compose
from lipflow.render.cpu import NEAR_MM, rasterize_view
from lipflow.types import Camera, Topology


class PictureTaker:
    """Takes pictures of meshes of one topology, one after the other.

    The buffers of the finer grid are the largest thing it needs (12 bytes a sample); they are kept between pictures
    of one size. One taker serves one thread.

    Args:
        topology: faces and atlas.
        supersampling: samples along each axis of a pixel.
    """

    def __init__(self, topology: Topology, supersampling: int):
        self._faces = topology.faces
        self._face_uvs = topology.uvs[topology.uv_faces].astype(np.float64)
        self._supersampling = supersampling
        self._triangle_id, self._nearness = np.empty((0, 0), np.int32), np.empty((0, 0), np.float64)

    def take(
        self, vertices: np.ndarray, texture: np.ndarray, camera: Camera, world_from_head: np.ndarray
    ) -> np.ndarray:
        """One picture.

        Args:
            vertices: ``(V, 3)`` mm, head frame.
            texture: ``(T, T, 3)`` float32, row 0 is v = 0.
            camera: sees it.
            world_from_head: ``(3, 4)``.

        Returns:
            ``(H, W, 4)`` float32: colour times coverage, and coverage in 0..1.
        """
        height, width = camera.image_size_hw
        fine = (height * self._supersampling, width * self._supersampling)
        if self._triangle_id.shape != fine:
            self._triangle_id, self._nearness = np.empty(fine, np.int32), np.empty(fine, np.float64)
        cam_from_head = compose(camera.cam_from_world, world_from_head)
        corners = np.ascontiguousarray(vertices.astype(np.float64) @ cam_from_head[:, :3].T + cam_from_head[:, 3])
        intrinsics = np.diag([self._supersampling, self._supersampling, 1.0]) @ camera.intrinsics
        rasterize_view(corners, self._faces, intrinsics, self._triangle_id, self._nearness, NEAR_MM)
        pixel_to_ray = np.linalg.inv(intrinsics)
        planes = _texel_planes(corners, self._faces, self._face_uvs, pixel_to_ray, texture.shape[0])
        picture = np.empty((height, width, 4), np.float32)
        _look_up(planes, texture, self._triangle_id, self._supersampling, picture)
        return picture


def expose(
    picture: np.ndarray, gain: np.ndarray, bias: np.ndarray, noise_std: float, generator: np.random.Generator
) -> np.ndarray:
    """What a colour camera's sensor makes of a picture.

    Args:
        picture: ``(H, W, 4)`` float32 colour times coverage, and coverage; colours in 0..255.
        gain: ``(3,)`` float32.
        bias: ``(3,)`` float32 grey levels, added where something is seen.
        noise_std: of the sensor noise, grey levels.
        generator: of the noise.

    Returns:
        ``(H, W, 3)`` uint8.
    """
    image = np.empty((*picture.shape[:2], 3), np.uint8)
    noise = generator.standard_normal(image.shape, dtype=np.float32)
    _expose(picture, gain, bias, np.float32(noise_std), noise, image)
    return image


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _expose(picture, gain, bias, noise_std, noise, image):
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            coverage = picture[row, column, 3]
            for channel in range(3):
                level = picture[row, column, channel] * gain[channel] + coverage * bias[channel]
                level += noise_std * noise[row, column, channel] + np.float32(0.5)
                image[row, column, channel] = np.uint8(min(max(level, np.float32(0.0)), np.float32(255.0)))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _cross(p, q):
    return p[1] * q[2] - p[2] * q[1], p[2] * q[0] - p[0] * q[2], p[0] * q[1] - p[1] * q[0]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _texel_planes(corners, faces, face_uvs, pixel_to_ray, texture_size):
    """For every face the matrix ``(3, 3)`` that takes a sample ``(column, row, 1)`` to the texel it shows.

    A ray's perspective-correct weight of a corner is its product with the plane of the other two, so the weighted
    texture coordinates and the sum of the weights are linear in the sample: ``(x, y, 1)`` in texels, times a depth.
    """
    planes = np.empty((faces.shape[0], 3, 3))
    for face in range(faces.shape[0]):
        a, b, c = corners[faces[face, 0]], corners[faces[face, 1]], corners[faces[face, 2]]
        plane_a, plane_b, plane_c, uv = _cross(b, c), _cross(c, a), _cross(a, b), face_uvs[face]
        for row in range(3):
            of_a, of_b, of_c = 1.0, 1.0, 1.0
            if row < 2:
                of_a, of_b, of_c = uv[0, row] * texture_size, uv[1, row] * texture_size, uv[2, row] * texture_size
            x = of_a * plane_a[0] + of_b * plane_b[0] + of_c * plane_c[0]
            y = of_a * plane_a[1] + of_b * plane_b[1] + of_c * plane_c[1]
            z = of_a * plane_a[2] + of_b * plane_b[2] + of_c * plane_c[2]
            for column in range(3):
                of_z = pixel_to_ray[2, column]
                planes[face, row, column] = x * pixel_to_ray[0, column] + y * pixel_to_ray[1, column] + z * of_z
    return planes


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _look_up(planes, texture, triangle_id, supersampling, picture):
    """Average every pixel's samples of ``triangle_id`` into ``picture (H, W, 4)``: colour times coverage, coverage."""
    last = texture.shape[0] - 1
    share = 1.0 / (supersampling * supersampling)
    for row in range(picture.shape[0]):
        for column in range(picture.shape[1]):
            red, green, blue, hits = 0.0, 0.0, 0.0, 0
            for fine_row in range(row * supersampling, (row + 1) * supersampling):
                for fine_column in range(column * supersampling, (column + 1) * supersampling):
                    face = triangle_id[fine_row, fine_column]
                    if face < 0:
                        continue
                    plane = planes[face]
                    i, j = fine_row + 0.5, fine_column + 0.5
                    to_texel = 1.0 / (plane[2, 0] * j + plane[2, 1] * i + plane[2, 2])
                    x = (plane[0, 0] * j + plane[0, 1] * i + plane[0, 2]) * to_texel - 0.5
                    y = (plane[1, 0] * j + plane[1, 1] * i + plane[1, 2]) * to_texel - 0.5
                    x, y = min(max(x, 0.0), float(last)), min(max(y, 0.0), float(last))
                    left, low = int(x), int(y)
                    right, high = min(left + 1, last), min(low + 1, last)
                    across, up = x - left, y - low
                    near, far = (1.0 - across) * (1.0 - up), across * (1.0 - up)
                    over, beyond = (1.0 - across) * up, across * up
                    a, b, c, d = texture[low, left], texture[low, right], texture[high, left], texture[high, right]
                    red += near * a[0] + far * b[0] + over * c[0] + beyond * d[0]
                    green += near * a[1] + far * b[1] + over * c[1] + beyond * d[1]
                    blue += near * a[2] + far * b[2] + over * c[2] + beyond * d[2]
                    hits += 1
            picture[row, column, 0] = red * share
            picture[row, column, 1] = green * share
            picture[row, column, 2] = blue * share
            picture[row, column, 3] = hits * share
