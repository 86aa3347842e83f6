"""What a fit minimises, as a function of the coordinates in which its optimiser moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipflow.config import FitConfig
from lipflow.errors import LipflowError
from lipflow.fitting.observations import observed_error
from lipflow.model.avatar import Avatar
from lipflow.model.gaussian import DiagonalGaussian
from lipflow.render.renderer import Renderer
from lipflow.types import DrivingSignals, map_tensors


@dataclass
class FitObjective:
    """The objective of B frames::

        L_obs(D(z), o) - prior_weight / D log p + temporal_weight / 2D |z - previous|^2

    where p is P(y | h) at y = f(z), or with ``config.density = "z"`` the density p(z | h) = P(f(z) | h) |det df/dz|.
    It is the same whether the optimiser moves z or y.

    Attributes:
        avatar: trained.
        renderer: of its topology.
        driving: the signals of the B frames.
        signals: those that are compared.
        prior: P(y | h) of the frames.
        config: weights, and the coordinates.
        previous: ``(B, D)`` the previous frames' answers, or None.
    """

    avatar: Avatar
    renderer: Renderer
    driving: DrivingSignals
    signals: tuple[str, ...]
    prior: DiagonalGaussian
    config: FitConfig
    previous: Tensor | None = None

    def rows(self, rows: Tensor) -> FitObjective:
        """The same for the frames ``rows (N,)`` alone."""
        return replace(
            self,
            driving=map_tensors(self.driving, lambda tensor: tensor[rows]),
            prior=DiagonalGaussian(self.prior.mean[rows], self.prior.log_std[rows]),
            previous=None if self.previous is None else self.previous[rows],
        )

    def coordinates(self, z: Tensor) -> Tensor:
        """Where the optimiser stands at ``z (B, D)``."""
        return z if self.config.space == "z" else self.avatar.driven_from_latent(z, self.prior)[0]

    def latent(self, coordinates: Tensor) -> Tensor:
        """z at ``coordinates (B, D)``."""
        return coordinates if self.config.space == "z" else self.avatar.latent_from_driven(coordinates, self.prior)

    def at_latent(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and L_obs at ``z (B, D)``, ``(B,)`` each."""
        size = z.shape[-1]
        observed = self.observed(z)
        y, log_det = self.avatar.driven_from_latent(z, self.prior)
        log_density = self.prior.log_prob(y)
        if self.config.density == "z":
            log_density = log_density + log_det
        objective = observed - self.config.prior_weight / size * log_density
        if self.previous is not None:
            distance = (z - self.previous).square().sum(-1)
            objective = objective + self.config.temporal_weight / (2 * size) * distance
        return objective, observed

    def observed(self, z: Tensor) -> Tensor:
        """L_obs alone, ``(B,)``."""
        return observed_error(self.avatar, self.renderer, self.driving, self.signals, z, self.config)

    def __call__(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and L_obs at ``coordinates (B, D)``, ``(B,)`` each."""
        return self.at_latent(self.latent(coordinates))


def fit_objective(
    avatar: Avatar,
    renderer: Renderer,
    driving: DrivingSignals,
    signals: str | Sequence[str],
    config: FitConfig,
) -> FitObjective:
    """The objective of one signal, or of several at once: L_obs is their sum, and the prior the product of theirs.

    Raises:
        LipflowError: no signal is named, or one is missing.
    """
    names = (signals,) if isinstance(signals, str) else tuple(signals)
    if not names:
        raise LipflowError("no signal to fit to: name at least one of hmc, frontal, keypoints")
    driving = avatar.visible(driving)
    with torch.no_grad():
        prior = avatar.fused_prior(names, driving)
    return FitObjective(avatar, renderer, driving, names, prior, config)
