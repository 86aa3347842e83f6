"""From images to texture space: where each texel lies on the mesh, and what the cameras see of it.

A texel is seen by a camera if it projects into the image in front of everything else (its depth is compared with
the rasterised depth) and its surface faces the camera; its weight falls with the cosine of the viewing angle, so
that an average over cameras prefers frontal views (Multiface, section 3, unwraps in the same spirit).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lipflow.render import cpu
from lipflow.render.camera import project, transform_points
from lipflow.types import CameraTensors, Topology

DEPTH_TOLERANCE_MM = 3.0
"""How far behind the rasterised surface a texel may lie and still be seen; covers one pixel's slope."""

GRAZING_COSINE = 0.15
"""Surfaces that turn away further than this cosine are not read: their pixels smear over many texels."""


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

    def unwrap(self, vertices: Tensor, images: Tensor, cameras: CameraTensors) -> tuple[Tensor, Tensor]:
        """Read the texture of one frame out of its images.

        Args:
            vertices: ``(V, 3)`` mm.
            images: ``(K, C, H, W)`` float.
            cameras: ``(K, 3, 3)`` and ``(K, 3, 4)``, K in pixels of the images.

        Returns:
            Textures ``(K, C, T, T)``, and weights ``(K, T, T)`` in [0, 1], 0 where a camera does not see a texel.
        """
        height, width = images.shape[-2:]
        positions, normals, covered = self.texel_positions(vertices)
        points = positions.reshape(1, -1, 3).expand(images.shape[0], -1, -1)
        pixels, depth = project(points, cameras.intrinsics, cameras.cam_from_head)
        size = pixels.new_tensor([width, height])
        grid = (pixels / size * 2 - 1).unflatten(1, covered.shape)
        textures = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)

        corners = transform_points(vertices[None], cameras.cam_from_head)
        _, surface = cpu.rasterize(
            corners.double().numpy(), self._faces_cpu, cameras.intrinsics.double().numpy(), (height, width)
        )
        # The farthest of the pixels around a point: on slopes the nearest pixel centre may lie well in front of it.
        surface_depth = functional.max_pool2d(
            torch.from_numpy(np.where(np.isfinite(surface), surface, 0.0))[:, None], 3, stride=1, padding=1
        )
        seen_depth = functional.grid_sample(surface_depth.to(grid.dtype), grid, mode="nearest", align_corners=False)
        in_view = (grid.abs() <= 1).all(-1) & (depth.unflatten(1, covered.shape) > cpu.NEAR_MM)
        in_front = depth.unflatten(1, covered.shape) <= seen_depth[:, 0] + DEPTH_TOLERANCE_MM

        rotation, translation = cameras.cam_from_head[..., :3], cameras.cam_from_head[..., 3]
        centre = -(rotation.transpose(-1, -2) @ translation[..., None])[..., 0]
        to_camera = functional.normalize(centre[:, None, None] - positions, dim=-1)
        cosine = (to_camera * normals).sum(-1)
        weight = ((cosine - GRAZING_COSINE) / (1 - GRAZING_COSINE)).clamp(min=0) ** 2
        weight = weight * (in_view & in_front & covered)
        return textures * (weight > 0)[:, None], weight

    @staticmethod
    def average(textures: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean over cameras.

        Args:
            textures: ``(K, C, T, T)``.
            weights: ``(K, T, T)``.

        Returns:
            The average ``(C, T, T)``, 0 where nothing was seen, and ``seen (T, T)`` bool.
        """
        total = weights.sum(0)
        average = (textures * weights[:, None]).sum(0) / total.clamp(min=1e-8)
        return average, total > 0


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
