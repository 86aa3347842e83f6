"""Projection, in the conventions of :mod:`lipflow.types`.

Products of matrices are computed in float64, whatever comes in: autocast and TF32 round those of float32 to 8 or 11
bits, which moves vertices by whole pixels, and leave float64 alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lipflow.render.backend import NEAR_MM
from lipflow.render.lens import distort, valid_radius
from lipflow.types import CameraTensors


def transform_points(points: Tensor, to_from: Tensor) -> Tensor:
    """Apply rigid transforms.

    Args:
        points: ``(..., N, 3)``.
        to_from: ``(..., 3, 4)`` matrices [R | t].

    Returns:
        ``(..., N, 3)``: ``R @ x + t`` for every point; leading dimensions broadcast.
    """
    moved = points.double() @ to_from[..., :3].double().transpose(-1, -2) + to_from[..., None, :, 3].double()
    return moved.to(torch.promote_types(points.dtype, to_from.dtype))


def project(points: Tensor, intrinsics: Tensor, cam_from_points: Tensor) -> tuple[Tensor, Tensor]:
    """Project points to pixels (pixel centres at +0.5).

    Points at or behind the camera plane have no projection: their depth is <= 0 and their pixels are
    meaningless (but finite where depth is not exactly 0); check the depth.

    Args:
        points: ``(..., N, 3)`` mm.
        intrinsics: ``(..., 3, 3)`` K in pixels.
        cam_from_points: ``(..., 3, 4)``.

    Returns:
        Pixels ``(..., N, 2)`` as (x, y), and depths ``(..., N)`` in mm along the optical axis.
    """
    in_camera = transform_points(points, cam_from_points)
    return image_points(in_camera, intrinsics), in_camera[..., 2]


def project_through_lens(points: Tensor, cameras: CameraTensors) -> tuple[Tensor, Tensor]:
    """As :func:`project`, with the cameras' lens distortion.

    Beyond the lens's valid radius (:func:`lipflow.render.lens.valid_radius`) the model turns back; there, pixels go on
    outwards in proportion to the ray, so that an optimisation that strays finds its way back.

    Args:
        points: ``(..., N, 3)`` mm, head frame.
        cameras: leading dimensions ``...``.

    Returns:
        Pixels ``(..., N, 2)`` as (x, y), and depths ``(..., N)`` in mm along the optical axis.
    """
    in_camera = transform_points(points, cameras.cam_from_head)
    depth = in_camera[..., 2]
    if cameras.distortion is None or not cameras.distortion.any():
        return image_points(in_camera, cameras.intrinsics), depth
    rays = in_camera[..., :2] / depth[..., None]
    radius = _valid_radii(cameras.distortion).to(rays)[..., None, None]
    beyond = (torch.linalg.vector_norm(rays, dim=-1, keepdim=True) / radius).clamp(min=1)
    rays = distort(rays / beyond, cameras.distortion) * beyond
    return image_points(torch.cat([rays, torch.ones_like(rays[..., :1])], -1), cameras.intrinsics), depth


def image_points(in_camera: Tensor, intrinsics: Tensor) -> Tensor:
    """Pixels ``(..., N, 2)`` that cameras ``(..., 3, 3)`` see camera-space points ``(..., N, 3)`` at."""
    homogeneous = in_camera.double() @ intrinsics.double().transpose(-1, -2)
    pixels = homogeneous[..., :2] / homogeneous[..., 2:]
    return pixels.to(torch.promote_types(in_camera.dtype, intrinsics.dtype))


def _valid_radii(distortion: Tensor) -> Tensor:
    """``(...)`` float64 valid radii of lenses ``(..., 5)``."""
    lenses = distortion.detach().cpu().double()
    radii = [valid_radius(lens) for lens in lenses.reshape(-1, 5)]
    return torch.tensor(radii, dtype=torch.float64).view(lenses.shape[:-1])


def camera_corners(vertices: Tensor, cameras: CameraTensors) -> Tensor:
    """Vertices in the camera space of every view, with the lens's distortion in them.

    A lens is applied to the vertices: the corners that come back lie where a pinhole camera would have to see them,
    at their own depth z. Edges stay straight in the image, which the edges of a mesh through a lens are not quite: the
    error is that of a chord for its arc, and falls with the square of an edge's length.

    Vertices nearer than the near plane, or farther from the axis than the lens's valid radius
    (:func:`lipflow.render.lens.valid_radius`), have no image in such a camera. They come back as NaN, and no backend
    draws their triangles.

    Args:
        vertices: ``(B, V, 3)`` mm, head frame.
        cameras: ``(B, K)`` cameras.

    Returns:
        ``(B, K, V, 3)`` mm; the mesh of a frame is read by all its views, not copied.
    """
    views = cameras.cam_from_head.shape[1]
    poses = cameras.cam_from_head.flatten(1, 2).double()
    corners = torch.baddbmm(poses[..., 3:], poses[..., :3], vertices.double().transpose(1, 2))
    dtype = torch.promote_types(vertices.dtype, cameras.cam_from_head.dtype)
    corners = corners.unflatten(1, (views, 3)).transpose(2, 3)
    # One copy for both, rounding and order.
    corners = corners.to(dtype, memory_format=torch.contiguous_format).contiguous()
    if cameras.distortion is None or not cameras.distortion.any():
        return corners
    radius = _valid_radii(cameras.distortion).to(corners)[..., None, None]
    depth = corners[..., 2:]
    in_front = depth >= NEAR_MM
    points = torch.where(in_front, corners[..., :2] / torch.where(in_front, depth, 1.0), 0.0)
    imaged = in_front & (torch.linalg.vector_norm(points.detach(), dim=-1, keepdim=True) <= radius)
    points = distort(torch.where(imaged, points, 0.0), cameras.distortion)
    return torch.where(imaged, torch.cat([points * depth, depth], -1), torch.nan)


def compose(to_via: np.ndarray, via_from: np.ndarray) -> np.ndarray:
    """``to_via @ via_from`` for ``(3, 4)`` rigid transforms: apply ``via_from`` first."""
    rotation = to_via[..., :3] @ via_from[..., :3]
    translation = (to_via[..., :3] @ via_from[..., 3:])[..., 0] + to_via[..., 3]
    return np.concatenate([rotation, translation[..., None]], axis=-1)


def cam_from_head_tensor(cam_from_world: np.ndarray, world_from_head: np.ndarray) -> Tensor:
    """``cam_from_world @ world_from_head`` as a float32 tensor ``(..., 3, 4)``, composed in float64."""
    composed = compose(np.asarray(cam_from_world, np.float64), np.asarray(world_from_head, np.float64))
    return torch.from_numpy(composed.astype(np.float32))


def look_at(centre: np.ndarray, target: np.ndarray, up: tuple[float, float, float]) -> np.ndarray:
    """``(3, 4)`` camera pose (OpenCV axes) at ``centre`` looking at ``target`` with ``up`` upwards in the image."""
    forward = (target - centre) / np.linalg.norm(target - centre)
    right = np.cross(forward, up)
    right = right / np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    return np.concatenate([rotation, -(rotation @ centre)[:, None]], axis=1)
