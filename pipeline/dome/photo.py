"""The photo check: a real tracked head, rendered with a real calibration, against the real photo.

A wrong convention anywhere between the mesh file and the renderer's pixels (axes, texture orientation, pixel
centres) moves the rendering by tens of pixels; done right, it is hard to tell from the photo.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from lipflow.errors import CaptureError
from lipflow.metrics import masked_mse, masked_ssim, psnr, solve_gain_bias
from lipflow.render.renderer import Renderer
from lipflow.types import CameraTensors
from pipeline.dome.realface import load_realface

PHOTO, POSE = "photo.png", "photo_pose.npz"
_PIXEL_CENTRE = 0.5


@dataclass(frozen=True)
class PhotoCheck:
    """How well the rendered head matches the photo.

    Attributes:
        psnr_db: over the pixels that the mesh covers, after one gain and bias for each channel.
        ssim: over the same pixels.
        photo: ``(H, W, 3)`` uint8.
        rendering: ``(H, W, 3)`` uint8, black outside the head.
        mask: ``(H, W)`` bool.
    """

    psnr_db: float
    ssim: float
    photo: np.ndarray
    rendering: np.ndarray
    mask: np.ndarray


def has_photo(folder: str | Path) -> bool:
    """Whether a face asset comes with a photo and its head pose."""
    return Path(folder, PHOTO).is_file() and Path(folder, POSE).is_file()


def check_photo(
    folder: str | Path, *, reduced: int = 1, filter: Literal["bilinear", "trilinear"] = "bilinear"
) -> PhotoCheck:
    """Render the tracked frame of a real face asset into its photo's camera.

    Args:
        folder: of the asset.
        reduced: by which whole number photo and rendering are smaller than the photo's file.
        filter: of the renderer.

    Raises:
        CaptureError: the asset has no photo, or photo and pose disagree in size.
    """
    folder = Path(folder)
    if not has_photo(folder):
        raise CaptureError(f"{folder}: no {PHOTO} with {POSE} beside it")
    face = load_realface(folder)
    with np.load(folder / "base.npz", allow_pickle=False) as base:
        vertices = torch.from_numpy(base["verts_frame"].astype(np.float32))[None]
    with np.load(folder / POSE, allow_pickle=False) as pose:
        intrinsics = pose["K"].astype(np.float64)
        cam_from_head = torch.from_numpy(pose["cam_from_head"].astype(np.float32))
        height, width = (int(side) for side in pose["image_size_hw"])
    # The pose's K, like the KRT file, counts pixel centres as integers.
    intrinsics[:2, 2] += _PIXEL_CENTRE
    with Image.open(folder / PHOTO) as image:
        photo = np.array(image.convert("RGB"))
    if photo.shape[:2] != (height, width):
        raise CaptureError(f"{folder / PHOTO}: {photo.shape[:2]} pixels, the pose is for {(height, width)}")
    target = avg_pool2d(torch.from_numpy(photo).permute(2, 0, 1).float(), reduced)
    intrinsics = np.diag([1 / reduced, 1 / reduced, 1.0]) @ intrinsics
    cameras = CameraTensors(torch.from_numpy(intrinsics).float()[None, None], cam_from_head[None, None])
    texture = torch.from_numpy(face.texture).permute(2, 0, 1).float()[None, None]
    size_hw = (target.shape[1], target.shape[2])
    out = Renderer(face.topology, filter=filter).render(vertices, texture, cameras, size_hw)
    raw, mask = out.image[0, 0], out.mask[0, 0]
    gain, bias = solve_gain_bias(raw.double(), target.double(), mask.double())
    rendering = (raw * gain[:, None, None] + bias[:, None, None]).clamp(0, 255).float() * mask
    return PhotoCheck(
        psnr_db=psnr(masked_mse(rendering, target, mask)).item(),
        ssim=masked_ssim(rendering, target, mask).item(),
        photo=target.round().byte().permute(1, 2, 0).numpy(),
        rendering=rendering.round().byte().permute(1, 2, 0).numpy(),
        mask=mask.numpy(),
    )
