"""The invertible flow f: z -> y between the avatar's latent space and the one in which drivers predict.

With ``conditional`` couplings f(z; h) depends on the driving signal, too: through the prior P(y | h) = N(mean, std)
alone, so that fused and missing signals need no rule of their own. Where nothing is seen the prior is N(0, I), and so
is the condition: one flow for all signals, which without a signal is an unconditional one. The density stays exact,

    log p(z | h) = log N(f(z; h); mean, std) + log |det df(z; h) / dz|,

because the Jacobian with respect to z is triangular for every fixed h.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import zuko
from torch import Tensor, nn
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform

from lipflow.model.gaussian import DiagonalGaussian

_START_SCALE = 0.01
"""Of the coupling networks' last layers: f starts near the identity, with gradients in every weight."""

_LOG_STD_SCALE = 3.0
"""Brings a driver's log std, which lies in [-6, 3], to [-2, 1]."""

# zuko bounds |log scale| softly by |log slope|: here by 1, so that four steps can neither explode nor collapse.
_BoundedAffine = partial(MonotonicAffineTransform, slope=math.exp(-1))
# Steeper splines lose digits: with slopes down to 0.001 their inverse is off by 2e-7 in float64.
_BoundedSpline = partial(MonotonicRQSTransform, slope=0.1)


class LatentFlow(nn.Module):
    """Couplings with fixed random splits; every second step transforms what the one before kept.

    Args:
        features: D.
        steps: number of couplings, at least 2, so that every feature is transformed.
        hidden_size: width of the two hidden layers of each coupling network.
        transform: ``affine`` (RealNVP, Dinh et al., 2017), or rational-quadratic ``spline`` (Neural Spline Flows,
            Durkan et al., 2019) on [-5, 5] with slopes in [0.1, 10], the identity outside.
        bins: of each spline.
        conditional: the couplings see the mean and the log std of the prior of y.
    """

    def __init__(
        self,
        features: int,
        steps: int,
        hidden_size: int,
        transform: Literal["affine", "spline"] = "affine",
        bins: int = 8,
        *,
        conditional: bool = False,
    ):
        super().__init__()
        self._conditional = conditional
        kinds = {
            "affine": (_BoundedAffine, ((), ())),
            "spline": (_BoundedSpline, ((bins,), (bins,), (bins - 1,))),
        }
        univariate, shapes = kinds[transform]
        self.couplings = nn.ModuleList()
        mask = torch.zeros(features, dtype=torch.bool)
        for step in range(steps):
            if step % 2:
                mask = ~mask
            else:
                mask = torch.zeros(features, dtype=torch.bool)
                mask[torch.randperm(features)[: features // 2]] = True
            coupling = GeneralCouplingTransform(
                features,
                context=2 * features if conditional else 0,
                mask=mask,
                univariate=univariate,
                shapes=shapes,
                hidden_features=(hidden_size, hidden_size),
                activation=nn.SiLU,
            )
            last = coupling.hyper[-1]
            with torch.no_grad():
                last.weight.mul_(_START_SCALE)
                last.bias.zero_()
            self.couplings.append(coupling)

    def forward(self, z: Tensor, prior: DiagonalGaussian | None = None) -> tuple[Tensor, Tensor]:
        """``z (..., D)`` to ``y (..., D)`` and ``log |det df/dz| (...)``.

        Args:
            z: in the avatar's latent space.
            prior: of y, ``(..., D)``; None: N(0, I), that is no signal.
        """
        return self._transform(z, prior).call_and_ladj(z)

    def inverse(self, y: Tensor, prior: DiagonalGaussian | None = None) -> Tensor:
        """``y (..., D)`` to ``z (..., D)``, under the same ``prior`` of y."""
        return self._transform(y, prior).inv(y)

    def _transform(self, like: Tensor, prior: DiagonalGaussian | None) -> zuko.transforms.ComposedTransform:
        condition = None
        if self._conditional:
            condition = standardised(DiagonalGaussian.standard(like) if prior is None else prior)
        return zuko.transforms.ComposedTransform(*(coupling(condition) for coupling in self.couplings))


def standardised(prior: DiagonalGaussian) -> Tensor:
    """What conditional couplings see of a prior: ``(..., 2 D)`` numbers around 0, all 0 for N(0, I).

    Means are of the order of one; far ones enter by their logarithm (asinh), so that a driver that is beside itself
    does not drive the couplings out of all they were trained for.
    """
    return torch.cat([prior.mean.asinh(), prior.log_std / _LOG_STD_SCALE], dim=-1)


class IdentityFlow(nn.Module):
    """y = z, for the methods without a flow."""

    def forward(self, z: Tensor, prior: DiagonalGaussian | None = None) -> tuple[Tensor, Tensor]:
        """z itself, and zeros."""
        return z, z.new_zeros(z.shape[:-1])

    def inverse(self, y: Tensor, prior: DiagonalGaussian | None = None) -> Tensor:
        """y itself."""
        return y
