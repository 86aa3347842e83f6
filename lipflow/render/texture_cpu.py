"""The look-ups of :mod:`lipflow.render.texture` in fused kernels for CPU tensors (numba).

Coordinates are computed in float64 and texels mixed in the texture's precision. The bilinear look-up is the one that
renders spend their time in: it goes along the covered runs of a row, first the texels' places and shares (which the
compiler vectorises), then one channel after the other.
"""

from __future__ import annotations

from functools import partial

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lipflow.memory import empty
from lipflow.render.parallel import row_bands, run_parallel


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


def level_table(texture_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sides of the mip levels, and where each starts when all are laid out one after the other."""
    sizes = texture_size // 2 ** np.arange(max_mip_level(texture_size) + 1)
    return sizes, np.concatenate([[0], np.cumsum(sizes**2)[:-1]])


def sample_bilinear_cpu(texture: Tensor, uv: Tensor, mask: Tensor) -> Tensor:
    """:func:`lipflow.render.texture.sample_bilinear` for CPU tensors."""
    return _Bilinear.apply(texture, None, uv, mask)[0]


def sample_weighted_cpu(texture: Tensor, weight_mask: Tensor, uv: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`lipflow.render.texture.sample_weighted` for CPU tensors, in one pass."""
    return _Bilinear.apply(texture, weight_mask.to(texture.dtype), uv, mask)


def sample_trilinear_cpu(texture: Tensor, uv: Tensor, uv_da: Tensor, mask: Tensor) -> Tensor:
    """:func:`lipflow.render.texture.sample_trilinear` for CPU tensors."""
    return _Trilinear.apply(texture, coarse_levels(texture), uv, uv_da, mask)


class _Bilinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, texture, weight_mask, uv, mask):
        ctx.save_for_backward(texture, uv, mask)
        image = empty((len(uv), texture.shape[1], *mask.shape[1:]), texture.dtype)
        weights = texture.new_empty(0, 0) if weight_mask is None else weight_mask.contiguous()
        weight = empty((len(uv), *(mask.shape[1:] if len(weights) else (0, 0))), texture.dtype)
        ctx.mark_non_differentiable(weight)
        arrays = _arrays(texture.flatten(2), uv.flatten(2), mask, image, weights.flatten(), weight)
        base, coordinates, seen, pixels, weights, weight_pixels = arrays
        size, shared_by = texture.shape[-1], len(uv) // len(texture)
        weights_size = 0 if weight_mask is None else len(weight_mask)

        def draw(view: int, begin: int, stop: int) -> None:
            rows = slice(begin, stop)
            textures = (base[view // shared_by], size, weights, weights_size)
            outputs = (pixels[view, :, rows], weight_pixels[view, rows])
            _bilinear(*textures, coordinates[view, rows], seen[view, rows], *outputs)

        run_parallel(partial(draw, *band) for band in row_bands(*mask.shape[:2]))
        return image, weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_image, _grad_weight):
        texture, uv, mask = ctx.saved_tensors
        size, shared_by = texture.shape[-1], len(uv) // len(texture)
        grad_texture = _gradient_of(texture, ctx.needs_input_grad[0])
        grad_uv = empty(uv.shape, uv.dtype)
        arrays = _arrays(
            texture.flatten(2), uv.flatten(2), mask, grad_image, grad_texture.flatten(2), grad_uv.flatten(2)
        )
        base, coordinates, seen, grad_pixels, grad_base, grad_coordinates = arrays

        def spread(owner: int) -> None:
            # The views of one texture add to the same gradient: one after the other.
            for view in range(owner * shared_by, (owner + 1) * shared_by):
                arguments = (base[owner], size, coordinates[view], seen[view], grad_pixels[view])
                _bilinear_backward(*arguments, grad_base[owner], grad_coordinates[view])

        run_parallel(partial(spread, owner) for owner in range(len(base)))
        return grad_texture if ctx.needs_input_grad[0] else None, None, grad_uv, None


class _Trilinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, texture, coarse, uv, uv_da, mask):
        ctx.save_for_backward(texture, coarse, uv, uv_da, mask)
        image = texture.new_zeros(len(uv), texture.shape[1], *mask.shape[1:])
        base, coarse, uv, uv_da, seen, pixels = _arrays(texture.flatten(2), coarse, uv, uv_da, mask, image)
        tables, shared_by = level_table(texture.shape[-1]), len(uv) // len(base)

        def draw(view: int, begin: int, stop: int) -> None:
            owner, rows = view // shared_by, slice(begin, stop)
            texels = (base[owner], coarse[owner], *tables)
            _trilinear(*texels, uv[view, rows], uv_da[view, rows], seen[view, rows], pixels[view, :, rows])

        run_parallel(partial(draw, *band) for band in row_bands(*mask.shape[:2]))
        return image

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_image):
        texture, coarse, uv, uv_da, mask = ctx.saved_tensors
        grads = [_gradient_of(texture, ctx.needs_input_grad[0] or ctx.needs_input_grad[1])]
        grads += [torch.zeros_like(coarse), torch.zeros_like(uv), torch.zeros_like(uv_da)]
        arrays = _arrays(texture.flatten(2), coarse, uv, uv_da, mask, grad_image, grads[0].flatten(2), *grads[1:])
        base, coarse, uv, uv_da, seen, grad_image, grad_base, grad_coarse, grad_uv, grad_uv_da = arrays
        tables, shared_by = level_table(texture.shape[-1]), len(uv) // len(base)

        def spread(owner: int) -> None:
            for view in range(owner * shared_by, (owner + 1) * shared_by):
                arguments = (base[owner], coarse[owner], *tables, uv[view], uv_da[view], seen[view])
                targets = (grad_base[owner], grad_coarse[owner], grad_uv[view], grad_uv_da[view])
                _trilinear_backward(*arguments, grad_image[view], *targets)

        run_parallel(partial(spread, owner) for owner in range(len(base)))
        return (*(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), None)


