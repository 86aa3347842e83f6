"""What drivers of images share: their views, and the statistics by which the images are normalised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipflow.types import CameraTensors, colour_planes

_IMAGE_CENTRE, _IMAGE_SPREAD = 127.5, 64.0
"""How images (0..255) are normalised until their statistics are measured."""


@dataclass
class SeenViews:
    """Images of C known cameras in B frames.

    Attributes:
        images: ``(B, C, channels, h, w)`` uint8.
        present: ``(B, C)`` bool.
        cameras: ``(B, C, 3, 3)`` and ``(B, C, 3, 4)``.
    """

    images: Tensor
    present: Tensor
    cameras: CameraTensors


class ImageNormalizer(nn.Module):
    """Brings images of C fixed cameras to the driver's size, zero mean and unit spread.

    What changes from frame to frame is a small part of such an image: without its mean, which is the same in all of
    them, a driver learns in a fraction of the steps. The statistics are buffers, saved with the weights.

    Args:
        cameras: C.
        channels: of each image.
        size: side to which images are resized.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, cameras: int, channels: int, size: int):
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.full((cameras, channels, size, size), _IMAGE_CENTRE))
        self.register_buffer("spread", torch.tensor(_IMAGE_SPREAD))

    def measure(self, images: Tensor, present: Tensor) -> None:
        """Take the statistics of the present images: a mean image for each camera, one spread for all.

        Args:
            images: ``(B, C, channels, h, w)`` uint8.
            present: ``(B, C)`` bool.
        """
        images = _resized(images, self.size)
        present = present[..., None, None, None].to(images.dtype)
        count = present.sum(0)
        mean = (images * present).sum(0) / count.clamp(min=1)
        self.mean.copy_(torch.where(count > 0, mean, _IMAGE_CENTRE))
        squares = ((images - self.mean) * present).square().sum() / (present.sum() * self.mean[0].numel()).clamp(min=1)
        self.spread.copy_(squares.sqrt().clamp(min=1.0))

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, channels, h, w)`` uint8 to ``(B, C, channels, size, size)``."""
        return (_resized(images, self.size) - self.mean) / self.spread


def _resized(images: Tensor, size: int) -> Tensor:
    """``(B, C, channels, h, w)`` to float ``(B, C, channels, size, size)``, 0..255."""
    if images.shape[-2:] == (size, size):
        return colour_planes(images)
    flat = F.interpolate(
        colour_planes(images).flatten(0, 1), size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return flat.unflatten(0, images.shape[:2])
