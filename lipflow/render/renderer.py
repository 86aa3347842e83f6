"""The differentiable renderer: rasterise once, look the texture up at what is seen.

Visibility, texture look-up and antialiasing are a backend's (:mod:`lipflow.render.backend`); one rasterisation serves
the image, its mask and its loss weight. Gradients reach vertices, cameras, texture and texture coordinates through the
interior of the image, and with ``antialias`` vertices and cameras get those of silhouettes too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lipflow.errors import ConfigError
from lipflow.render.backend import Backend, BackendName, Fragments
from lipflow.render.backend_choice import make_backend
from lipflow.render.camera import camera_corners
from lipflow.render.texture import sample_weight
from lipflow.types import CameraTensors, Topology


@dataclass
class RenderOutput:
    """What B frames with K views each look like.

    Attributes:
        image: ``(B, K, C, H, W)`` the sampled texture, 0 where no triangle is seen; antialiased if that was asked for.
        coverage: ``(B, K, H, W)`` the mask in the image's dtype, antialiased with it and then differentiable in
            vertices and cameras: what silhouettes are compared by.
        mask: ``(B, K, H, W)`` bool, True where a triangle is seen at the pixel's centre.
        weight: ``(B, K, H, W)`` the topology's weight mask seen through the same pixels, 0 outside; no gradient.
        depth: ``(B, K, H, W)`` mm along the optical axis, 0 outside.
        triangle_id: ``(B, K, H, W)`` int32, -1 outside.
        uv: ``(B, K, H, W, 2)`` texture coordinates in [0, 1], 0 outside.
    """

    image: Tensor
    coverage: Tensor
    mask: Tensor
    weight: Tensor
    depth: Tensor
    triangle_id: Tensor
    uv: Tensor


class Renderer:
    """Renders meshes of one topology with a texture for each view.

    Args:
        topology: faces, texture coordinates and the weight mask.
        backend: ``auto`` chooses by the device of the renderer; see :func:`lipflow.render.backend_choice.make_backend`.
        filter: ``bilinear``, or ``trilinear`` over mip maps, for textures finer than the image.
        antialias: of renders that do not say themselves whether they blend silhouettes.

    Attributes:
        antialias: as given.
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
        self.antialias = antialias
        self.faces = torch.from_numpy(topology.faces).long()
        self.face_uvs = torch.from_numpy(topology.uvs[topology.uv_faces]).float()
        self.weight_mask = torch.from_numpy(topology.weight_mask).float()
        self._backend_name = backend
        # 'cuda' is only judged when it is used: renderers are made on the CPU and moved.
        self._backend: Backend[Any] | None = None if backend == "cuda" else self._make_backend()

    def to(self, device: torch.device | str) -> Renderer:
        """This renderer, with its constant tensors moved to ``device`` and, if ``auto``, the backend for it.

        Raises:
            ConfigError: the backend cannot work there; the message says what to install.
        """
        self.faces = self.faces.to(device)
        self.face_uvs = self.face_uvs.to(device)
        self.weight_mask = self.weight_mask.to(device)
        self._backend = self._make_backend()
        return self

    def render(
        self,
        vertices: Tensor,
        texture: Tensor,
        cameras: CameraTensors,
        image_size_hw: tuple[int, int],
        *,
        antialias: bool | None = None,
    ) -> RenderOutput:
        """Render every view of every frame; differentiable in vertices, texture and cameras.

        Autocast does not reach in here: positions in 8 bits would be wrong by pixels.

        What cannot be drawn is left out: triangles without area or with a vertex that is not finite, views whose K has
        no finite inverse and, under lens distortion, triangles with a corner that the lens does not image
        (:func:`lipflow.render.camera.camera_corners`).

        Args:
            vertices: ``(B, V, 3)`` mm, head frame.
            texture: ``(B, K, C, T, T)``, or ``(B, 1, C, T, T)`` shared by the views of a frame; row 0 is v = 0.
            cameras: ``(B, K)`` cameras.
            image_size_hw: (height, width) in pixels, to which K refers.
            antialias: blend pixels across silhouettes, so that vertices and cameras have gradients there. It concerns
                image and coverage; mask, weight and the maps stay those of pixel centres. None: as the renderer does.

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
        with torch.autocast(vertices.device.type, enabled=False):
            fragments, mask = self._seen(vertices, cameras, image_size_hw, derivatives=self._mip_maps)
            image, weight = self._ready().sample_weighted(
                texture.flatten(0, 1), self.weight_mask, fragments.uv, mask, fragments.uv_da
            )
            coverage = mask.to(image.dtype)
            if self.antialias if antialias is None else antialias:
                blended = self._ready().antialias(torch.cat([image, coverage[:, None]], 1), fragments)
                image, coverage = blended[:, :-1], blended[:, -1]

        def unflatten(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (frames, views))

        parts = (image, coverage, mask, weight, fragments.depth, fragments.triangle_id, fragments.uv)
        return RenderOutput(*map(unflatten, parts))

    def render_mask(self, vertices: Tensor, cameras: CameraTensors, image_size_hw: tuple[int, int]) -> Tensor:
        """The ``weight`` of :meth:`render` alone, ``(B, K, H, W)``, for callers that need no image; no gradient."""
        with torch.no_grad(), torch.autocast(vertices.device.type, enabled=False):
            fragments, mask = self._seen(vertices, cameras, image_size_hw)
            weight = sample_weight(self.weight_mask, fragments.uv, mask)
        return weight.unflatten(0, cameras.intrinsics.shape[:2])

    def _seen(
        self, vertices: Tensor, cameras: CameraTensors, image_size_hw: tuple[int, int], *, derivatives: bool = False
    ) -> tuple[Fragments, Tensor]:
        """Fragments of the ``B K`` views, and their mask."""
        if vertices.shape[0] != cameras.intrinsics.shape[0]:
            raise ValueError(
                f"vertices {tuple(vertices.shape)} and cameras {tuple(cameras.intrinsics.shape)} disagree: "
                "expected (B, V, 3) and (B, K, 3, 3)"
            )
        corners, intrinsics = camera_corners(vertices, cameras).flatten(0, 1), cameras.intrinsics.flatten(0, 1)
        fragments = self._ready().rasterize(corners, intrinsics, image_size_hw, derivatives=derivatives)
        return fragments, fragments.triangle_id >= 0

    def _ready(self) -> Backend[Any]:
        if self._backend is None:
            self._backend = self._make_backend()
        return self._backend

    def _make_backend(self) -> Backend[Any]:
        return make_backend(self._backend_name, self.faces.device, self.faces, self.face_uvs)


__all__ = ["RenderOutput", "Renderer"]
