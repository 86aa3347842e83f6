"""Texture look-up: bilinear, and trilinear in a mip chain, clamped at the border.

The results are those of nvdiffrast's ``texture(filter_mode="linear" | "linear-mipmap-linear",
boundary_mode="clamp")`` (Laine et al., "Modular Primitives for High-Performance Differentiable Rendering", 2020,
section 3.5; level of detail as in its ``texture_kernel.cu``, mip chain as in ``texture.cpp``, version 0.4). With the
footprint of a pixel in texels, ``s_x = T du/dx, s_y = T du/dy, t_x = T dv/dx, t_y = T dv/dy``::

    A = s_x^2 + t_x^2,   B = s_y^2 + t_y^2,   C = s_x s_y + t_x t_y
    major^2 = (A + B) / 2 + r,   r = sqrt((A - B)^2 / 4 + C^2)
    level = clamp(log2(major^2) / 2, 0, number of levels - 1)

``major`` is the longer axis of the ellipse that a pixel covers; the two levels next to ``level`` are mixed
linearly. A coarser level is the mean of 2 x 2 texels. nvdiffrast refuses textures whose sides cannot be halved down to
1; here the chain ends at the last even side, which is nvdiffrast's with ``max_mip_level=max_mip_level(T)``. Where the
level has no derivative (a round footprint, ``r = 0``) or is clamped, its gradient is 0, as there.

Two implementations give the same numbers: plain torch, for any device and precision, and fused kernels for the CPU
(:mod:`lipflow.render.texture_cpu`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipflow.render.texture_cpu import (
    coarse_levels,
    level_table,
    max_mip_level,
    sample_bilinear_cpu,
    sample_trilinear_cpu,
    sample_weighted_cpu,
)


def sample_bilinear(texture: Tensor, uv: Tensor, mask: Tensor) -> Tensor:
    """Bilinear texture look-up, differentiable in texture and coordinates.

    Args:
        texture: ``(M, C, T, T)``, row 0 is v = 0, texel centres at +0.5. View n reads texture ``n // (N / M)``: one
            for each view, or one shared by N / M consecutive views, which is not copied.
        uv: ``(N, H, W, 2)`` in [0, 1]; outside, the border's texels are repeated.
        mask: ``(N, H, W)`` bool, the pixels to look up.

    Returns:
        ``(N, C, H, W)``, 0 outside the mask.

    Raises:
        ValueError: the shapes disagree.
    """
    _check(texture, uv, None, mask)
    if texture.device.type == "cpu":
        return sample_bilinear_cpu(texture, uv, mask)
    return sample_bilinear_torch(texture, uv, mask)


def sample_weighted(texture: Tensor, weight_mask: Tensor, uv: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`sample_bilinear`, and a weight mask looked up at the same coordinates: on the CPU in the same pass.

    Args:
        texture: ``(M, C, T, T)``.
        weight_mask: ``(S, S)``, any S; it and its look-up have no gradient.
        uv: ``(N, H, W, 2)``.
        mask: ``(N, H, W)`` bool.

    Returns:
        ``(N, C, H, W)`` and ``(N, H, W)``, 0 outside the mask, in the texture's dtype.

    Raises:
        ValueError: the shapes disagree.
    """
    _check(texture, uv, None, mask)
    if texture.device.type == "cpu":
        return sample_weighted_cpu(texture, weight_mask, uv, mask)
    weights = sample_bilinear_torch(weight_mask.to(texture.dtype)[None, None], uv.detach(), mask)
    return sample_bilinear_torch(texture, uv, mask), weights[:, 0]


def sample_weight(weight_mask: Tensor, uv: Tensor, mask: Tensor) -> Tensor:
    """``(N, H, W)`` of a weight mask ``(S, S)`` at ``uv (N, H, W, 2)``, bilinear, 0 outside the mask; no gradient."""
    uv = uv.detach()
    return sample_bilinear(weight_mask[None, None].to(uv.dtype), uv, mask)[:, 0]


def sample_trilinear(texture: Tensor, uv: Tensor, uv_da: Tensor, mask: Tensor) -> Tensor:
    """Mip-mapped texture look-up, differentiable in texture, coordinates and their derivatives.

    Args:
        texture: as in :func:`sample_bilinear`.
        uv: ``(N, H, W, 2)``.
        uv_da: ``(N, H, W, 2, 2)``; ``uv_da[..., i, j]`` is d uv_i / d pixel_j in 1/px, j = (x, y).
        mask: ``(N, H, W)`` bool.

    Returns:
        ``(N, C, H, W)``, 0 outside the mask.

    Raises:
        ValueError: the shapes disagree.
    """
    _check(texture, uv, uv_da, mask)
    if texture.device.type == "cpu":
        return sample_trilinear_cpu(texture, uv, uv_da, mask)
    return sample_trilinear_torch(texture, uv, uv_da, mask)


