"""Meshes and cameras that the renderer's tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lipflow.render.camera import look_at
from lipflow.types import CameraTensors, Topology

FACE = Path(__file__).resolve().parents[3] / "shared" / "assets" / "realface"


def make_topology(faces, uvs, weight_mask=None) -> Topology:
    faces = np.asarray(faces, np.int64)
    mask = np.ones((8, 8), np.float32) if weight_mask is None else weight_mask
    return Topology(faces, np.asarray(uvs, np.float32), faces, mask, {}, int(faces.max()) + 1)


def camera_at_origin(height=32, width=40, focal=50.0, dtype=torch.float32) -> CameraTensors:
    intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=dtype)
    pose = torch.eye(4, dtype=dtype)[:3]
    return CameraTensors(intrinsics[None, None], pose[None, None])


QUAD_FACES = [[0, 2, 1], [0, 3, 2]]
QUAD_UVS = [[0, 0], [1, 0], [1, 1], [0, 1]]


def tilted_quad(dtype=torch.float32) -> Tensor:
    """A rectangle that recedes to the right; front faces the camera at the origin."""
    return torch.tensor([[-30, -20, 80], [30, -20, 160], [30, 20, 160], [-30, 20, 80]], dtype=dtype)


def bump(side: int = 9, size_mm: float = 160.0, height_mm: float = 40.0) -> tuple[Topology, Tensor]:
    """A bumpy square that looks along +z, with ``side`` vertices a side: its topology and ``(V, 3)`` float64."""
    across, down = np.meshgrid(np.linspace(-0.5, 0.5, side), np.linspace(-0.5, 0.5, side))
    depth = height_mm * (np.cos(5 * across) * np.cos(4 * down) + 0.3 * np.sin(11 * across + 7 * down))
    vertices = np.stack([size_mm * across, size_mm * down, depth], -1).reshape(-1, 3)
    row, column = (index.ravel() for index in np.mgrid[: side - 1, : side - 1])
    a = row * side + column
    b, c, d = a + 1, a + side + 1, a + side
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    uvs = np.stack([across, down], -1).reshape(-1, 2) * 0.9 + 0.5
    return make_topology(faces, uvs), torch.from_numpy(vertices)


def cameras_around(angles, size_hw: tuple[int, int], distance: float = 600.0) -> CameraTensors:
    """``(1, K)`` float64 cameras in front of the origin, turned by ``angles`` (radians), with some skew."""
    poses = [
        look_at(distance * np.array([np.sin(angle), 0.2 * np.cos(3 * angle), np.cos(angle)]), np.zeros(3), (0, 1, 0))
        for angle in angles
    ]
    height, width = size_hw
    focal = 3.2 * min(height, width)
    matrix = torch.tensor([[focal, 0.4, 0.52 * width], [0, 1.1 * focal, 0.47 * height], [0, 0, 1]]).double()
    return CameraTensors(matrix.expand(1, len(poses), 3, 3).clone(), torch.from_numpy(np.stack(poses))[None])


def in_float32(cameras: CameraTensors) -> CameraTensors:
    return replace(cameras, intrinsics=cameras.intrinsics.float(), cam_from_head=cameras.cam_from_head.float())


def smooth_texture(size: int = 32, channels: int = 3, dtype=torch.float64) -> Tensor:
    """``(1, 1, C, T, T)`` in [0, 1] that varies slowly from texel to texel."""
    v, u = torch.meshgrid(
        torch.linspace(0, 6, size, dtype=dtype), torch.linspace(0, 9, size, dtype=dtype), indexing="ij"
    )
    waves = [torch.sin(u + 0.3 * channel) * torch.cos(v - 0.7 * channel) for channel in range(channels)]
    return torch.stack(waves)[None, None] / 2 + 0.5


def photographed_face(height: int) -> tuple[Topology, Tensor, Tensor, CameraTensors, tuple[int, int]]:
    """The real face as in its photo: topology, vertices, texture in 0..1, camera and an image size of that height."""
    from pipeline.dome.realface import load_realface

    face = load_realface(FACE)
    with (
        np.load(FACE / "base.npz", allow_pickle=False) as base,
        np.load(FACE / "photo_pose.npz", allow_pickle=False) as pose,
    ):
        vertices = torch.from_numpy(base["verts_frame"].astype(np.float32))[None]
        full = tuple(int(side) for side in pose["image_size_hw"])
        size_hw = (height, round(full[1] * height / full[0]))
        matrix = pose["K"].astype(np.float64) + np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        matrix = np.diag([size_hw[1] / full[1], size_hw[0] / full[0], 1.0]) @ matrix
        pose = torch.from_numpy(pose["cam_from_head"].astype(np.float32))
    cameras = CameraTensors(torch.from_numpy(matrix).float()[None, None], pose[None, None])
    texture = torch.from_numpy(face.texture).permute(2, 0, 1).float()[None, None] / 255
    return face.topology, vertices, texture, cameras, size_hw


def fitted_shift_px(silhouette: Callable[[Tensor], Tensor], target_px: Tensor, start_px: Tensor) -> Tensor:
    """Where plain Adam ends on the squared difference of masks, from a start some pixels off; no coarse levels."""
    target = silhouette(target_px)
    shift = start_px.clone().requires_grad_()
    optimiser = torch.optim.Adam([shift], lr=0.4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 80)
    for _ in range(80):
        optimiser.zero_grad()
        (silhouette(shift) - target).square().mean().backward()
        optimiser.step()
        schedule.step()
    return shift.detach()
