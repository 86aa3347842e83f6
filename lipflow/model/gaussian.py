"""Diagonal Gaussians, the only densities of the model: Q(z | x), P(y | h) and N(0, I)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LOG_2PI = math.log(2 * math.pi)


def draw_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the shape, type and device of ``like``.

    They are drawn on the generator's own device, so that a CPU generator gives the same numbers on every machine.
    """
    noise = torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return noise.to(like.device)


@dataclass
class DiagonalGaussian:
    """N(mean, diag exp(log_std)^2) over the last dimension.

    Attributes:
        mean: ``(..., D)``.
        log_std: ``(..., D)``.
    """

    mean: Tensor
    log_std: Tensor

    @classmethod
    def standard(cls, like: Tensor) -> DiagonalGaussian:
        """N(0, I) of the shape of ``like``."""
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    def sample(self, generator: torch.Generator) -> Tensor:
        """A reparametrised sample ``(..., D)``: gradients reach the mean and the standard deviation."""
        return self.mean + self.log_std.exp() * draw_normal(self.mean, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        """``(...)`` log density at ``x (..., D)``, in nats."""
        return -0.5 * (self.whiten(x).square() + 2 * self.log_std + _LOG_2PI).sum(-1)

    def whiten(self, x: Tensor) -> Tensor:
        """``(..., D)`` residuals of ``x`` in standard deviations; their RMS is 1 for a calibrated Gaussian."""
        return (x - self.mean) * (-self.log_std).exp()

    def entropy(self) -> Tensor:
        """``(...)`` differential entropy in nats."""
        return (self.log_std + 0.5 * (1 + _LOG_2PI)).sum(-1)

    def kl_to_standard(self) -> Tensor:
        """``(...)`` KL(self || N(0, I)) in nats."""
        return 0.5 * ((2 * self.log_std).exp() + self.mean.square() - 1 - 2 * self.log_std).sum(-1)

    def where(self, condition: Tensor, other: DiagonalGaussian) -> DiagonalGaussian:
        """Self where ``condition (...)`` is true and ``other`` elsewhere."""
        mask = condition[..., None]
        return DiagonalGaussian(
            torch.where(mask, self.mean, other.mean), torch.where(mask, self.log_std, other.log_std)
        )


def product_of_gaussians(experts: Sequence[DiagonalGaussian], present: Sequence[Tensor]) -> DiagonalGaussian:
    """The normalised product of the present experts; N(0, I) where none is present.

    Precisions add, and the mean is the mean of the experts' means weighted by precision. Experts that are posteriors
    of one prior each contain it, and often the same errors: their product is over-confident (measured in
    ``tests/benchmarks/RESULTS.md``). It is not divided by the prior, since the marginal of y is none that is known.

    Args:
        experts: S Gaussians ``(..., D)``, at least one.
        present: for each of them ``(...)`` bool.
    """
    weights = [
        (-2 * expert.log_std).exp() * seen[..., None].to(expert.mean.dtype)
        for expert, seen in zip(experts, present, strict=True)
    ]
    precision = torch.stack(weights).sum(0)
    nothing = precision == 0
    precision = precision.masked_fill(nothing, 1.0)
    weighted = torch.stack([weight * expert.mean for weight, expert in zip(weights, experts, strict=True)]).sum(0)
    return DiagonalGaussian(weighted / precision, -0.5 * precision.log())
