"""Driving signals that show known latent codes."""

from __future__ import annotations

import torch

from lipflow.fitting import GREY_OF_RGB
from lipflow.render.camera import project
from lipflow.types import DrivingSignals, map_tensors


def observe(avatar, renderer, driving: DrivingSignals, truth: torch.Tensor | None = None) -> torch.Tensor:
    """Replace the signals by what they show of latent codes ``(B, D)``, random ones if none are given; returns them."""
    if truth is None:
        shape = len(driving.keypoints), avatar.config.latent_size
        truth = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    frontal = map_tensors(driving.frontal_cameras, lambda tensor: tensor[:, None])
    with torch.no_grad():
        seen = avatar.decode(truth, driving.hmc_cameras.view_vectors())
        grey = (seen.textures * torch.tensor(GREY_OF_RGB)[:, None, None]).sum(2, keepdim=True)
        size = tuple(driving.hmc_images.shape[-2:])
        driving.hmc_images = as_image(renderer.render(seen.vertices, grey, driving.hmc_cameras, size).image)
        seen = avatar.decode(truth, frontal.view_vectors())
        size = tuple(driving.frontal_images.shape[-2:])
        driving.frontal_images = as_image(renderer.render(seen.vertices, seen.textures, frontal, size).image)[:, 0]
        landmarks = seen.vertices[:, avatar.context.landmark_vertices]
        cameras = driving.frontal_cameras
        driving.keypoints[..., :2] = project(landmarks, cameras.intrinsics, cameras.cam_from_head)[0]
    return truth


def as_image(image: torch.Tensor) -> torch.Tensor:
    return image.round().clamp(0, 255).to(torch.uint8)
