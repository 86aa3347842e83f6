"""D(z, v): mesh and view-dependent texture from a latent code, in normalised space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipflow.config import AvatarConfig
from lipflow.model.blocks import COARSE, NormConv, NormLinear, UpTower, halvings, leaky, level_widths

MIN_STRETCH = 0.1
"""A warped cell keeps at least this part of its undeformed width."""


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
        self.warp = WarpField(config) if config.warp_field else None

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
            textures = _sample_views(textures, self.warp(code))
        return vertices, textures

    def vertices(self, z: Tensor) -> Tensor:
        """The mesh alone: ``z (B, D)`` to normalised vertices ``(B, V, 3)``."""
        return self._mesh(leaky(self.latent_fc(z)))

    def _mesh(self, code: Tensor) -> Tensor:
        return self.mesh_fc(code).unflatten(-1, (-1, 3))


class WarpField(nn.Module):
    """A deformation of the texture square that never folds a row or a column.

    Deformable Autoencoders (Shu et al., 2018) decode positive increments and integrate them along x and y. Here the
    increments of a row (or column) are a softmax with a floor, so that they sum to one: the borders stay where they
    are, and equal logits give the identity.
    """

    def __init__(self, config: AvatarConfig):
        super().__init__()
        self.size = config.texture_size
        channels = config.warp_channels
        self.fc = NormLinear(config.hidden_size, channels[0] * COARSE * COARSE)
        self.tower = UpTower(
            channels[:-1],
            channels[-1],
            COARSE * 2 ** (len(channels) - 1),
            upsample=config.upsample,
            spatial_bias=config.spatial_bias,
            residual=config.residual,
        )
        self.head = NormConv(channels[-1], 2, 3, last=True)
        with torch.no_grad():
            self.head.gain.mul_(0.1)  # near the identity, and still a path for gradients

    def forward(self, code: Tensor) -> Tensor:
        """``(B, hidden)`` to sampling positions ``(B, T, T, 2)``, x and y in [-1, 1] (texel edges at +-1)."""
        coarse = leaky(self.fc(code)).view(len(code), -1, COARSE, COARSE)
        logits = self.head(leaky(self.tower(coarse))).float()
        logits = F.interpolate(logits, size=(self.size, self.size), mode="bilinear", align_corners=False)
        x = integrate_increments(logits[:, 0], -1)
        y = integrate_increments(logits[:, 1], -2)
        return torch.stack([x, y], -1)


def integrate_increments(logits: Tensor, dim: int) -> Tensor:
    """Cell centres in [-1, 1] of cells whose positive widths are a floored softmax of ``logits`` along ``dim``."""
    cells = logits.shape[dim]
    widths = (1 - MIN_STRETCH) * logits.softmax(dim) + MIN_STRETCH / cells
    return 2 * (widths.cumsum(dim) - widths / 2) - 1


def _sample_views(textures: Tensor, grid: Tensor) -> Tensor:
    # The grid is a frame's own: its views are sampled together, as channels.
    flat = textures.flatten(1, 2)
    sampled = F.grid_sample(flat, grid.to(flat.dtype), padding_mode="border", align_corners=False)
    return sampled.view_as(textures)
