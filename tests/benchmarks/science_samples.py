"""What the priors of trained avatars are worth as distributions.

Densities of different latent spaces cannot be compared, so all figures are of decoded meshes or do not change under an
invertible map of z:

gap_nats
    E_Q[log q(z|x) - log p(z|h)] / D on held-out frames: what h leaves to be told of z, as the prior sees it.
energy_mm
    Energy score (Gneiting and Raftery, 2007) of meshes decoded from p(z|h): E d(X, x) - E d(X, X') / 2 with d the
    geometry RMSE; a proper score, lower is better.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipflow.checkpoint import load_avatar
from lipflow.metrics import calibration_rms
from lipflow.model.avatar import Avatar
from lipflow.model.gaussian import DiagonalGaussian
from pipeline.loading.loader import ShardSet

_POSTERIOR_SAMPLES = 16
_COMPONENTS = 32


@torch.no_grad()
def uncertainty(scratch: Path, name: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of held-out frames: how well p(z | h) of each signal foretells them."""
    del name
    avatar = load_avatar(scratch / "avatars" / settings["avatar"]).eval()
    opened = ShardSet.open(str(scratch / settings["data"] / "shards"))
    generator = torch.Generator().manual_seed(settings["seed"])
    rows = []
    for frame_id in settings["frames"]:
        batch = opened.frames([frame_id], opened.train_camera_ids[:1])
        posterior = avatar.encode(batch.vertices, batch.average_texture)
        many = DiagonalGaussian(
            posterior.mean.expand(_POSTERIOR_SAMPLES, -1), posterior.log_std.expand(_POSTERIOR_SAMPLES, -1)
        )
        z = many.sample(generator)
        for signal in avatar.signals:
            prior = avatar.fused_prior([signal], batch.driving)
            gap = -posterior.entropy() - avatar.log_prior(z, prior).mean()
            y, _ = avatar.driven_from_latent(posterior.mean)
            meshes = sampled_meshes(avatar, prior, settings["samples"], generator)
            rows.append(
                {
                    "frame_id": frame_id,
                    "signal": signal,
                    "gap_nats": gap.item() / z.shape[-1],
                    "calibration_rms": calibration_rms(y, prior).item(),
                    "energy_mm": energy_score_mm(meshes, batch.vertices[0]).item(),
                    "spread_mm": _distances_mm(meshes, meshes.mean(0, keepdim=True)).mean().item(),
                }
            )
    return rows


def sampled_meshes(avatar: Avatar, prior: DiagonalGaussian, count: int, generator: torch.Generator) -> Tensor:
    """``(count, V, 3)`` mm, decoded from samples of a prior of one frame ``(1, D)``."""
    many = DiagonalGaussian(prior.mean.expand(count, -1), prior.log_std.expand(count, -1))
    return avatar.decode_vertices(avatar.latent_from_driven(many.sample(generator)))


def energy_score_mm(samples: Tensor, truth: Tensor) -> Tensor:
    """Unbiased estimate from S meshes ``(S, V, 3)`` against ``(V, 3)``."""
    count = len(samples)
    apart = _distances_mm(samples, samples).sum() / (count * (count - 1))
    return _distances_mm(samples, truth[None]).mean() - apart / 2


def _distances_mm(first: Tensor, second: Tensor) -> Tensor:
    """``(A, B)`` geometry RMSE of all pairs; the distance of a mesh from itself is 0."""
    flat = torch.cdist(
        first.flatten(1).double(), second.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return flat / first.shape[1] ** 0.5


@torch.no_grad()
def prior_samples(scratch: Path, name: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One row: random meshes of the avatar's prior without any signal, against those of held-out segments."""
    del name
    avatar = load_avatar(scratch / "avatars" / settings["avatar"]).eval()
    opened = ShardSet.open(str(scratch / settings["data"] / "shards"))
    nothing = DiagonalGaussian.standard(torch.zeros(1, avatar.config.latent_size))
    generator = torch.Generator().manual_seed(settings["seed"])
    drawn = sampled_meshes(avatar, nothing, settings["count"], generator)
    real = {split: _meshes(opened, split) for split in ("train", "test")}
    project = _principal_coordinates(real["train"])
    train, held_out, samples = project(real["train"]), project(real["test"]), project(drawn)
    return [
        {
            "frechet_mm": frechet_distance(samples, train).sqrt().item(),
            "held_out_frechet_mm": frechet_distance(samples, held_out).sqrt().item(),
            # How far the held-out frames themselves are from the training frames.
            "real_frechet_mm": frechet_distance(held_out, train).sqrt().item(),
            "spread_mm": samples.var(0).sum().sqrt().item(),
            "real_spread_mm": train.var(0).sum().sqrt().item(),
        }
    ]


def _principal_coordinates(meshes: Tensor) -> Callable[[Tensor], Tensor]:
    """Maps meshes to coordinates ``(N, C)`` in units of which a distance is their RMSE in mm."""
    mean, scale = meshes.mean(0), meshes.shape[1] ** 0.5
    axes = torch.linalg.svd((meshes - mean).flatten(1), full_matrices=False).Vh[: min(_COMPONENTS, len(meshes) - 1)].T
    return lambda found: ((found - mean).flatten(1) @ axes / scale).double()


def frechet_distance(first: Tensor, second: Tensor) -> Tensor:
    """Squared Fréchet distance (Heusel et al., 2017) of Gaussians with the moments of ``(N, C)`` and ``(M, C)``."""
    covariance = torch.cov(first.T), torch.cov(second.T)
    # The trace of the root of a product is the sum of the roots of its eigenvalues, which are not negative.
    roots = torch.linalg.eigvals(covariance[0] @ covariance[1]).real.clamp(min=0).sqrt()
    return (
        (first.mean(0) - second.mean(0)).square().sum() + torch.trace(covariance[0] + covariance[1]) - 2 * roots.sum()
    )


def _meshes(opened: ShardSet, split: str) -> Tensor:
    """``(N, V, 3)`` mm, the tracked meshes of a split."""
    camera = opened.train_camera_ids[:1]
    return torch.cat([opened.frames([frame], camera, signals=()).vertices for frame in opened.frame_ids(split)])
