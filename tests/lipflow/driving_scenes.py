"""Driving signals with parts taken out or replaced, and what drivers make of them."""

from __future__ import annotations

import torch

from lipflow.model.gaussian import DiagonalGaussian
from lipflow.types import DrivingSignals, map_tensors

SIGNALS = ("hmc", "frontal", "keypoints")


def same(first: DiagonalGaussian, second: DiagonalGaussian) -> bool:
    """Bit for bit."""
    return torch.equal(first.mean, second.mean) and torch.equal(first.log_std, second.log_std)


def copied(driving: DrivingSignals) -> DrivingSignals:
    return map_tensors(driving, torch.Tensor.clone)


def without(driving: DrivingSignals, signal: str, frame: int, part: int) -> DrivingSignals:
    """One view or landmark, or the only image, marked absent."""
    driving = copied(driving)
    if signal == "hmc":
        driving.hmc_present[frame, part] = False
    elif signal == "frontal":
        driving.frontal_present[frame] = False
    else:
        driving.keypoints[frame, part, 2] = 0
    return driving


def refilled(driving: DrivingSignals, signal: str, frame: int, part: int) -> DrivingSignals:
    """Something else in the same place; for landmarks not even a number."""
    driving = copied(driving)
    if signal == "hmc":
        driving.hmc_images[frame, part] = 255 - driving.hmc_images[frame, part]
    elif signal == "frontal":
        driving.frontal_images[frame] = 255 - driving.frontal_images[frame]
    else:
        driving.keypoints[frame, part, :2] = torch.nan if driving.keypoints[frame, part, 2] == 0 else 30.0
    return driving
