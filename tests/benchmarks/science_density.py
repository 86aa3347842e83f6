"""Whether a flow tells more of z than a Gaussian does, all else equal: densities of one frozen encoder's codes.

Avatars that were trained each on their own have different latent spaces, and a decoder that was trained beside a
Gaussian prior has made its space Gaussian. So here the codes are those of one trained DAM, and only the drivers, with
or without a flow, are trained, by the likelihood -log p(z | h), z ~ Q(z | x). The weights with the best likelihood of
the validation segments are taken, and the held-out segments tell.
"""

from __future__ import annotations

import copy
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


def density(scratch: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Rows of held-out frames, nats per dimension of z, of the drivers of one frozen avatar's codes."""
    del name
    coder = load_avatar(scratch / "avatars" / settings["avatar"]).eval()
    opened = ShardSet.open(str(scratch / settings["data"] / "shards"))
    (signal,) = settings["avatar_changes"]["signals"]
    read = {split: _read(opened, coder, split, signal) for split in ("train", "val", "test")}
    # Drivers start at N(0, I): codes of another scale would cost the one without a flow most of its steps.
    centre, scale = read["train"].codes.mean.mean(0), read["train"].codes.mean.std(0)
    sets = {split: codes.standardised(centre, scale) for split, codes in read.items()}
    nats_of_scale = scale.log().mean().item()
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
        loss = _nats(avatar, signal, batch, batch.codes.sample(generator)).mean()
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
        y, _ = avatar.driven_from_latent(test.codes.mean)
        calibration = calibration_rms(y, prior)
    rows = [
        {"frame_id": frame, "signal": signal, "nats": nats + nats_of_scale, "calibration_rms": rms}
        for frame, nats, rms in zip(
            test.frame_ids,
            _held_out(avatar, signal, test, settings["seed"]).tolist(),
            calibration.tolist(),
            strict=True,
        )
    ]
    return {"rows": rows, "best_step": best_step, "validation_nats": lowest + nats_of_scale}


class _Codes:
    """Codes and driving signals of some frames."""

    def __init__(self, frame_ids: list[str], codes: DiagonalGaussian, driving: DrivingSignals):
        self.frame_ids, self.codes, self.driving = frame_ids, codes, driving

    def __len__(self) -> int:
        return len(self.frame_ids)

    def standardised(self, centre: Tensor, scale: Tensor) -> _Codes:
        """In units of ``scale (D,)`` around ``centre (D,)``; densities change by the mean of log scale."""
        codes = DiagonalGaussian((self.codes.mean - centre) / scale, self.codes.log_std - scale.log())
        return _Codes(self.frame_ids, codes, self.driving)

    def take(self, index: Tensor) -> _Codes:
        chosen = DiagonalGaussian(self.codes.mean[index], self.codes.log_std[index])
        return _Codes(
            [self.frame_ids[i] for i in index.tolist()], chosen, map_tensors(self.driving, lambda t: t[index])
        )


@torch.no_grad()
def _read(opened: ShardSet, coder: Avatar, split: str, signal: str) -> _Codes:
    frames = opened.frame_ids(split)
    batch: FrameBatch = opened.frames(frames, opened.train_camera_ids[:1], signals=[signal])
    pieces = [
        coder.encode(batch.vertices[start : start + 8], batch.average_texture[start : start + 8])
        for start in range(0, len(frames), 8)
    ]
    codes = DiagonalGaussian(torch.cat([p.mean for p in pieces]), torch.cat([p.log_std for p in pieces]))
    return _Codes(frames, codes, batch.driving)


def _nats(avatar: Avatar, signal: str, codes: _Codes, z: Tensor) -> Tensor:
    """``(B,)`` -log p(z | h) / D."""
    return -avatar.log_prior(z, avatar.prior(signal, codes.driving)) / z.shape[-1]


@torch.no_grad()
def _held_out(avatar: Avatar, signal: str, codes: _Codes, seed: int) -> Tensor:
    """``(B,)`` mean over a few samples of Q, the same ones at every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_nats(avatar, signal, codes, codes.codes.sample(generator)) for _ in range(4)]).mean(0)
