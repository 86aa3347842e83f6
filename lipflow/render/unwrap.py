"""From images to texture space: where each texel lies on the mesh, and what the cameras see of it.

A texel is seen by a camera if its surface faces the camera, and if the four pixels that its colour is mixed from all
show that surface: the rasterised depth there is the texel's own, so that nothing in front of it, nor behind its edge,
bleeds in. Its weight falls with the cosine of the viewing angle, so that an average over cameras prefers frontal views
(Multiface, section 3, unwraps in the same spirit).

Texels that no camera sees are masked: their weight is 0, and their colour is the mean of the others, so that
whoever ignores the mask does not meet a black hole.

Memory does not grow with the number of cameras: a frame's surface is laid out once, each camera's image is read on
its own, and :class:`TextureAverage` keeps one weighted sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lipflow.render import cpu
from lipflow.render.camera import transform_points
from lipflow.types import Topology

DEPTH_TOLERANCE_MM = 1.0
"""How far the surface under the pixels that a texel is mixed from may lie off it, on top of the texel's own slope."""

_DIAGONAL_PX = 2**0.5
"""The farthest that one of these four pixel centres lies from the texel's place."""

GRAZING_COSINE = 0.15
"""Surfaces that turn away further than this cosine are not read: their pixels smear over many texels. It holds for the
smooth normal and for the triangle's own, which tells the folded triangles of a closed mouth from the lips around it."""


@dataclass(frozen=True)
class TexelSurface:
    """Texture space laid out on the mesh of one frame.

    Attributes:
        vertices: ``(V, 3)`` float32 mm, head frame.
        positions: ``(T, T, 3)`` float32 mm of the texels, row 0 is v = 0.
        normals: ``(T, T, 3)`` float32 unit vectors; 0 where the atlas is empty.
    """

    vertices: Tensor
    positions: Tensor
    normals: Tensor


