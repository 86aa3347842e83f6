"""A signal of one's own, in one file: how far apart two landmarks are, in pixels. The drivers' tests add it."""

from __future__ import annotations

import torch
from torch import Tensor

from lipflow.config import AvatarConfig
from lipflow.model.context import AvatarContext
from lipflow.model.drivers.head import GaussianHead
from lipflow.model.drivers.signal import Driver, Signal, register
from lipflow.model.gaussian import DiagonalGaussian
from lipflow.types import DrivingSignals


class OpeningDriver(Driver):
    def __init__(self, config: AvatarConfig):
        super().__init__()
        self.head = GaussianHead(1, config)

    def forward(self, driving: DrivingSignals, generator: torch.Generator | None) -> DiagonalGaussian:
        first, second = driving.keypoints[:, 0], driving.keypoints[:, 1]
        return self.head((first - second)[:, :2].norm(dim=-1, keepdim=True))


class OpeningSignal(Signal):
    name = "lip-opening"
    field = "keypoints"

    def offered(self, context: AvatarContext) -> bool:
        return len(context.keypoint_names) >= 2

    def present(self, driving: DrivingSignals) -> Tensor:
        return (driving.keypoints[:, :2, 2] > 0).all(-1)

    def driver(self, config: AvatarConfig, context: AvatarContext) -> Driver:
        return OpeningDriver(config)


register(OpeningSignal())
