"""D(z, v): mesh and view-dependent texture from a latent code, in normalised space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipflow.config import AvatarConfig
from lipflow.model.blocks import COARSE, NormLinear, UpTower, halvings, leaky, level_widths
from lipflow.model.warp import build_warp


class Decoder(nn.Module):
    """The mesh depends on z alone; the texture on z and the encoded view vector."""

    def __init__(self, config: AvatarConfig, num_vertices: int):
        super().__init__()
        widths = level_widths(config.decoder_channels, halvings(config.texture_size))
        self.latent_fc = NormLinear(config.latent_size, config.hidden_size)
        self.view_fc = NormLinear(3, config.view_size)
        self.mesh_fc = NormLinear(config.hidden_size, 3 * num_vertices, last=True)
        self.texture_fc = NormLinear(config.hidden_size + config.view_size, widths[0] * COARSE * COARSE)
        self.tower = UpTower(
            widths,
            3,
            config.texture_size,
            upsample=config.upsample,
            spatial_bias=config.spatial_bias,
            residual=config.residual,
        )
        self.warp = build_warp(config) if config.warp_field else None

    def forward(self, z: Tensor, view_vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Decode frames, each for its own K views.

        Args:
            z: ``(B, D)``.
            view_vectors: ``(B, K, 3)``, unit length.

        Returns:
            Normalised vertices ``(B, V, 3)`` and textures ``(B, K, 3, T, T)``.
        """
        frames, views = view_vectors.shape[:2]
        code = leaky(self.latent_fc(z))
        vertices = self._mesh(code)
        view_code = leaky(self.view_fc(view_vectors))
        joined = torch.cat([code[:, None].expand(-1, views, -1), view_code], -1)
        coarse = leaky(self.texture_fc(joined)).view(frames * views, -1, COARSE, COARSE)
        textures = self.tower(coarse).unflatten(0, (frames, views))
        if self.warp is not None:
            textures = self.warp(textures, z, code)
        return vertices, textures

    def vertices(self, z: Tensor) -> Tensor:
        """The mesh alone: ``z (B, D)`` to normalised vertices ``(B, V, 3)``."""
        return self._mesh(leaky(self.latent_fc(z)))

    def _mesh(self, code: Tensor) -> Tensor:
        return self.mesh_fc(code).unflatten(-1, (-1, 3))
