"""The layers of the encoder, the decoder and the drivers.

Weight normalisation is the one of the public Multiface code: a layer's effective weight is
``gain[out] * weight / |weight|`` with *one* norm over the whole tensor. The gain starts at the norm of a Glorot
initialisation, which sets the initial scale of the layer. The scale of ``weight`` itself then changes no output,
but it sets how fast Adam turns the layer: see :func:`_unhurried`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2
"""Of every leaky ReLU."""

COARSE = 4
"""Side of the coarsest feature map, in cells."""

_LEAKY_GAIN = math.sqrt(2 / (1 + SLOPE**2))
_PLAIN_GAIN = 1.0


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU in place: the input, a fresh output of a layer, is not needed again."""
    return F.leaky_relu(x, SLOPE, inplace=True)


def halvings(size: int) -> int:
    """How often ``size`` is halved down to the coarsest side."""
    return int(math.log2(size // COARSE))


def level_widths(channels: Sequence[int], levels: int) -> list[int]:
    """The widths of ``levels`` levels, coarsest first: the last one is repeated where they do not suffice."""
    return [channels[min(level, len(channels) - 1)] for level in range(levels)]


class NormLinear(nn.Module):
    """Weight-normalised linear layer ``(..., inputs) -> (..., outputs)``; ``last`` marks one without activation."""

    def __init__(self, inputs: int, outputs: int, *, last: bool = False):
        super().__init__()
        weight = _glorot((outputs, inputs), inputs, outputs, last)
        self.weight = nn.Parameter(_unhurried(weight))
        self.gain = nn.Parameter(weight.norm().repeat(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., inputs) -> (..., outputs)``."""
        # The gain scales the outputs: a mesh layer has thousands of times more weights than outputs.
        return F.linear(x, self.weight) * (self.gain / self.weight.norm()) + self.bias


class NormConv(nn.Module):
    """Weight-normalised convolution ``(N, inputs, H, W) -> (N, outputs, H', W')``."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool = True, last: bool = False
    ):
        super().__init__()
        area = kernel * kernel
        self.stride = stride
        self.padding = (kernel - 1) // 2
        weight = _glorot((outputs, inputs, kernel, kernel), inputs * area, outputs * area, last)
        self.weight = nn.Parameter(_unhurried(weight))
        self.gain = nn.Parameter(weight.norm().repeat(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inputs, H, W) -> (N, outputs, H', W')``."""
        weight = self.weight * (self.gain / self.weight.norm())[:, None, None, None]
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class NormConvTransposed(nn.Module):
    """Weight-normalised transposed convolution, kernel 4, stride 2, no bias: the side is doubled."""

    def __init__(self, inputs: int, outputs: int, *, last: bool = False):
        super().__init__()
        # Only 4 of the 16 taps meet at an output cell.
        weight = _glorot((inputs, outputs, 4, 4), inputs * 4, outputs * 4, last)
        # The four interleaved kernels start equal: no checkerboard at the start.
        for row, column in ((0, 1), (1, 0), (1, 1)):
            weight[:, :, row::2, column::2] = weight[:, :, 0::2, 0::2]
        self.weight = nn.Parameter(_unhurried(weight))
        self.gain = nn.Parameter(weight.norm().repeat(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inputs, H, W) -> (N, outputs, 2H, 2W)``."""
        weight = self.weight * (self.gain / self.weight.norm())[:, None, None]
        return F.conv_transpose2d(x, weight, stride=2, padding=1)


class DownTower(nn.Module):
    """Convolutions of kernel 4 and stride 2 from ``size`` to 4 x 4, flattened.

    Args:
        inputs: channels of the image.
        size: its side, a power of two from 8 upwards.
        channels: widths, coarsest first.
        residual: a residual 3 x 3 convolution follows each of them.
    """

    def __init__(self, inputs: int, size: int, channels: Sequence[int], *, residual: bool = False):
        super().__init__()
        widths = level_widths(channels, halvings(size))[::-1]
        self.convs = nn.ModuleList(
            NormConv(before, after, 4, stride=2) for before, after in zip([inputs, *widths[:-1]], widths, strict=True)
        )
        self.residuals = nn.ModuleList(NormConv(width, width, 3) for width in widths if residual)
        self.outputs = widths[-1] * COARSE * COARSE

    def forward(self, image: Tensor) -> Tensor:
        """``(N, inputs, size, size) -> (N, outputs)``."""
        feature = image
        for level, conv in enumerate(self.convs):
            feature = leaky(conv(feature))
            if self.residuals:
                feature = leaky(self.residuals[level](feature) + feature)
        return feature.flatten(1)


class UpConv(nn.Module):
    """Doubles the side of a feature map.

    Args:
        inputs, outputs: channels.
        size: side of the output, in cells.
        upsample: ``transposed``, ``bilinear`` or ``nearest``.
        spatial_bias: a bias for every cell of every channel instead of one for every channel.
        last: no activation follows.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, upsample: str, spatial_bias: bool, last: bool = False):
        super().__init__()
        self.upsample = upsample
        self.conv = (
            NormConvTransposed(inputs, outputs, last=last)
            if upsample == "transposed"
            else NormConv(inputs, outputs, 3, bias=False, last=last)
        )
        side = size if spatial_bias else 1
        self.bias = nn.Parameter(torch.zeros(outputs, side, side))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inputs, size / 2, size / 2) -> (N, outputs, size, size)``."""
        if self.upsample == "bilinear":
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        elif self.upsample == "nearest":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        feature = self.conv(x)
        return feature + self.bias.to(feature.dtype)


class UpTower(nn.Module):
    """``(N, widths[0], C, C)`` to ``(N, outputs, size, size)`` by doublings; the last one has no activation.

    Args:
        widths: of the features at C, 2 C, ... cells; so many doublings lead from C to ``size``.
        outputs: channels of the result.
        size: its side.
        upsample, spatial_bias, residual: the switches of ``AvatarConfig``.
        coarse: C, side of the coarsest feature.
    """

    def __init__(
        self,
        widths: Sequence[int],
        outputs: int,
        size: int,
        *,
        upsample: str,
        spatial_bias: bool,
        residual: bool,
        coarse: int = COARSE,
    ):
        super().__init__()
        if coarse * 2 ** len(widths) != size:
            raise ValueError(f"{len(widths)} doublings of {coarse} do not give {size}: give as many widths as do")
        afters = [*widths[1:], outputs]
        self.stages = nn.ModuleList(
            UpConv(
                before,
                after,
                2 * coarse * 2**level,
                upsample=upsample,
                spatial_bias=spatial_bias,
                last=level == len(widths) - 1,
            )
            for level, (before, after) in enumerate(zip(widths, afters, strict=True))
        )
        self.residuals = nn.ModuleList(
            NormConv(after, after, 3, last=level == len(widths) - 1) for level, after in enumerate(afters) if residual
        )

    def forward(self, feature: Tensor) -> Tensor:
        """``(N, widths[0], C, C) -> (N, outputs, size, size)``."""
        # Channels last: these few-channel, large-area convolutions run about twice as fast so.
        feature = feature.contiguous(memory_format=torch.channels_last)
        for level, stage in enumerate(self.stages):
            feature = self._activate(stage(feature), level)
            if self.residuals:
                feature = self._activate(self.residuals[level](feature) + feature, level)
        return feature.contiguous()

    def _activate(self, feature: Tensor, level: int) -> Tensor:
        return feature if level == len(self.stages) - 1 else leaky(feature)


def _glorot(shape: tuple[int, ...], fan_in: int, fan_out: int, last: bool) -> Tensor:
    bound = (_PLAIN_GAIN if last else _LEAKY_GAIN) * math.sqrt(6 / (fan_in + fan_out))
    return torch.empty(shape).uniform_(-bound, bound)


def _unhurried(weight: Tensor) -> Tensor:
    """``weight`` scaled up to an RMS of at least 0.1.

    Adam moves every weight by about the learning rate, whatever the gradient. In a mesh layer of 12,000 or more
    inputs Glorot's weights are so small (0.01) that this turns the layer by 10 % a step, all inputs at once: at a
    learning rate of 1e-3 training then diverges within 80 steps, and with the scaled weights it does not.
    """
    return weight * (0.1 / weight.square().mean().sqrt()).clamp(min=1.0)
