"""Metrics of images, meshes and fits, each for single images or frames: reduce them over frames as you report them.

Images are 0..255, meshes in mm. Intervals are bootstrapped over frames (:mod:`lipflow.bootstrap`), because the pixels
and views of a frame are not independent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lipflow.bootstrap import BootstrapInterval, bootstrap_interval, bootstrap_ratio
from lipflow.model.color import solve_gain_bias
from lipflow.model.gaussian import DiagonalGaussian

__all__ = [
    "BootstrapInterval",
    "bootstrap_interval",
    "bootstrap_ratio",
    "calibration_rms",
    "frame_jitter_mm",
    "geometry_rmse_mm",
    "masked_mse",
    "masked_ssim",
    "masked_ssim_map",
    "psnr",
    "solve_gain_bias",
    "ssim_map",
    "texture_mse",
]

PEAK = 255.0
_SSIM_WINDOW, _SSIM_SIGMA, _SSIM_K1, _SSIM_K2 = 11, 1.5, 0.01, 0.03


def masked_mse(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the masked pixels and all channels, 0..255 squared.

    Args:
        predicted: ``(..., C, H, W)``.
        target: the same shape.
        mask: ``(..., H, W)`` bool, or weights.

    Returns:
        ``(...)``; NaN where the mask is empty.
    """
    _check_images(predicted, target, mask)
    weight = mask.to(torch.float64)
    error = (predicted.double() - target.double()).square().mean(-3)
    return ((error * weight).sum((-2, -1)) / weight.sum((-2, -1))).float()


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of mean squared errors of images in 0..255; infinite for an error of 0."""
    return 10 * torch.log10(PEAK**2 / mse)


def masked_ssim(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004), averaged over the masked pixels and all channels.

    Gaussian window of 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03. Both images are set to 0 outside the mask, so
    that the background has no say; at the border, the window is filled by reflection.

    Args:
        predicted: ``(..., C, H, W)``, 0..255, H and W at least 6.
        target: the same shape.
        mask: ``(..., H, W)`` bool.

    Returns:
        ``(...)``; NaN where the mask is empty.
    """
    mask = mask.bool()
    return (masked_ssim_map(predicted, target, mask) * mask).sum((-2, -1)) / mask.sum((-2, -1))


def masked_ssim_map(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """What :func:`masked_ssim` averages: ``(..., H, W)``, both images 0 outside the mask."""
    _check_images(predicted, target, mask)
    inside = mask.bool()[..., None, :, :]
    return ssim_map(predicted.float() * inside, target.float() * inside).mean(-3)


def ssim_map(predicted: Tensor, target: Tensor) -> Tensor:
    """Structural similarity ``(..., C, H, W)`` of the windows around every pixel of float images of that shape."""
    shape = predicted.shape
    x, y = predicted.reshape(-1, 1, *shape[-2:]), target.reshape(-1, 1, *shape[-2:])
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    c1, c2 = (_SSIM_K1 * PEAK) ** 2, (_SSIM_K2 * PEAK) ** 2
    variances = mean_xx - mean_x**2 + mean_yy - mean_y**2
    covariance = mean_xy - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    return similarity.reshape(shape)


def geometry_rmse_mm(predicted: Tensor, target: Tensor) -> Tensor:
    """Root mean squared distance ``(...)`` in mm between corresponding vertices ``(..., V, 3)``."""
    if predicted.shape != target.shape:
        raise ValueError(f"vertices {tuple(predicted.shape)} and {tuple(target.shape)} have different shapes")
    return (predicted - target).square().sum(-1).mean(-1).sqrt()


def frame_jitter_mm(vertices: Tensor) -> Tensor:
    """How much each but the first and the last of consecutive frames ``(F, V, 3)`` shakes, ``(F - 2,)``.

    The mean length in mm of the vertices' second differences: a still or evenly moving face has none; compare with the
    target's own. At least 3 frames.
    """
    if len(vertices) < 3:
        raise ValueError(f"jitter needs at least 3 consecutive frames, found {len(vertices)}")
    return (vertices[2:] - 2 * vertices[1:-1] + vertices[:-2]).norm(dim=-1).mean(-1)


def texture_mse(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error ``(...)`` of textures ``(..., C, T, T)`` over the texels whose weight is positive.

    Args:
        predicted: 0..255; the error is in their squares.
        target: the same shape.
        mask: ``(T, T)`` loss weights; how large they are has no say.
    """
    return masked_mse(predicted, target, (mask > 0).expand(*predicted.shape[:-3], *mask.shape))


def calibration_rms(y: Tensor, prior: DiagonalGaussian) -> Tensor:
    """RMS ``(...)`` over dimensions of y's residuals in standard deviations; above 1: over-confident."""
    return prior.whiten(y).square().mean(-1).sqrt()


def _blur(planes: Tensor) -> Tensor:
    """Gaussian window by sums of shifted planes: on a CPU five times as fast as a convolution of one channel."""
    half = _SSIM_WINDOW // 2
    offsets = torch.arange(half + 1, dtype=torch.float64)
    bell = torch.exp(-offsets.square() / (2 * _SSIM_SIGMA**2))
    weights: list[float] = (bell / (2 * bell.sum() - bell[0])).tolist()
    blurred = F.pad(planes, (half, half, half, half), mode="reflect")
    for axis in (-2, -1):
        padded, size = blurred, blurred.shape[axis] - 2 * half
        blurred = padded.narrow(axis, half, size) * weights[0]
        for offset in range(1, half + 1):
            for start in (half - offset, half + offset):
                blurred.add_(padded.narrow(axis, start, size), alpha=weights[offset])
    return blurred


def _check_images(predicted: Tensor, target: Tensor, mask: Tensor) -> None:
    expected = (*predicted.shape[:-3], *predicted.shape[-2:])
    if predicted.shape != target.shape or tuple(mask.shape) != expected:
        raise ValueError(
            f"predicted {tuple(predicted.shape)}, target {tuple(target.shape)} and mask {tuple(mask.shape)} "
            "disagree: expected (..., C, H, W) twice and (..., H, W)"
        )
