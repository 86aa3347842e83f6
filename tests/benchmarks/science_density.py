"""Whether a flow tells more of z than a Gaussian does, all else equal: densities of one frozen encoder's codes.

Avatars that were trained each on their own have different latent spaces, and a decoder that was trained beside a
Gaussian prior has made its space Gaussian. So here the codes are those of one trained DAM, and only the drivers, with
or without a flow, are trained, by the likelihood -log p(z | h), z ~ Q(z | x). The weights with the best likelihood of
the validation segments are taken, and the held-out segments tell.

Codes are in units of the standard deviations of Q over all training frames, since drivers start at N(0, I). A flow may
be better for no more than that it decorrelates them, so one Gaussian is given codes in their principal axes.
Densities are those of z itself for all: changes of coordinates are linear, and their log-determinants are added.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipflow.checkpoint import load_avatar
from lipflow.config import AvatarConfig
from lipflow.metrics import calibration_rms
from lipflow.model.avatar import Avatar
from lipflow.model.gaussian import DiagonalGaussian
from lipflow.types import DrivingSignals, FrameBatch, map_tensors
from pipeline.loading.loader import ShardSet

_FRAMES_PER_BATCH = 32
_CHECK_EVERY_STEPS = 25


def density(scratch: Path, name: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of held-out frames, nats per dimension of z, of the drivers of one frozen avatar's codes."""
    del name
    coder = load_avatar(scratch / "avatars" / settings["avatar"]).eval()
    opened = ShardSet.open(str(scratch / settings["data"] / "shards"))
    (signal,) = settings["avatar_changes"]["signals"]
    read = {split: _read(opened, coder, split, signal) for split in ("train", "val", "test")}
    known = read["train"].codes
    centre, covariance = known.mean.mean(0), torch.cov(known.mean.T) + torch.diag((2 * known.log_std).exp().mean(0))
    axes = _whitening(covariance) if settings["whitened"] else torch.diag(covariance.diagonal().rsqrt())
    sets = {split: replace(codes, centre=centre, axes=axes) for split, codes in read.items()}
    nats_of_axes = -torch.linalg.slogdet(axes).logabsdet.item() / len(axes)
    # Nothing is hidden from the drivers: what they may see is the study's subject.
    config = AvatarConfig.model_validate(
        coder.config.model_dump() | {"driver_dropout": 0.0} | settings["avatar_changes"]
    )
    avatar = Avatar(config, coder.context)
    avatar.measure_driving(sets["train"].driving)
    learned = [*avatar.flow.parameters(), *avatar.drivers.parameters()]
    optimizer = torch.optim.Adam(learned, lr=settings["learning_rate"])
    generator = torch.Generator().manual_seed(settings["seed"])
    best, lowest, best_step = copy.deepcopy(avatar.state_dict()), float("inf"), 0
    for step in range(1, settings["steps"] + 1):
        drawn = torch.randperm(len(sets["train"]), generator=generator)[:_FRAMES_PER_BATCH]
        batch = sets["train"].take(drawn)
        loss = _nats(avatar, signal, batch, batch.sample(generator)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        if step % _CHECK_EVERY_STEPS == 0:
            found = _held_out(avatar, signal, sets["val"], settings["seed"]).mean().item()
            if found < lowest:
                best, lowest, best_step = copy.deepcopy(avatar.state_dict()), found, step
    avatar.load_state_dict(best)
    test = sets["test"]
    with torch.no_grad():
        prior = avatar.prior(signal, test.driving)
        y, _ = avatar.driven_from_latent(test.mean, prior)
        calibration = calibration_rms(y, prior)
    held_out = _held_out(avatar, signal, test, settings["seed"])
    return [
        {
            "frame_id": frame,
            "signal": signal,
            "nats": nats + nats_of_axes,
            "calibration_rms": rms,
            "validation_nats": lowest + nats_of_axes,
            "best_step": best_step,
        }
        for frame, nats, rms in zip(test.frame_ids, held_out.tolist(), calibration.tolist(), strict=True)
    ]


def _whitening(covariance: Tensor) -> Tensor:
    """``(D, D)``: to unit variance along the principal axes."""
    variance, axes = torch.linalg.eigh(covariance)
    return axes / variance.sqrt()


@dataclass(frozen=True)
class _Codes:
    """Codes and driving signals of some frames, in coordinates (z - centre) axes."""

    frame_ids: list[str]
    codes: DiagonalGaussian
    driving: DrivingSignals
    centre: Tensor
    axes: Tensor

    def __len__(self) -> int:
        return len(self.frame_ids)

    @property
    def mean(self) -> Tensor:
        """``(B, D)``."""
        return (self.codes.mean - self.centre) @ self.axes

    def sample(self, generator: torch.Generator) -> Tensor:
        """``(B, D)`` of Q."""
        return (self.codes.sample(generator) - self.centre) @ self.axes

    def take(self, index: Tensor) -> _Codes:
        chosen = DiagonalGaussian(self.codes.mean[index], self.codes.log_std[index])
        frames = [self.frame_ids[i] for i in index.tolist()]
        return replace(self, frame_ids=frames, codes=chosen, driving=map_tensors(self.driving, lambda t: t[index]))


@torch.no_grad()
def _read(opened: ShardSet, coder: Avatar, split: str, signal: str) -> _Codes:
    frames = opened.frame_ids(split)
    batch: FrameBatch = opened.frames(frames, opened.train_camera_ids[:1], signals=[signal])
    pieces = [
        coder.encode(batch.vertices[start : start + 8], batch.average_texture[start : start + 8])
        for start in range(0, len(frames), 8)
    ]
    codes = DiagonalGaussian(torch.cat([p.mean for p in pieces]), torch.cat([p.log_std for p in pieces]))
    size = codes.mean.shape[1]
    return _Codes(frames, codes, batch.driving, torch.zeros(size), torch.eye(size))


def _nats(avatar: Avatar, signal: str, codes: _Codes, z: Tensor) -> Tensor:
    """``(B,)`` -log p(z | h) / D."""
    return -avatar.log_prior(z, avatar.prior(signal, codes.driving)) / z.shape[-1]


@torch.no_grad()
def _held_out(avatar: Avatar, signal: str, codes: _Codes, seed: int) -> Tensor:
    """``(B,)`` mean over a few samples of Q, the same ones at every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_nats(avatar, signal, codes, codes.sample(generator)) for _ in range(4)]).mean(0)