class Unwrapper:
    """Texture space of one topology.

    Args:
        topology: faces and texture coordinates.
        texture_size: T, texels along one side.
    """

    def __init__(self, topology: Topology, texture_size: int):
        self.texture_size = texture_size
        self.faces = torch.from_numpy(topology.faces).long()
        self._faces_cpu = topology.faces.astype("int64")
        triangle_id, weights = _rasterize_charts(topology, texture_size)
        self.triangle_id = torch.from_numpy(triangle_id).long()
        self.barycentric = torch.from_numpy(weights)

    @property
    def covered(self) -> Tensor:
        """``(T, T)`` bool: texels whose centre lies inside a triangle of the texture atlas."""
        return self.triangle_id >= 0

    def texel_positions(self, vertices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the texels lie on a mesh.

        Args:
            vertices: ``(V, 3)`` mm.

        Returns:
            Positions ``(T, T, 3)`` mm and unit normals ``(T, T, 3)`` (smooth, area weighted), both 0 where the
            atlas is empty, and ``covered (T, T)`` bool. Row 0 is v = 0.
        """
        covered = self.covered
        corners = self.faces[self.triangle_id.clamp(min=0)]
        weights = (self.barycentric * covered[..., None]).to(vertices.dtype)
        positions = (weights[..., None] * vertices[corners]).sum(2)
        normals = (weights[..., None] * vertex_normals(vertices, self.faces)[corners]).sum(2)
        return positions, functional.normalize(normals, dim=-1), covered

    def surface(self, vertices: Tensor) -> TexelSurface:
        """Lay the texture out on a mesh ``(V, 3)``, mm; once a frame, for all of its cameras."""
        vertices = vertices.float()
        positions, normals, _ = self.texel_positions(vertices)
        return TexelSurface(vertices, positions, normals)

    def read(
        self,
        surface: TexelSurface,
        image: np.ndarray,
        intrinsics: Tensor,
        cam_from_head: Tensor,
        valid: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read the texture of one frame out of one image.

        Args:
            surface: of that frame.
            image: ``(H, W, C)`` uint8 or float32.
            intrinsics: ``(3, 3)`` K in pixels of the image.
            cam_from_head: ``(3, 4)``.
            valid: ``(H, W)`` bool, False for pixels that show nothing (an undistorted image has such a rim); None
                if all of them do.

        Returns:
            A texture ``(C, T, T)`` float32, and weights ``(T, T)`` float32 in [0, 1]; both 0 where the camera does
            not see a texel.
        """
        height, width, channels = image.shape
        corners = transform_points(surface.vertices[None], cam_from_head[None].float())
        camera_matrix = intrinsics.double().numpy()
        _, depth = cpu.rasterize(corners.double().numpy(), self._faces_cpu, camera_matrix[None], (height, width))
        texture = np.zeros((channels, self.texture_size, self.texture_size), np.float32)
        weight = np.zeros((self.texture_size, self.texture_size), np.float32)
        _read_texels(
            surface.positions.numpy(),
            surface.normals.numpy(),
            self.triangle_id.numpy(),
            self._face_cosines(surface.vertices, cam_from_head),
            np.ascontiguousarray(image),
            np.ones((1, 1), np.bool_) if valid is None else valid,
            depth[0],
            camera_matrix,
            cam_from_head.double().numpy(),
            texture,
            weight,
        )
        return torch.from_numpy(texture), torch.from_numpy(weight)

    def _face_cosines(self, vertices: Tensor, cam_from_head: Tensor) -> np.ndarray:
        """``(F,)`` cosines between the triangles' own normals and the camera's direction; 0 for empty triangles."""
        a, b, c = vertices[self.faces].double().unbind(1)
        centre = -(cam_from_head[:, :3].T @ cam_from_head[:, 3]).double()
        normals = functional.normalize(torch.linalg.cross(b - a, c - a), dim=-1)
        return (normals * functional.normalize(centre - (a + b + c) / 3, dim=-1)).sum(-1).numpy()


class TextureAverage:
    """The weighted mean of textures that come one at a time.

    Args:
        channels: C.
        texture_size: T, texels along one side.
    """

    def __init__(self, channels: int, texture_size: int):
        self._total = torch.zeros(channels, texture_size, texture_size)
        self._weight = torch.zeros(texture_size, texture_size)

    def add(self, texture: Tensor, weight: Tensor) -> None:
        """Add one camera's texture ``(C, T, T)`` with its weights ``(T, T)``."""
        self._total.addcmul_(texture, weight)
        self._weight += weight

    def mean(self) -> tuple[Tensor, Tensor]:
        """The average ``(C, T, T)``, with the mean colour where nothing was seen, and ``seen (T, T)`` bool."""
        seen = self._weight > 0
        return fill_unseen(self._total / self._weight.clamp(min=1e-8), seen), seen


def fill_unseen(texture: Tensor, seen: Tensor) -> Tensor:
    """``texture (C, T, T)`` with the mean colour of the ``seen (T, T)`` texels in all others; 0 if none is seen."""
    if not seen.any():
        return torch.zeros_like(texture)
    return torch.where(seen, texture, texture[:, seen].mean(1)[:, None, None])


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Area-weighted vertex normals.

    Args:
        vertices: ``(..., V, 3)``.
        faces: ``(F, 3)`` int64, counter-clockwise from outside.

    Returns:
        ``(..., V, 3)`` unit vectors, 0 for vertices that no face uses.
    """
    a, b, c = (vertices[..., faces[:, corner], :] for corner in range(3))
    face_normals = torch.linalg.cross(b - a, c - a)
    normals = torch.zeros_like(vertices)
    for corner in range(3):
        normals = normals.index_add(-2, faces[:, corner], face_normals)
    return functional.normalize(normals, dim=-1)


def _rasterize_charts(topology: Topology, texture_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Triangle id ``(T, T)`` (-1: none) and barycentric weights ``(T, T, 3)`` of every texel centre."""
    uv = topology.uvs[topology.uv_faces].astype(np.float64)
    first, second = uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]
    mirrored = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0] > 0
    # A pinhole at distance 1 that looks at the plane z = 1 sees (u, v) at pixel (u T, v T), v pointing down. Charts
    # that would be culled as back faces there are drawn with two corners exchanged.
    order = np.where(mirrored[:, None], [[0, 2, 1]], [[0, 1, 2]])
    corners = np.take_along_axis(uv, order[..., None], axis=1).reshape(-1, 2)
    corners = np.concatenate([corners, np.ones((len(corners), 1))], axis=1) * 1e3
    intrinsics = np.diag([texture_size, texture_size, 1.0])
    faces = np.arange(len(corners)).reshape(-1, 3)
    ids, _ = cpu.rasterize(corners[None], faces, intrinsics[None], (texture_size, texture_size))
    ids = ids[0]
    row, column = np.nonzero(ids >= 0)
    seen = uv[ids[row, column]]
    centre = np.stack([column + 0.5, row + 0.5], axis=-1) / texture_size
    a, b, c = seen[:, 0] - centre, seen[:, 1] - centre, seen[:, 2] - centre
    areas = np.stack([_cross(b, c), _cross(c, a), _cross(a, b)], axis=-1)
    weights = np.zeros((*ids.shape, 3), np.float32)
    weights[row, column] = areas / areas.sum(-1, keepdims=True)
    return ids, weights


