"""Faces drawn from an avatar's prior: at random, or as one signal leaves them open.

    without a signal   y ~ N(0, I), z = f^-1(y)
    with a signal h    y ~ P(. | h), z = f^-1(y)

Without a flow z = y, so that ``dam`` draws z ~ N(0, I). For ``dam`` and ``flow-gaussian`` N(0, I) is what training has
matched to all faces. Methods with a driven prior match it where ``LossConfig.no_signal_weight`` asks for it, or in
batches that show no signal; trained without either, their N(0, I) in y is a convention and no model of faces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipflow.model.avatar import Avatar
from lipflow.types import DrivingSignals


@torch.no_grad()
def draw_latents(avatar: Avatar, count: int, generator: torch.Generator) -> Tensor:
    """``(count, D)`` latents z of random faces, without any signal."""
    prior = avatar.prior_without_signal(count)
    return avatar.latent_from_driven(prior.sample(generator), prior)


@torch.no_grad()
def draw_driven_latents(
    avatar: Avatar, signals: Sequence[str], driving: DrivingSignals, count: int, generator: torch.Generator
) -> Tensor:
    """``(count, B, D)`` latents z that the signals of B frames allow: the spread is what they leave open.

    Args:
        avatar: trained.
        signals: whose priors are multiplied; at least one.
        driving: with those signals.
        count: draws a frame.
        generator: of the draws.

    Raises:
        LipflowError: the avatar has no driver for a signal, or ``driving`` lacks it.
    """
    prior = avatar.fused_prior(signals, driving)
    return torch.stack([avatar.latent_from_driven(prior.sample(generator), prior) for _ in range(count)])


@torch.no_grad()
def decode_meshes(avatar: Avatar, z: Tensor, frames_at_once: int = 64) -> Tensor:
    """Meshes ``(..., V, 3)`` in mm of latents ``(..., D)``, a few at a time."""
    meshes = [avatar.decode_vertices(part) for part in z.flatten(0, -2).split(frames_at_once)]
    return torch.cat(meshes).unflatten(0, z.shape[:-1])


def vertex_std_mm(vertices: Tensor) -> Tensor:
    """How far each vertex moves over S draws ``(S, ..., V, 3)``: ``(..., V)`` mm.

    The root of the summed variances (unbiased) of the three axes.
    """
    if len(vertices) < 2:
        raise ValueError(f"a spread needs at least 2 draws, found {len(vertices)}")
    return vertices.double().var(0).sum(-1).sqrt()
