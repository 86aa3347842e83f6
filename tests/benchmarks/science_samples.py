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

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipflow.checkpoint import load_avatar
from lipflow.metrics import calibration_rms
from lipflow.model.gaussian import DiagonalGaussian
from lipflow.sample_metrics import diversity_mm, fit_mesh_pca, frechet_distance, precision_recall
from lipflow.sampling import decode_meshes, draw_driven_latents, draw_latents
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
            y, _ = avatar.driven_from_latent(posterior.mean, prior)
            drawn = draw_driven_latents(avatar, [signal], batch.driving, settings["samples"], generator)
            meshes = decode_meshes(avatar, drawn[:, 0])
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
    generator = torch.Generator().manual_seed(settings["seed"])
    drawn = decode_meshes(avatar, draw_latents(avatar, settings["count"], generator))
    real = {split: _meshes(opened, split) for split in ("train", "test")}
    space = fit_mesh_pca(real["train"], _COMPONENTS)
    train, held_out, samples = (space.project(meshes) for meshes in (real["train"], real["test"], drawn))
    # Equal counts: these figures depend on them.
    covered = precision_recall(train, samples[: len(train)])
    return [
        {
            "frechet_mm2": frechet_distance(samples, train),
            "held_out_frechet_mm2": frechet_distance(samples, held_out),
            # How far the held-out frames themselves are from the training frames.
            "real_frechet_mm2": frechet_distance(held_out, train),
            "precision": covered.precision,
            "recall": covered.recall,
            "diversity_mm": diversity_mm(drawn),
            "real_diversity_mm": diversity_mm(real["train"]),
        }
    ]


def _meshes(opened: ShardSet, split: str) -> Tensor:
    """``(N, V, 3)`` mm, the tracked meshes of a split."""
    camera = opened.train_camera_ids[:1]
    return torch.cat([opened.frames([frame], camera, signals=()).vertices for frame in opened.frame_ids(split)])
