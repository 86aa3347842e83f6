"""How sure a fitted code is: the Laplace approximation around it.

The fit's objective, times D / prior_weight, is an energy -log p(y | h, o) up to a constant. In the coordinates

    u = (f(z) - mean of P(y | h)) / its std

the prior is N(0, I), and the posterior around a fit u* is N(u*, (I + H)^-1), where H is the Hessian of
D / prior_weight * L_obs. Only H has to be measured: by central differences of gradients (renderers have no second
derivatives), along the directions of a Krylov space, in which the curvature is found by Rayleigh and Ritz. Signals
determine few directions of a face, and where nothing was measured the posterior keeps the prior's spread: the optimal
low-rank update of the prior (Spantini et al., Optimal low-rank approximations of Bayesian linear inverse problems,
2015). Negative curvatures, of robust losses and of noise, count as none, so that what is seen never makes less sure.

How far an objective's weights make it a likelihood is a matter of the data: errors of neighbouring pixels are not
independent. Compare predicted and true errors before you take the spread for millimetres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipflow import sampling
from lipflow.config import FitConfig
from lipflow.errors import ConfigError
from lipflow.fitting.objective import FitObjective, fit_objective
from lipflow.model.avatar import Avatar
from lipflow.model.gaussian import DiagonalGaussian, draw_normal
from lipflow.render.renderer import Renderer
from lipflow.types import DrivingSignals

_STEP = 0.1
"""Of the differences, in standard deviations of the prior: far above the noise of rendered gradients."""

_NOTHING_NEW = 1e-3
"""Share of a vector that has to be left outside of a basis to give it a new direction."""


@dataclass
class LatentPosterior:
    """N(u*, (I + V diag(curvature) V^T)^-1) over u, for B frames.

    Attributes:
        centre: ``(B, D)`` u*.
        directions: ``(B, D, R)`` orthonormal V.
        curvature: ``(B, R)`` of the observation along V, in units of the prior's; never negative.
        prior: P(y | h) of the frames, which gives u its units.
    """

    centre: Tensor
    directions: Tensor
    curvature: Tensor
    prior: DiagonalGaussian

    def covariance(self) -> Tensor:
        """``(B, D, D)`` of u."""
        identity = torch.eye(self.centre.shape[-1], dtype=self.centre.dtype, device=self.centre.device)
        return identity - self._scaled(self.curvature / (1 + self.curvature))

    def sample(self, avatar: Avatar, count: int, generator: torch.Generator) -> Tensor:
        """``(count, B, D)`` samples of z."""
        frames, size = self.centre.shape
        noise = draw_normal(self.centre.expand(count, frames, size), generator)
        root = -self._scaled(1 - (1 + self.curvature).rsqrt())
        whitened = self.centre + noise + torch.einsum("bde,nbe->nbd", root, noise)
        mean, log_std = (part.expand(count, frames, size) for part in (self.prior.mean, self.prior.log_std))
        driven = (mean + log_std.exp() * whitened).flatten(0, 1)
        repeated = DiagonalGaussian(mean.flatten(0, 1), log_std.flatten(0, 1))
        return avatar.latent_from_driven(driven, repeated).unflatten(0, (count, frames))

    def _scaled(self, factors: Tensor) -> Tensor:
        """``(B, D, D)`` V diag(factors) V^T."""
        return torch.einsum("bdr,br,ber->bde", self.directions, factors, self.directions)


def posterior(
    avatar: Avatar,
    renderer: Renderer,
    driving: DrivingSignals,
    signals: str | Sequence[str],
    z: Tensor,
    config: FitConfig,
    directions: int,
) -> LatentPosterior:
    """What a fit leaves open, for B frames.

    Args:
        avatar: trained.
        renderer: of its topology, on the same device.
        driving: the signals that were fitted.
        signals: those of them.
        z: ``(B, D)`` the fit's answers.
        config: of the fit.
        directions: along which curvatures are measured, at the price of two renderings each; D or more measures all
            of them, and 0 none, which leaves the prior's spread around ``z``.

    Raises:
        ConfigError: ``config.prior_weight`` is 0: the objective then knows no prior.
        LipflowError: as in :func:`lipflow.fitting.fit`.
    """
    return laplace(fit_objective(avatar, renderer, driving, signals, config), z, directions)


def laplace(objective: FitObjective, z: Tensor, directions: int) -> LatentPosterior:
    """The Laplace approximation of ``objective`` at ``z (B, D)``; see :func:`posterior`."""
    avatar, prior, weight = objective.avatar, objective.prior, objective.config.prior_weight
    if weight == 0:
        raise ConfigError("prior_weight is 0, so that the fit has no posterior: fit with a positive one")
    size = z.shape[-1]

    def gradient(whitened: Tensor) -> Tensor:
        """Of the observed part of the energy, ``(B, D)``."""
        point = whitened.detach().requires_grad_()
        latent = avatar.latent_from_driven(prior.mean + prior.log_std.exp() * point, prior)
        energy = size / weight * objective.observed(latent)
        return torch.autograd.grad(energy.sum(), point)[0]

    with torch.no_grad():
        centre = prior.whiten(avatar.driven_from_latent(z, prior)[0])
    basis, images = z.new_zeros(*z.shape, 0), z.new_zeros(*z.shape, 0)
    # What moves the observation most is seen first.
    candidate = gradient(centre) if directions > 0 else centre
    generator = torch.Generator().manual_seed(0)
    for _ in range(min(directions, size)):
        unit = _new_direction(candidate, basis, draw_normal(centre, generator))
        candidate = (gradient(centre + _STEP * unit) - gradient(centre - _STEP * unit)) / (2 * _STEP)
        basis = torch.cat([basis, unit[..., None]], -1)
        images = torch.cat([images, candidate[..., None]], -1)
    projected = basis.transpose(-1, -2) @ images
    curvature, rotation = torch.linalg.eigh((projected + projected.transpose(-1, -2)) / 2)
    return LatentPosterior(centre, basis @ rotation, curvature.clamp(min=0), prior)


@torch.no_grad()
def vertex_std_mm(avatar: Avatar, beliefs: LatentPosterior, samples: int, generator: torch.Generator) -> Tensor:
    """``(B, V)`` RMS distance of each vertex from its mean over samples of the posterior, mm.

    Args:
        avatar: decodes the samples.
        beliefs: of B frames.
        samples: at least 2.
        generator: of the samples.
    """
    drawn = beliefs.sample(avatar, samples, generator)
    spread = sampling.vertex_std_mm(torch.stack([avatar.decode_vertices(z) for z in drawn]))
    return spread.to(avatar.vertices_mean.dtype)


def _new_direction(candidate: Tensor, basis: Tensor, otherwise: Tensor) -> Tensor:
    """``(B, D)`` unit vectors at right angles to ``basis (B, D, R)``: of ``candidate``, or where it lies inside."""
    inside = _outside(candidate, basis).norm(dim=-1) <= _NOTHING_NEW * candidate.norm(dim=-1)
    vector = torch.where(inside[:, None], otherwise, candidate)
    # Twice is enough against rounding (Giraud et al., 2005).
    for _ in range(2):
        vector = torch.nn.functional.normalize(_outside(vector, basis), dim=-1)
    return vector


def _outside(vector: Tensor, basis: Tensor) -> Tensor:
    return vector - (basis @ (basis.transpose(-1, -2) @ vector[..., None]))[..., 0]
