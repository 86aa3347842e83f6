"""What the tests of the CUDA backend share: a mesh in three views, and the backend over the stand-in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lipflow.render.camera import look_at
from lipflow.render.cuda import CudaBackend
from tests.lipflow import nvdiffrast_standin

SIGNATURES = ("rasterize", "interpolate", "texture", "antialias", "antialias_construct_topology_hash")


@dataclass
class Views:
    """A mesh as three cameras see it, in float32."""

    corners: Tensor
    intrinsics: Tensor
    faces: Tensor
    face_uvs: Tensor


def bowl(rings: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A bumpy sphere of 90 mm with an open neck: vertices (V, 3), faces, and face_uvs with a seam."""
    polar, azimuth = np.meshgrid(np.linspace(0.02, 2.4, rings), np.arange(columns) / columns * 2 * np.pi, indexing="ij")
    radius = 90 * (1 + 0.1 * np.sin(3 * polar) * np.sin(4 * azimuth))
    ring = np.sin(polar)
    vertices = (radius * np.stack([ring * np.sin(azimuth), np.cos(polar), ring * np.cos(azimuth)])).reshape(3, -1).T
    row, column = (index.ravel() for index in np.mgrid[: rings - 1, :columns])
    a, b = (row * columns + (column + step) % columns for step in (0, 1))
    c, d = b + columns, a + columns
    faces = np.concatenate([np.stack([a, d, c], 1), np.stack([a, c, b], 1)])
    left, right, top, low = column / columns, (column + 1) / columns, row / (rings - 1), (row + 1) / (rings - 1)
    uvs = [np.stack([left, top], 1), np.stack([right, top], 1), np.stack([right, low], 1), np.stack([left, low], 1)]
    face_uvs = np.concatenate([np.stack([uvs[i] for i in order], 1) for order in ((0, 3, 2), (0, 2, 1))])
    return vertices, faces, face_uvs


def views_of(vertices: np.ndarray, faces: np.ndarray, face_uvs: np.ndarray, size_hw: tuple[int, int]) -> Views:
    """From the front, from the side, and from below, into the open neck."""
    centres = np.array([[60.0, 90, 700], [800, -100, 250], [30, -650, 90]])
    middle = vertices.mean(0).astype(np.float64)
    poses = np.stack([look_at(middle + centre, middle, (0, 1, 0)) for centre in centres])
    corners = vertices @ poses[:, :, :3].transpose(0, 2, 1) + poses[:, None, :, 3]
    height, width = size_hw
    intrinsics = np.array([[2.9 * height, 0.4, 0.52 * width], [0, 3.1 * height, 0.47 * height], [0, 0, 1]])
    return Views(
        torch.tensor(corners, dtype=torch.float32),
        torch.tensor(intrinsics, dtype=torch.float32).expand(3, 3, 3).clone(),
        torch.tensor(faces, dtype=torch.int64),
        torch.tensor(face_uvs, dtype=torch.float32),
    )


def backend_of(views: Views, subpixel_bits: int | None = None) -> CudaBackend:
    class Rounding(nvdiffrast_standin.RasterizeCudaContext):
        def __init__(self, device=None):
            super().__init__(device)
            self.subpixel_bits = subpixel_bits

    module = type("Module", (), {name: staticmethod(getattr(nvdiffrast_standin, name)) for name in SIGNATURES})
    module.RasterizeCudaContext = Rounding
    return CudaBackend(views.faces, views.face_uvs, module)
