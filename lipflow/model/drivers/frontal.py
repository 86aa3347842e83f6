"""The ``frontal`` signal: one colour image of the declared frontal camera."""

from __future__ import annotations

import torch
from torch import Tensor

from lipflow.config import AvatarConfig
from lipflow.model.blocks import DownTower
from lipflow.model.context import AvatarContext
from lipflow.model.drivers.head import GaussianHead
from lipflow.model.drivers.images import ImageNormalizer, SeenViews
from lipflow.model.drivers.signal import Driver, Signal, register, required
from lipflow.model.gaussian import DiagonalGaussian
from lipflow.types import DrivingSignals, map_tensors


class FrontalDriver(Driver):
    """One frontal colour image through a convolution tower."""

    def __init__(self, config: AvatarConfig):
        super().__init__()
        self.normalize = ImageNormalizer(1, 3, config.driver_image_size)
        self.tower = DownTower(3, config.driver_image_size, config.driver_channels)
        self.head = GaussianHead(self.tower.outputs, config)

    def forward(self, driving: DrivingSignals, generator: torch.Generator | None) -> DiagonalGaussian:
        """P(y | h), ``(B, D)``."""
        del generator  # nothing to hide: without its only image the signal is absent
        return self.head(self.tower(self.normalize(_frontal_images(driving)[0])[:, 0]))

    def measure(self, driving: DrivingSignals) -> None:
        """Take the statistics of the frontal images."""
        self.normalize.measure(*_frontal_images(driving))


class FrontalSignal(Signal):
    """One frontal image."""

    name = "frontal"
    field = "frontal_images"

    def offered(self, context: AvatarContext) -> bool:
        """Whether the capture declares a frontal camera."""
        return context.frontal_image_hw is not None

    def present(self, driving: DrivingSignals) -> Tensor:
        """``(B,)`` bool: the frames that have the image."""
        return required(driving.frontal_present, "frontal_present")

    def driver(self, config: AvatarConfig, context: AvatarContext) -> Driver:
        """A fresh encoder."""
        del context
        return FrontalDriver(config)


def frontal_view(driving: DrivingSignals) -> SeenViews:
    """The signal as one view of each frame; LipflowError if a part of it is missing."""
    cameras = map_tensors(required(driving.frontal_cameras, "frontal_cameras"), lambda tensor: tensor[:, None])
    return SeenViews(*_frontal_images(driving), cameras)


def _frontal_images(driving: DrivingSignals) -> tuple[Tensor, Tensor]:
    """Images and presence of the frontal camera, as one view of each frame."""
    images = required(driving.frontal_images, "frontal_images")
    return images[:, None], required(driving.frontal_present, "frontal_present")[:, None]


register(FrontalSignal())