def sample_bilinear_torch(texture: Tensor, uv: Tensor, mask: Tensor) -> Tensor:
    """:func:`sample_bilinear` in plain torch."""
    place = torch.nonzero(mask, as_tuple=True)
    level = torch.zeros_like(place[0])
    owner = place[0] // (len(uv) // len(texture))
    seen = _fetch(texture.flatten(2), texture.shape[-1], owner, level, uv[place])
    return _scattered(seen, place, mask)


def sample_trilinear_torch(texture: Tensor, uv: Tensor, uv_da: Tensor, mask: Tensor) -> Tensor:
    """:func:`sample_trilinear` in plain torch."""
    size = texture.shape[-1]
    texels = torch.cat([texture.flatten(2), coarse_levels(texture)], dim=2)
    place = torch.nonzero(mask, as_tuple=True)
    owner = place[0] // (len(uv) // len(texture))
    level = level_of_detail(uv_da[place], size)
    lower = level.detach().floor().long()
    upper = (lower + 1).clamp(max=max_mip_level(size))
    share = (level - lower).to(texture.dtype)[:, None]
    fine = _fetch(texels, size, owner, lower, uv[place])
    coarse = _fetch(texels, size, owner, upper, uv[place])
    return _scattered(fine + share * (coarse - fine), place, mask)


def level_of_detail(uv_da: Tensor, texture_size: int) -> Tensor:
    """The mip level ``(...)`` that footprints ``(..., 2, 2)`` ask for, clamped to the levels there are."""
    across, down = (uv_da * texture_size).unbind(-1)
    a, b, c = across.square().sum(-1), down.square().sum(-1), (across * down).sum(-1)
    squared_radius = (a - b).square() / 4 + c.square()
    smooth = squared_radius > 0
    # Two nested choices: the unused branch must have finite gradients, or its zeros turn into NaN.
    radius = torch.where(smooth, squared_radius, torch.ones_like(a)).sqrt()
    major = (a + b) / 2 + torch.where(smooth, radius, torch.zeros_like(a))
    major = torch.where(smooth, major, major.detach())
    magnified = ~(major > 1)
    level = torch.log2(torch.where(magnified, torch.ones_like(a), major)) / 2
    top = torch.full_like(level, max_mip_level(texture_size))
    return torch.where(level < top, level, top)


def _fetch(texels: Tensor, texture_size: int, owner: Tensor, level: Tensor, uv: Tensor) -> Tensor:
    """Bilinear look-up of P points in one mip level each: ``(P, C)``; ``texels`` holds all levels, ``(M, C, S)``."""
    sizes, offsets = (torch.from_numpy(table).to(uv.device) for table in level_table(texture_size))
    size, offset = sizes[level], offsets[level]
    position = uv.to(texels.dtype) * size[:, None] - 0.5
    last = (size - 1)[:, None].to(position.dtype)
    # Written so that a coordinate that is not a number reads texel 0.
    position = torch.where(position > 0, position, torch.zeros_like(position))
    position = torch.where(position < last, position, last)
    low = position.detach().floor().long()
    # On the clamped border both neighbours are the same texel: no gradient to the coordinate.
    high = low + ((position > 0) & (position < last))
    fraction = position - low

    def at(column: Tensor, row: Tensor) -> Tensor:
        return texels[owner, :, offset + row * size + column]

    u, v = fraction[:, :1], fraction[:, 1:]
    upper = at(low[:, 0], low[:, 1]) * (1 - u) + at(high[:, 0], low[:, 1]) * u
    lower = at(low[:, 0], high[:, 1]) * (1 - u) + at(high[:, 0], high[:, 1]) * u
    return upper * (1 - v) + lower * v


def _scattered(seen: Tensor, place: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    image = seen.new_zeros(*mask.shape, seen.shape[1]).index_put(place, seen)
    return image.permute(0, 3, 1, 2)


def _check(texture: Tensor, uv: Tensor, uv_da: Tensor | None, mask: Tensor) -> None:
    views = uv.shape[:3]
    fits = texture.ndim == 4 and texture.shape[-1] == texture.shape[-2] and len(texture) > 0
    fits = fits and len(uv) % len(texture) == 0 and tuple(uv.shape) == (*views, 2) and mask.shape == views
    fits = fits and (uv_da is None or tuple(uv_da.shape) == (*views, 2, 2))
    if not fits:
        derivatives = "" if uv_da is None else f", uv_da {tuple(uv_da.shape)}"
        raise ValueError(
            f"texture {tuple(texture.shape)}, uv {tuple(uv.shape)}{derivatives} and mask {tuple(mask.shape)} disagree: "
            "expected (M, C, T, T), (N, H, W, 2), (N, H, W, 2, 2) and (N, H, W) with N a multiple of M"
        )
