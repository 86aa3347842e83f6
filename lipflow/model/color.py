"""Colour correction: one gain and one bias for each camera and channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ColorCorrection(nn.Module):
    """``gain * (texture - pivot) + pivot + bias`` of each camera, in 0..255.

    The bias is held in units of the texture std, so that one learning rate suits it and the gain. The first
    training camera is the anchor: its gain 1 and bias 0 are no parameters. A camera that is not trained has none
    either, and passes colours unchanged; its gain and bias are solved for elsewhere (:func:`solve_gain_bias`).

    Args:
        camera_ids: all cameras, in the order of ``camera_index``.
        train_camera_ids: those that get parameters.
        texture_std: of the capture, 0..255.
        pivot: ``(3, T, T)`` colours that a gain leaves as they are; None: black.
    """

    row_of_camera: Tensor
    pivot: Tensor | None

    def __init__(
        self,
        camera_ids: Sequence[str],
        train_camera_ids: Sequence[str],
        texture_std: float,
        pivot: Tensor | None = None,
    ):
        super().__init__()
        self.register_buffer("pivot", pivot, persistent=False)
        trained = [camera_id for camera_id in camera_ids if camera_id in set(train_camera_ids)]
        rows = {camera_id: row for row, camera_id in enumerate(trained)}
        self.register_buffer(
            "row_of_camera", torch.tensor([rows.get(camera_id, 0) for camera_id in camera_ids]), persistent=False
        )
        self.trained_ids = frozenset(trained)
        self.texture_std = float(texture_std)
        self.gain = nn.Parameter(torch.ones(len(trained) - 1, 3))
        self.bias = nn.Parameter(torch.zeros(len(trained) - 1, 3))

    def gain_bias(self, camera_index: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and bias ``(..., 3)`` of cameras ``(...)``; the bias in 0..255."""
        row = self.row_of_camera[camera_index]
        gain = torch.cat([self.gain.new_ones(1, 3), self.gain])[row]
        bias = torch.cat([self.bias.new_zeros(1, 3), self.bias])[row]
        return gain, bias * self.texture_std

    def forward(self, textures: Tensor, camera_index: Tensor) -> Tensor:
        """Textures ``(..., 3, T, T)`` in 0..255 as the cameras ``(...)`` see them."""
        gain, bias = (colour[..., None, None] for colour in self.gain_bias(camera_index))
        if self.pivot is None:
            return textures * gain + bias
        return (textures - self.pivot) * gain + self.pivot + bias


def solve_gain_bias(predicted: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gain and bias that bring ``predicted`` closest to ``target``, by weighted least squares for each channel.

    Where nothing has weight, or the prediction is constant, the gain is 1.

    Args:
        predicted: ``(..., C, H, W)``.
        target: the same shape.
        weight: ``(..., H, W)``, not negative.

    Returns:
        Gain and bias ``(..., C)``, so that ``gain * predicted + bias`` is the best fit.
    """
    if predicted.shape != target.shape or weight.shape != (*predicted.shape[:-3], *predicted.shape[-2:]):
        raise ValueError(
            f"predicted {tuple(predicted.shape)}, target {tuple(target.shape)} and weight {tuple(weight.shape)} "
            "disagree: expected (..., C, H, W) twice and (..., H, W)"
        )
    weight = weight[..., None, :, :].to(predicted.dtype)
    total = weight.sum((-2, -1)).clamp(min=torch.finfo(predicted.dtype).tiny)

    def mean(values: Tensor) -> Tensor:
        return (weight * values).sum((-2, -1)) / total

    mean_predicted, mean_target = mean(predicted), mean(target)
    centred = predicted - mean_predicted[..., None, None]
    variance = mean(centred.square())
    covariance = mean(centred * (target - mean_target[..., None, None]))
    flat = variance <= 1e-10 * mean_predicted.square() + torch.finfo(predicted.dtype).tiny
    gain = torch.where(flat, 1.0, covariance / variance.masked_fill(flat, 1.0))
    return gain, mean_target - gain * mean_predicted
