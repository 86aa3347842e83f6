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

Two implementations give the same numbers: plain torch, for any device and precision, and fused kernels for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


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


def max_mip_level(texture_size: int) -> int:
    """How often a side of ``texture_size`` texels can be halved: 10 for 1024, 2 for 12."""
    return (texture_size & -texture_size).bit_length() - 1


def coarse_levels(texture: Tensor) -> Tensor:
    """Mip levels 1, 2, ... of ``(M, C, T, T)``, one after the other, each row by row: ``(M, C, S)``."""
    levels, level = [texture.new_zeros(*texture.shape[:2], 0)], texture
    for _ in range(max_mip_level(texture.shape[-1])):
        level = functional.avg_pool2d(level, 2)
        levels.append(level.flatten(2))
    return torch.cat(levels, dim=2)


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
    sizes, offsets = (torch.from_numpy(table).to(uv.device) for table in _level_table(texture_size))
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


def _level_table(texture_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sides of the mip levels, and where each starts when all are laid out one after the other."""
    sizes = texture_size // 2 ** np.arange(max_mip_level(texture_size) + 1)
    return sizes, np.concatenate([[0], np.cumsum(sizes**2)[:-1]])


def sample_bilinear_cpu(texture: Tensor, uv: Tensor, mask: Tensor) -> Tensor:
    """:func:`sample_bilinear` for CPU tensors, fused; coordinates and weights are computed in float64."""
    return _Sample.apply(texture, texture.new_zeros(*texture.shape[:2], 0), uv, uv.new_zeros(len(uv), 0, 0, 2, 2), mask)


def sample_trilinear_cpu(texture: Tensor, uv: Tensor, uv_da: Tensor, mask: Tensor) -> Tensor:
    """:func:`sample_trilinear` for CPU tensors, fused; coordinates and weights are computed in float64."""
    return _Sample.apply(texture, coarse_levels(texture), uv, uv_da, mask)


class _Sample(torch.autograd.Function):
    """Both look-ups; the bilinear one has an empty ``uv_da`` and no coarse levels."""

    @staticmethod
    def forward(ctx, texture, coarse, uv, uv_da, mask):
        image = texture.new_zeros(len(uv), texture.shape[1], *uv.shape[1:3])
        ctx.save_for_backward(texture, coarse, uv, uv_da, mask)
        base, coarse, uv, uv_da, mask, pixels = _arrays(texture.flatten(2), coarse, uv, uv_da, mask, image)
        sizes, offsets = _level_table(texture.shape[-1])
        shared_by = len(uv) // len(base)
        height = uv.shape[1]
        band = -(-height // max(1, -(-torch.get_num_threads() // len(uv))))

        def draw(view: int, first: int) -> None:
            rows = slice(first, min(first + band, height))
            derivatives = uv_da[view, rows] if uv_da.size else uv_da[view]
            owner = view // shared_by
            arguments = (base[owner], coarse[owner], sizes, offsets, uv[view, rows], derivatives, mask[view, rows])
            _forward(*arguments, pixels[view, :, rows])

        _in_threads(draw, ((view, first) for view in range(len(uv)) for first in range(0, height, band)))
        return image

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_image):
        texture, coarse, uv, uv_da, mask = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        # Empty where no gradient is wanted: the zeros alone would cost as much as a look-up.
        grads = [torch.zeros_like(t) if wanted else t.new_zeros(len(t), t.shape[1], 0, 0) for t in (texture,)]
        grads += [torch.zeros_like(coarse), torch.zeros_like(uv), torch.zeros_like(uv_da)]
        arrays = _arrays(texture.flatten(2), coarse, uv, uv_da, mask, grad_image, grads[0].flatten(2), *grads[1:])
        base, coarse, uv, uv_da, mask, grad_image, grad_base, grad_coarse, grad_uv, grad_uv_da = arrays
        sizes, offsets = _level_table(texture.shape[-1])
        shared_by = len(uv) // len(base)

        def spread(owner: int) -> None:
            # The views of one texture add to the same gradient: one after the other.
            for view in range(owner * shared_by, (owner + 1) * shared_by):
                arguments = (base[owner], coarse[owner], sizes, offsets, uv[view], uv_da[view], mask[view])
                targets = (grad_base[owner], grad_coarse[owner], grad_uv[view], grad_uv_da[view])
                _backward(*arguments, grad_image[view], *targets)

        _in_threads(spread, ((owner,) for owner in range(len(base))))
        return (*(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), None)


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _in_threads(function: Callable[..., None], jobs: Iterable[tuple[int, ...]]) -> None:
    """Call ``function(*job)`` for every job, on as many threads as torch may use; the kernels release the GIL."""
    jobs, threads = list(jobs), torch.get_num_threads()
    if threads == 1 or len(jobs) == 1:
        for job in jobs:
            function(*job)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(function, *job) for job in jobs]:
            done.result()


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


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _neighbours(coordinate, size):
    """The two texels beside a coordinate along one axis and the second one's share."""
    position = coordinate * size - 0.5
    if not position > 0.0:  # also where it is not a number
        return 0, 0, 0.0
    if position >= size - 1.0:
        return size - 1, size - 1, 0.0
    low = int(position)
    return low, low + 1, position - low


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _footprint(uv_da, size):
    """``s_x, s_y, t_x, t_y``, (A - B) / 2, C, r and major^2 of the module's head."""
    sx, sy = np.float64(uv_da[0, 0]) * size, np.float64(uv_da[0, 1]) * size
    tx, ty = np.float64(uv_da[1, 0]) * size, np.float64(uv_da[1, 1]) * size
    a, b, c = sx * sx + tx * tx, sy * sy + ty * ty, sx * sy + tx * ty
    difference = 0.5 * (a - b)
    radius = np.sqrt(difference * difference + c * c)
    return sx, sy, tx, ty, difference, c, radius, 0.5 * (a + b) + radius


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _levels(major, last):
    """The finer level, the coarser one and the coarser one's share."""
    if not major > 1.0:  # magnified, or not a number
        return 0, 0, 0.0
    level = 0.5 * np.log2(major)
    if level >= last:
        return last, last, 0.0
    low = int(level)
    return low, low + 1, level - low


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _forward(base, coarse, sizes, offsets, uv, uv_da, mask, image):
    trilinear = uv_da.shape[0] > 0
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            if not mask[row, column]:
                continue
            fine, rough, share = 0, 0, 0.0
            if trilinear:
                footprint = _footprint(uv_da[row, column], sizes[0])
                fine, rough, share = _levels(footprint[7], sizes.shape[0] - 1)
            u, v = np.float64(uv[row, column, 0]), np.float64(uv[row, column, 1])
            for level, part in ((fine, 1.0 - share), (rough, share)):
                if part == 0.0:
                    continue
                size = sizes[level]
                left, right, across = _neighbours(u, size)
                top, bottom, down = _neighbours(v, size)
                texels = base if level == 0 else coarse
                start = 0 if level == 0 else offsets[level] - offsets[1]
                upper, lower = start + top * size, start + bottom * size
                w00, w01 = part * (1.0 - across) * (1.0 - down), part * across * (1.0 - down)
                w10, w11 = part * (1.0 - across) * down, part * across * down
                for channel in range(base.shape[0]):
                    image[channel, row, column] += (
                        w00 * texels[channel, upper + left]
                        + w01 * texels[channel, upper + right]
                        + w10 * texels[channel, lower + left]
                        + w11 * texels[channel, lower + right]
                    )


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _backward(base, coarse, sizes, offsets, uv, uv_da, mask, grad_image, grad_base, grad_coarse, grad_uv, grad_uv_da):
    trilinear = uv_da.shape[0] > 0
    spread = grad_base.shape[1] > 0
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            if not mask[row, column]:
                continue
            fine, rough, share = 0, 0, 0.0
            if trilinear:
                footprint = _footprint(uv_da[row, column], sizes[0])
                fine, rough, share = _levels(footprint[7], sizes.shape[0] - 1)
            u, v = np.float64(uv[row, column, 0]), np.float64(uv[row, column, 1])
            grad_u, grad_v, grad_level = 0.0, 0.0, 0.0
            for level, part, sign in ((fine, 1.0 - share, -1.0), (rough, share, 1.0)):
                if part == 0.0:
                    continue
                size = sizes[level]
                left, right, across = _neighbours(u, size)
                top, bottom, down = _neighbours(v, size)
                texels, target = (base, grad_base) if level == 0 else (coarse, grad_coarse)
                start = 0 if level == 0 else offsets[level] - offsets[1]
                upper, lower = start + top * size, start + bottom * size
                for channel in range(base.shape[0]):
                    grad = np.float64(grad_image[channel, row, column])
                    if grad == 0.0:
                        continue
                    t00, t01 = np.float64(texels[channel, upper + left]), np.float64(texels[channel, upper + right])
                    t10, t11 = np.float64(texels[channel, lower + left]), np.float64(texels[channel, lower + right])
                    high, low = t00 + across * (t01 - t00), t10 + across * (t11 - t10)
                    grad_level += sign * grad * (high + down * (low - high))
                    grad *= part
                    grad_u += grad * size * ((1.0 - down) * (t01 - t00) + down * (t11 - t10))
                    grad_v += grad * size * (low - high)
                    if spread:
                        target[channel, upper + left] += grad * (1.0 - across) * (1.0 - down)
                        target[channel, upper + right] += grad * across * (1.0 - down)
                        target[channel, lower + left] += grad * (1.0 - across) * down
                        target[channel, lower + right] += grad * across * down
            grad_uv[row, column, 0], grad_uv[row, column, 1] = grad_u, grad_v
            if share == 0.0 or footprint[6] == 0.0:
                continue
            sx, sy, tx, ty, difference, c, radius, major = footprint
            scale = grad_level * sizes[0] * 0.5 / (np.log(2.0) * major)
            by_a, by_b, by_c = 0.5 + 0.5 * difference / radius, 0.5 - 0.5 * difference / radius, c / radius
            target_da = grad_uv_da[row, column]
            target_da[0, 0] = scale * (2.0 * by_a * sx + by_c * sy)
            target_da[0, 1] = scale * (2.0 * by_b * sy + by_c * sx)
            target_da[1, 0] = scale * (2.0 * by_a * tx + by_c * ty)
            target_da[1, 1] = scale * (2.0 * by_b * ty + by_c * tx)
