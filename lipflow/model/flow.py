"""The invertible flow f: z -> y between the avatar's latent space and the one in which drivers predict."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import zuko
from torch import Tensor, nn
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform

_START_SCALE = 0.01
"""Of the coupling networks' last layers: f starts near the identity, with gradients in every weight."""

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
    """

    def __init__(
        self,
        features: int,
        steps: int,
        hidden_size: int,
        transform: Literal["affine", "spline"] = "affine",
        bins: int = 8,
    ):
        super().__init__()
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

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``z (..., D)`` to ``y (..., D)`` and ``log |det df/dz| (...)``."""
        return self._transform().call_and_ladj(z)

    def inverse(self, y: Tensor) -> Tensor:
        """``y (..., D)`` to ``z (..., D)``."""
        return self._transform().inv(y)

    def _transform(self) -> zuko.transforms.ComposedTransform:
        return zuko.transforms.ComposedTransform(*(coupling() for coupling in self.couplings))


class IdentityFlow(nn.Module):
    """y = z, for the methods without a flow."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z itself, and zeros."""
        return z, z.new_zeros(z.shape[:-1])

    def inverse(self, y: Tensor) -> Tensor:
        """y itself."""
        return y
