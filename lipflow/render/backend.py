"""What every rasteriser offers the renderer, and the choice between them.

Conventions that all backends keep. Corners are camera-space positions in mm (x right, y down, z forward); a pixel's
ray goes through its centre, at +0.5; a triangle is drawn where it is seen from its front (counter-clockwise) at a
depth of at least :data:`NEAR_MM`, and triangles that reach behind the camera are drawn exactly where they are in
front. A pixel centre exactly on the edge of two triangles belongs to one of them. Equal depths go to the lower
triangle index. Triangles without area, and those with a corner that is not finite, are not drawn; a camera without
a finite inverse of K sees nothing.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lipflow.errors import ConfigError

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


class Backend(Protocol):
    """A rasteriser of one topology: made from ``faces (F, 3)`` int64 and ``face_uvs (F, 3, 2)``."""

    def rasterize(
        self, corners: Tensor, intrinsics: Tensor, image_size_hw: tuple[int, int], *, derivatives: bool = False
    ) -> Fragments:
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


def make_backend(name: BackendName, device: torch.device, faces: Tensor, face_uvs: Tensor) -> Backend:
    """The backend of that name; ``auto`` takes ``cuda`` for tensors on a GPU if nvdiffrast is there, else ``cpu``.

    Args:
        name: one of ``auto``, ``reference``, ``cpu``, ``cuda``.
        device: where the vertices will be. ``reference`` and ``cpu`` serve any device.
        faces: ``(F, 3)`` int64.
        face_uvs: ``(F, 3, 2)``.

    Raises:
        ConfigError: no such backend, or one that cannot work here; the message says what to install.
    """
    if name == "auto":
        name = "cuda" if device.type == "cuda" and _cuda_works() else "cpu"
    if name == "reference":
        from lipflow.render.reference import ReferenceBackend

        return ReferenceBackend(faces, face_uvs)
    if name == "cpu":
        from lipflow.render.cpu import CpuBackend

        return CpuBackend(faces, face_uvs)
    if name != "cuda":
        raise ConfigError(f"backend {name!r}: expected auto, reference, cpu or cuda")
    from lipflow.render.cuda import CudaBackend

    backend = CudaBackend(faces, face_uvs)
    if device.type != "cuda":
        raise ConfigError(
            f"backend 'cuda' cannot draw tensors on {str(device)!r}: move renderer and tensors to a CUDA device, or "
            "take backend 'cpu'"
        )
    return backend


def _cuda_works() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("nvdiffrast") is not None


__all__ = ["NEAR_MM", "Backend", "BackendName", "Fragments", "make_backend"]