def _gradient_of(texture: Tensor, wanted: bool) -> Tensor:
    """Zeros to add to; empty where no gradient is wanted: the zeros alone would cost as much as a look-up."""
    return texture.new_zeros(texture.shape if wanted else (*texture.shape[:2], 0, 0))


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    """As numpy arrays; truth values as bytes, over which loops are faster."""
    contiguous = (tensor.detach().contiguous() for tensor in tensors)
    return [(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor).numpy() for tensor in contiguous]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _run_end(values, begin):
    """Where the run of equal values ends that begins at ``begin``."""
    stop = begin + 1
    while stop < values.shape[0] and values[stop] == values[begin]:
        stop += 1
    return stop


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _place(coordinates, size, low, share):
    """The lower of the two texels that each coordinate lies between along its axis, and the upper one's share.

    The lower one is never the last, so that the upper one is always the next: at the border its share is 1 or 0.
    """
    last, last_low = size - 1.0, np.int32(max(size - 2, 0))
    for index in range(coordinates.shape[0]):
        position = np.float64(coordinates[index]) * size - 0.5
        position = position if position > 0.0 else 0.0  # also where it is not a number
        position = position if position < last else last
        texel = np.int32(position)
        texel = texel if texel < last_low else last_low
        low[index] = texel
        share[index] = position - np.float64(texel)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _mix(texels, corner, right, down, share, pixels):
    """One channel of a run."""
    one = share.dtype.type(1)
    for index in range(pixels.shape[0]):
        first = np.uint64(corner[index])
        across, below = share[2 * index], share[2 * index + 1]
        upper = texels[first] * (one - across) + texels[first + right] * across
        lower = texels[first + down] * (one - across) + texels[first + down + right] * across
        pixels[index] = upper * (one - below) + lower * below


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _bilinear(base, size, weights, weights_size, uv, mask, image, weight):
    """Fill a band of ``R`` rows where ``mask`` is not 0, and write zeros elsewhere.

    ``image (C, R, W)`` is filled from ``base (C, size * size)`` and, unless ``weights_size`` is 0, ``weight (R, W)``
    from ``weights (weights_size * weights_size)``, both at ``uv (R, 2 W)``: u and v in turn.
    """
    rows, width = mask.shape
    low, share, corner = np.empty(2 * width, np.int32), np.empty(2 * width, base.dtype), np.empty(width, np.uint32)
    for row in range(rows):
        begin = 0
        while begin < width:
            stop = _run_end(mask[row], begin)
            if mask[row, begin]:
                coordinates = uv[row, 2 * begin : 2 * stop]
                right, down = _corners(coordinates, size, low, share, corner)
                for channel in range(base.shape[0]):
                    _mix(base[channel], corner, right, down, share, image[channel, row, begin:stop])
                if weights_size > 0:
                    right, down = _corners(coordinates, weights_size, low, share, corner)
                    _mix(weights, corner, right, down, share, weight[row, begin:stop])
            else:
                for channel in range(base.shape[0]):
                    image[channel, row, begin:stop] = 0.0
                if weights_size > 0:
                    weight[row, begin:stop] = 0.0
            begin = stop


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _corners(coordinates, size, low, share, corner):
    """The first of the four texels around each point of a run; how far it is to the next to the right and below.

    Unsigned: numba looks at the sign of any other index, to count negative ones from the end.
    """
    _place(coordinates, size, low, share)
    for index in range(coordinates.shape[0] // 2):
        corner[index] = low[2 * index + 1] * size + low[2 * index]
    right = min(size - 1, 1)
    return np.uint64(right), np.uint64(right * size)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _slopes(texels, corner, right, down, share, grad, slopes):
    """Add what one channel of a run contributes to the gradients of its places, ``slopes``, by texel."""
    one = share.dtype.type(1)
    for index in range(grad.shape[0]):
        first = np.uint64(corner[index])
        across, below = share[2 * index], share[2 * index + 1]
        t00, t01 = texels[first], texels[first + right]
        t10, t11 = texels[first + down], texels[first + down + right]
        slopes[2 * index] += grad[index] * ((t01 - t00) * (one - below) + (t11 - t10) * below)
        slopes[2 * index + 1] += grad[index] * ((t10 - t00) * (one - across) + (t11 - t01) * across)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _spread(texels, corner, right, down, share, grad):
    """Add what one channel of a run contributes to the gradients of the texels."""
    one = share.dtype.type(1)
    for index in range(grad.shape[0]):
        first = np.uint64(corner[index])
        across, below = share[2 * index], share[2 * index + 1]
        upper, lower = grad[index] * (one - below), grad[index] * below
        texels[first] += upper * (one - across)
        texels[first + right] += upper * across
        texels[first + down] += lower * (one - across)
        texels[first + down + right] += lower * across


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _bilinear_backward(base, size, uv, mask, grad_image, grad_base, grad_uv):
    """Fill ``grad_uv (R, 2 W)`` and, unless it is empty, add to ``grad_base (C, size * size)``."""
    rows, width = mask.shape
    low, share, corner = np.empty(2 * width, np.int32), np.empty(2 * width, base.dtype), np.empty(width, np.uint32)
    slopes = np.empty(2 * width, base.dtype)
    wanted, last = grad_base.shape[1] > 0, size - 1.0
    for row in range(rows):
        begin = 0
        while begin < width:
            stop = _run_end(mask[row], begin)
            target = grad_uv[row, 2 * begin : 2 * stop]
            if mask[row, begin]:
                coordinates = uv[row, 2 * begin : 2 * stop]
                right, down = _corners(coordinates, size, low, share, corner)
                slopes[: len(target)] = 0.0
                for channel in range(base.shape[0]):
                    grad = grad_image[channel, row, begin:stop]
                    _slopes(base[channel], corner, right, down, share, grad, slopes)
                    if wanted:
                        _spread(grad_base[channel], corner, right, down, share, grad)
                for index in range(len(target)):
                    # On the clamped border the texels do not change with the coordinate.
                    position = np.float64(coordinates[index]) * size - 0.5
                    target[index] = slopes[index] * size if 0.0 < position < last else 0.0
            else:
                target[:] = 0.0
            begin = stop


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
def _trilinear(base, coarse, sizes, offsets, uv, uv_da, mask, image):
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            if not mask[row, column]:
                continue
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
def _trilinear_backward(
    base, coarse, sizes, offsets, uv, uv_da, mask, grad_image, grad_base, grad_coarse, grad_uv, grad_uv_da
):
    spread = grad_base.shape[1] > 0
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            if not mask[row, column]:
                continue
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
