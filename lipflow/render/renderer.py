"""The differentiable renderer: rasterise once, look the texture up at what is seen.

Visibility, texture coordinates and depth come from a backend (:mod:`lipflow.render.backend`), in one rasterisation
for the image, its mask and its loss weight. Gradients reach vertices, cameras, texture and texture coordinates through
the interior of the image, and with ``antialias`` vertices and cameras get those of silhouettes too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lipflow.errors import ConfigError
from lipflow.render.antialias import antialias, opposite_vertices
from lipflow.render.backend import NEAR_MM, Backend, BackendName, Fragments, make_backend
from lipflow.render.camera import camera_corners
from lipflow.render.cuda import CudaBackend, CudaFragments
from lipflow.render.texture import sample_bilinear, sample_trilinear, sample_weighted
from lipflow.types import CameraTensors, Topology


@dataclass
class RenderOutput:
    """What B frames with K views each look like.

    Attributes:
        image: ``(B, K, C, H, W)`` the sampled texture, 0 where no triangle is seen.
        mask: ``(B, K, H, W)`` bool, True where a triangle is seen.
        weight: ``(B, K, H, W)`` the topology's weight mask seen through the same pixels, 0 outside; no gradient.
        depth: ``(B, K, H, W)`` mm along the optical axis, 0 outside.
        triangle_id: ``(B, K, H, W)`` int32, -1 outside.
        uv: ``(B, K, H, W, 2)`` texture coordinates in [0, 1], 0 outside.
    """

    image: Tensor
    mask: Tensor
    weight: Tensor
    depth: Tensor
    triangle_id: Tensor
    uv: Tensor


class Renderer:
    """Renders meshes of one topology with a texture for each view.

    Args:
        topology: faces, texture coordinates and the weight mask.
        backend: ``auto`` chooses by the device of the renderer; see :func:`lipflow.render.backend.make_backend`.
        filter: ``bilinear``, or ``trilinear`` over mip maps, for textures finer than the image.
        antialias: blend pixels across silhouettes, so that vertices and cameras have gradients there. It concerns the
            image alone: mask, weight and the maps stay those of pixel centres.

    Attributes:
        faces: ``(F, 3)`` int64.
        face_uvs: ``(F, 3, 2)`` float32; images are differentiable in them.
        weight_mask: ``(T, T)`` float32.

    Raises:
        ConfigError: the backend cannot work here, with what to install; or there is no such filter.
    """

    def __init__(
        self,
        topology: Topology,
        backend: BackendName = "auto",
        *,
        filter: Literal["bilinear", "trilinear"] = "bilinear",
        antialias: bool = False,
    ):
        if filter not in ("bilinear", "trilinear"):
            raise ConfigError(f"filter {filter!r}: expected bilinear or trilinear")
        self._mip_maps = filter == "trilinear"
        self.faces = torch.from_numpy(topology.faces).long()
        self.face_uvs = torch.from_numpy(topology.uvs[topology.uv_faces]).float()
        self.weight_mask = torch.from_numpy(topology.weight_mask).float()
        self._opposite = opposite_vertices(self.faces) if antialias else None
        self._backend_name = backend
        # 'cuda' is only judged when it is used: renderers are made on the CPU and moved.
        self._backend: Backend | None = None if backend == "cuda" else self._make_backend()

    def to(self, device: torch.device | str) -> Renderer:
        """This renderer, with its constant tensors moved to ``device`` and, if ``auto``, the backend for it.

        Raises:
            ConfigError: the backend cannot work there; the message says what to install.
        """
        self.faces = self.faces.to(device)
        self.face_uvs = self.face_uvs.to(device)
        self.weight_mask = self.weight_mask.to(device)
        self._opposite = None if self._opposite is None else self._opposite.to(device)
        self._backend = self._make_backend()
        return self

    def render(
        self, vertices: Tensor, texture: Tensor, cameras: CameraTensors, image_size_hw: tuple[int, int]
    ) -> RenderOutput:
        """Render every view of every frame; differentiable in vertices, texture and cameras.

        What cannot be drawn is left out: triangles without area or with a vertex that is not finite, views whose K has
        no finite inverse and, under lens distortion, triangles with a corner that the lens does not image
        (:func:`lipflow.render.camera.camera_corners`).

        Args:
            vertices: ``(B, V, 3)`` mm, head frame.
            texture: ``(B, K, C, T, T)``, or ``(B, 1, C, T, T)`` shared by the views of a frame; row 0 is v = 0.
            cameras: ``(B, K)`` cameras.
            image_size_hw: (height, width) in pixels, to which K refers.

        Raises:
            ConfigError: the chosen backend cannot work on the renderer's device.
            ValueError: the leading dimensions of the arguments disagree.
        """
        frames, views = cameras.intrinsics.shape[:2]
        if texture.shape[0] != frames or texture.shape[1] not in (1, views):
            raise ValueError(
                f"texture {tuple(texture.shape)} and cameras {tuple(cameras.intrinsics.shape)} disagree: "
                "expected (B, K|1, C, T, T) and (B, K, 3, 3)"
            )
        backend, corners = self._ready(), self._corners(vertices, cameras)
        intrinsics = cameras.intrinsics.flatten(0, 1)
        fragments = backend.rasterize(corners, intrinsics, image_size_hw, derivatives=self._mip_maps)
        mask = fragments.triangle_id >= 0
        image, weight = self._look_up(texture.flatten(0, 1), fragments, mask)
        if self._opposite is not None:
            if isinstance(backend, CudaBackend) and isinstance(fragments, CudaFragments):
                image = backend.antialias(image, fragments)
            else:
                pixels, depth = _projected(corners, intrinsics)
                image = antialias(
                    image, fragments.triangle_id, fragments.depth, pixels, depth, self.faces, self._opposite
                )

        def unflatten(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (frames, views))

        parts = (image, mask, weight, fragments.depth, fragments.triangle_id, fragments.uv)
        return RenderOutput(*map(unflatten, parts))

    def render_mask(self, vertices: Tensor, cameras: CameraTensors, image_size_hw: tuple[int, int]) -> Tensor:
        """The ``weight`` of :meth:`render` alone, ``(B, K, H, W)``, for callers that need no image; no gradient."""
        with torch.no_grad():
            corners, intrinsics = self._corners(vertices, cameras), cameras.intrinsics.flatten(0, 1)
            fragments = self._ready().rasterize(corners, intrinsics, image_size_hw)
            weight = self._weight(fragments, fragments.triangle_id >= 0)
        return weight.unflatten(0, cameras.intrinsics.shape[:2])

    def _corners(self, vertices: Tensor, cameras: CameraTensors) -> Tensor:
        if vertices.shape[0] != cameras.intrinsics.shape[0]:
            raise ValueError(
                f"vertices {tuple(vertices.shape)} and cameras {tuple(cameras.intrinsics.shape)} disagree: "
                "expected (B, V, 3) and (B, K, 3, 3)"
            )
        return camera_corners(vertices, cameras).flatten(0, 1)

    def _ready(self) -> Backend:
        if self._backend is None:
            self._backend = self._make_backend()
        return self._backend

    def _look_up(self, texture: Tensor, fragments: Fragments, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, C, H, W)`` from ``(M, C, T, T)``, of which each serves N / M views in turn, and the weight
        ``(N, H, W)``; 0 outside of the mask.
        """
        uv, uv_da = fragments.uv, fragments.uv_da
        if isinstance(self._backend, CudaBackend):
            return self._backend.sample(texture, uv, uv_da) * mask[:, None], self._weight(fragments, mask)
        uv = uv.to(texture.dtype)
        if uv_da is None:
            image, weight = sample_weighted(texture, self.weight_mask, uv, mask)
            return image, weight.to(fragments.uv.dtype)
        return sample_trilinear(texture, uv, uv_da.to(texture.dtype), mask), self._weight(fragments, mask)

    def _weight(self, fragments: Fragments, mask: Tensor) -> Tensor:
        uv = fragments.uv.detach()
        return sample_bilinear(self.weight_mask[None, None].to(uv.dtype), uv, mask)[:, 0]

    def _make_backend(self) -> Backend:
        return make_backend(self._backend_name, self.faces.device, self.faces, self.face_uvs)


def _projected(corners: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels ``(N, V, 2)`` and depths ``(N, V)`` of corners; 0 where there is no image."""
    depth = torch.nan_to_num(corners.detach()[..., 2], nan=0.0)
    imaged = (depth >= NEAR_MM)[..., None]
    homogeneous = torch.where(imaged, corners, 1.0) @ intrinsics.transpose(-1, -2)
    return torch.where(imaged, homogeneous[..., :2] / homogeneous[..., 2:], 0.0), depth


__all__ = ["RenderOutput", "Renderer"]
