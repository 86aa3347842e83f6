"""The differentiable renderer: visibility by rasterisation, everything else by torch's autograd.

Visibility (which triangle a pixel sees) is found once, without gradients. Texture coordinates are then interpolated
from the camera-space corners of the visible triangles (:mod:`lipflow.render.interpolate`), so that gradients reach
vertices, cameras and texture through the interior of the image. Silhouettes carry no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lipflow.render import cpu
from lipflow.render.camera import transform_points
from lipflow.render.interpolate import interpolate_cpu, interpolate_torch
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
    """

    def __init__(self, topology: Topology):
        self.faces = torch.from_numpy(topology.faces).long()
        self.face_uvs = torch.from_numpy(topology.uvs[topology.uv_faces]).float()
        self.weight_mask = torch.from_numpy(topology.weight_mask).float()
        self._faces_cpu = topology.faces.astype("int64")

    def to(self, device: torch.device | str) -> Renderer:
        """This renderer, with its constant tensors moved to ``device``."""
        self.faces = self.faces.to(device)
        self.face_uvs = self.face_uvs.to(device)
        self.weight_mask = self.weight_mask.to(device)
        return self

    def render(
        self, vertices: Tensor, texture: Tensor, cameras: CameraTensors, image_size_hw: tuple[int, int]
    ) -> RenderOutput:
        """Render every view of every frame; differentiable in vertices, texture and cameras.

        Args:
            vertices: ``(B, V, 3)`` mm, head frame.
            texture: ``(B, K, C, T, T)``, or ``(B, 1, C, T, T)`` shared by the views of a frame; row 0 is v = 0.
            cameras: ``(B, K, 3, 3)`` and ``(B, K, 3, 4)``.
            image_size_hw: (height, width) in pixels, to which K refers.

        Raises:
            ValueError: the leading dimensions of the arguments disagree.
        """
        frames, views = cameras.intrinsics.shape[:2]
        if vertices.shape[0] != frames or texture.shape[0] != frames or texture.shape[1] not in (1, views):
            raise ValueError(
                f"vertices {tuple(vertices.shape)}, texture {tuple(texture.shape)} and cameras "
                f"{tuple(cameras.intrinsics.shape)} disagree: expected (B, V, 3), (B, K|1, C, T, T), (B, K, 3, 3)"
            )
        corners = transform_points(vertices[:, None], cameras.cam_from_head).flatten(0, 1)
        intrinsics = cameras.intrinsics.flatten(0, 1)
        triangle_id = self._visibility(corners, intrinsics, image_size_hw)
        mask = triangle_id >= 0
        interpolate = interpolate_cpu if corners.device.type == "cpu" else interpolate_torch
        uv, depth = interpolate(corners, intrinsics, triangle_id, self.faces, self.face_uvs)

        texture = texture.expand(-1, views, -1, -1, -1).flatten(0, 1)
        image = sample_texture(texture, uv) * mask[:, None]
        weight_mask = self.weight_mask.to(image.dtype).expand(frames * views, 1, -1, -1)
        weight = sample_texture(weight_mask, uv.detach())[:, 0] * mask

        def unflatten(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (frames, views))

        return RenderOutput(*map(unflatten, (image, mask, weight, depth, triangle_id, uv)))

    def _visibility(self, corners: Tensor, intrinsics: Tensor, image_size_hw: tuple[int, int]) -> Tensor:
        ids, _ = cpu.rasterize(
            corners.detach().cpu().double().numpy(),
            self._faces_cpu,
            intrinsics.detach().cpu().double().numpy(),
            image_size_hw,
        )
        return torch.from_numpy(ids).to(corners.device)


def sample_texture(texture: Tensor, uv: Tensor) -> Tensor:
    """Bilinear texture look-up, clamped at the border.

    Args:
        texture: ``(N, C, T, T)``, row 0 is v = 0.
        uv: ``(N, H, W, 2)`` in [0, 1].

    Returns:
        ``(N, C, H, W)``.
    """
    return functional.grid_sample(
        texture, uv.to(texture.dtype) * 2 - 1, mode="bilinear", padding_mode="border", align_corners=False
    )
