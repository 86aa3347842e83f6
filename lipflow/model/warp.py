"""Deformation of a decoded texture: the warp-field variant, in two kinds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipflow.config import AvatarConfig
from lipflow.model.blocks import COARSE, NormConv, NormLinear, UpTower, leaky

MIN_STRETCH = 0.1
"""A warped cell keeps at least this part of its undeformed width."""

_OFFSET_COARSE = 2


def build_warp(config: AvatarConfig) -> IntegratedWarp | OffsetWarp:
    """The warp of ``config.warp_kind``."""
    return IntegratedWarp(config) if config.warp_kind == "integrated" else OffsetWarp(config)


class IntegratedWarp(nn.Module):
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

    def grid(self, code: Tensor) -> Tensor:
        """``(B, hidden)`` to sampling positions ``(B, T, T, 2)``, x and y in [-1, 1] (texel edges at +-1)."""
        coarse = leaky(self.fc(code)).view(len(code), -1, COARSE, COARSE)
        logits = self.head(leaky(self.tower(coarse))).float()
        logits = F.interpolate(logits, size=(self.size, self.size), mode="bilinear", align_corners=False)
        x = integrate_increments(logits[:, 0], -1)
        y = integrate_increments(logits[:, 1], -2)
        return torch.stack([x, y], -1)

    def forward(self, textures: Tensor, z: Tensor, code: Tensor) -> Tensor:
        """Warp ``(B, K, 3, T, T)``; of ``z (B, D)`` and the decoder's ``code (B, hidden)``, the code decides."""
        return _sample_views(textures, self.grid(code), "border")


class OffsetWarp(nn.Module):
    """A field of offsets that is added to the identity, as ``WarpFieldDecoder`` of the public Multiface code does.

    Nothing keeps it from folding. Equal to that code in what looks odd: its layers always have spatial biases, its
    identity puts the *centres* of the first and last texels at the edges of the texture, so that zero offsets magnify
    by T / (T - 1), and outside of the texture it reads the mean texture.
    """

    identity: Tensor

    def __init__(self, config: AvatarConfig):
        super().__init__()
        self.size = config.texture_size
        channels = config.warp_channels
        self.latent_fc = NormLinear(config.latent_size, config.hidden_size)
        self.fc = NormLinear(config.hidden_size, channels[0] * _OFFSET_COARSE**2)
        self.tower = UpTower(
            channels[:-1],
            channels[-1],
            _OFFSET_COARSE * 2 ** (len(channels) - 1),
            upsample="transposed",
            spatial_bias=True,
            residual=False,
            coarse=_OFFSET_COARSE,
        )
        self.head = nn.Conv2d(channels[-1], 2, 3, padding=1)
        line = torch.linspace(-1, 1, self.size, dtype=torch.float64).float()
        y, x = torch.meshgrid(line, line, indexing="ij")
        self.register_buffer("identity", torch.stack([x, y], -1), persistent=False)

    def grid(self, z: Tensor) -> Tensor:
        """``(B, D)`` to sampling positions ``(B, T, T, 2)``, x and y (texel edges at +-1)."""
        coarse = leaky(self.fc(leaky(self.latent_fc(z)))).view(len(z), -1, _OFFSET_COARSE, _OFFSET_COARSE)
        field = F.interpolate(
            leaky(self.tower(coarse)), size=(self.size, self.size), mode="bilinear", align_corners=False
        )
        return self.head(field).movedim(1, -1) / self.size + self.identity

    def forward(self, textures: Tensor, z: Tensor, code: Tensor) -> Tensor:
        """Warp ``(B, K, 3, T, T)``; of ``z (B, D)`` and the decoder's ``code (B, hidden)``, z decides."""
        return _sample_views(textures, self.grid(z), "zeros")


def integrate_increments(logits: Tensor, dim: int) -> Tensor:
    """Cell centres in [-1, 1] of cells whose positive widths are a floored softmax of ``logits`` along ``dim``."""
    cells = logits.shape[dim]
    widths = (1 - MIN_STRETCH) * logits.softmax(dim) + MIN_STRETCH / cells
    return 2 * (widths.cumsum(dim) - widths / 2) - 1


def _sample_views(textures: Tensor, grid: Tensor, padding: str) -> Tensor:
    # The grid is a frame's own: its views are sampled together, as channels.
    flat = textures.flatten(1, 2)
    # Positions keep their precision where autocast decodes textures in bfloat16, whose steps are as wide as texels.
    dtype = torch.promote_types(flat.dtype, grid.dtype)
    sampled = F.grid_sample(flat.to(dtype), grid.to(dtype), padding_mode=padding, align_corners=False)
    return sampled.view_as(textures)