def _cross(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _read_texels(
    positions,
    normals,
    triangle_id,
    face_cosine,
    image,
    valid,
    surface_depth,
    intrinsics,
    cam_from_head,
    texture,
    weight,
):
    """Fill ``texture (C, T, T)`` and ``weight (T, T)``, which come in as zeros, with what one camera sees.

    ``valid`` has the image's size, or is ``(1, 1)`` where every pixel counts. Empty texels have no normal, and so
    face no camera.
    """
    height, width, channels = image.shape
    all_valid = valid.size == 1
    rotation, translation = cam_from_head[:, :3], cam_from_head[:, 3]
    centre = np.zeros(3)
    for axis in range(3):
        centre -= rotation[axis] * translation[axis]
    for row in range(positions.shape[0]):
        for column in range(positions.shape[1]):
            face = triangle_id[row, column]
            if face < 0 or not face_cosine[face] > GRAZING_COSINE:
                continue
            point, normal = positions[row, column], normals[row, column]
            dx, dy, dz = centre[0] - point[0], centre[1] - point[1], centre[2] - point[2]
            cosine = (dx * normal[0] + dy * normal[1] + dz * normal[2]) / np.sqrt(dx * dx + dy * dy + dz * dz)
            if not cosine > GRAZING_COSINE:
                continue
            x, y, z = translation[0], translation[1], translation[2]
            for axis in range(3):
                x += rotation[0, axis] * point[axis]
                y += rotation[1, axis] * point[axis]
                z += rotation[2, axis] * point[axis]
            if z <= cpu.NEAR_MM:
                continue
            across = (intrinsics[0, 0] * x + intrinsics[0, 1] * y) / z + intrinsics[0, 2]
            down = intrinsics[1, 1] * y / z + intrinsics[1, 2]
            if not (0.0 <= across <= width and 0.0 <= down <= height):
                continue
            across = min(max(across - 0.5, 0.0), width - 1.0)
            down = min(max(down - 0.5, 0.0), height - 1.0)
            left, top = int(across), int(down)
            right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
            if not all_valid and not (
                valid[top, left] and valid[top, right] and valid[bottom, left] and valid[bottom, right]
            ):
                continue
            # How much the depth may differ between the pixels that are mixed: the surface's own slope across them.
            slope = np.sqrt(max(1.0 - cosine * cosine, 0.0)) / cosine
            allowed = DEPTH_TOLERANCE_MM + _DIAGONAL_PX * slope * z / intrinsics[0, 0]
            if not (
                abs(surface_depth[top, left] - z) <= allowed
                and abs(surface_depth[top, right] - z) <= allowed
                and abs(surface_depth[bottom, left] - z) <= allowed
                and abs(surface_depth[bottom, right] - z) <= allowed
            ):
                continue
            across, down = across - left, down - top
            share = (cosine - GRAZING_COSINE) / (1.0 - GRAZING_COSINE)
            weight[row, column] = min(share * share, 1.0)
            for channel in range(channels):
                upper = image[top, left, channel] * (1.0 - across) + image[top, right, channel] * across
                lower = image[bottom, left, channel] * (1.0 - across) + image[bottom, right, channel] * across
                texture[channel, row, column] = upper * (1.0 - down) + lower * down
