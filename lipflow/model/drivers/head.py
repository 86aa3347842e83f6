"""The last layers of every driver: a feature becomes the Gaussian P(y | h)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipflow.config import AvatarConfig
from lipflow.model.blocks import NormLinear, leaky
from lipflow.model.gaussian import DiagonalGaussian

LOG_STD_RANGE = (-6.0, 3.0)
"""Of every driven prior."""


class GaussianHead(nn.Module):
    """Two layers to mean and clamped log standard deviation.

    Args:
        inputs: width of the feature.
        config: its hidden and latent sizes.
    """

    def __init__(self, inputs: int, config: AvatarConfig):
        super().__init__()
        self.fc = NormLinear(inputs, config.driver_hidden_size)
        self.out = NormLinear(config.driver_hidden_size, 2 * config.latent_size, last=True)
        with torch.no_grad():
            self.out.gain.mul_(0.1)  # P starts close to N(0, I)

    def forward(self, feature: Tensor) -> DiagonalGaussian:
        """``(B, inputs)`` to a Gaussian ``(B, D)``."""
        mean, log_std = self.out(leaky(self.fc(feature))).float().chunk(2, -1)
        return DiagonalGaussian(mean, log_std.clamp(*LOG_STD_RANGE))
