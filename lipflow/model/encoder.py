"""Q(z | x): what a fully observed frame says about its latent code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipflow.config import AvatarConfig
from lipflow.model.blocks import DownTower, NormLinear, leaky
from lipflow.model.gaussian import DiagonalGaussian


class Encoder(nn.Module):
    """Average texture and mesh, both normalised, to a Gaussian over z.

    The texture passes convolutions of stride 2 down to 4 x 4 (eight from 1024, as in the public Multiface code),
    the mesh one hidden layer. The heads are scaled: Q starts close to N(0, I).
    """

    def __init__(self, config: AvatarConfig, num_vertices: int):
        super().__init__()
        hidden = config.hidden_size
        self.mean_scale = config.mean_scale
        self.log_std_scale = config.log_std_scale
        self.tower = DownTower(3, config.texture_size, config.encoder_channels, residual=config.residual)
        self.texture_fc = NormLinear(self.tower.outputs, hidden)
        self.mesh_fc = NormLinear(3 * num_vertices, hidden)
        self.head = NormLinear(2 * hidden, 2 * config.latent_size, last=True)

    def forward(self, vertices: Tensor, texture: Tensor) -> DiagonalGaussian:
        """Encode frames.

        Args:
            vertices: ``(B, V, 3)``, normalised.
            texture: ``(B, 3, T, T)``, normalised.
        """
        texture_feature = leaky(self.texture_fc(self.tower(texture)))
        mesh_feature = leaky(self.mesh_fc(vertices.flatten(1)))
        mean, log_std = self.head(torch.cat([texture_feature, mesh_feature], -1)).float().chunk(2, -1)
        return DiagonalGaussian(mean * self.mean_scale, log_std * self.log_std_scale)
