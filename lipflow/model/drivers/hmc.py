"""The ``hmc`` signal: monochrome views of the cameras of a headset (head-mounted cameras)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lipflow.config import AvatarConfig
from lipflow.errors import LipflowError
from lipflow.model.blocks import DownTower, NormLinear, leaky
from lipflow.model.context import AvatarContext
from lipflow.model.drivers.head import GaussianHead
from lipflow.model.drivers.hiding import hide_at_random
from lipflow.model.drivers.images import ImageNormalizer, SeenViews
from lipflow.model.drivers.masked_set import MaskedSetEncoder
from lipflow.model.drivers.signal import Driver, Signal, chosen_parts, register, required
from lipflow.model.gaussian import DiagonalGaussian
from lipflow.types import DrivingSignals


class HeadsetDriver(Driver):
    """Any number of views: one convolution tower for all cameras; its features, each with a learned embedding of its
    camera, are the tokens of a :class:`MaskedSetEncoder`."""

    def __init__(self, config: AvatarConfig, num_cameras: int):
        super().__init__()
        hidden = config.driver_hidden_size
        self.config = config
        self.normalize = ImageNormalizer(num_cameras, 1, config.driver_image_size)
        self.tower = DownTower(1, config.driver_image_size, config.driver_channels)
        self.view_fc = NormLinear(self.tower.outputs, hidden)
        self.token_fc = NormLinear(hidden, hidden, last=True)
        self.camera_embedding = nn.Parameter(torch.empty(num_cameras, hidden).normal_(0, 0.1))
        self.views = MaskedSetEncoder(num_cameras, hidden, hidden)
        self.head = GaussianHead(hidden, config)

    def forward(self, driving: DrivingSignals, generator: torch.Generator | None) -> DiagonalGaussian:
        """P(y | h), ``(B, D)``; with a generator, views are hidden at random.

        Raises:
            LipflowError: there are more or fewer cameras than the avatar's headset has.
        """
        images, present = _headset_images(driving)
        if images.shape[1] != len(self.camera_embedding):
            raise LipflowError(
                f"hmc_images has views of {images.shape[1]} cameras, but this avatar's headset has "
                f"{len(self.camera_embedding)}: give one view of each in its order, with hmc_present false where it "
                "is missing"
            )
        mask = hide_at_random(present, self.config, generator)
        feature = leaky(self.view_fc(self.tower(self.normalize(images).flatten(0, 1))))
        feature = self.token_fc(feature).unflatten(0, present.shape)
        # where, not a product: an absent view may hold anything.
        token = torch.where(mask[..., None], feature, 0.0) + self.camera_embedding
        return self.head(self.views(token, mask))

    def measure(self, driving: DrivingSignals) -> None:
        """Take the statistics of the headset images."""
        self.normalize.measure(*_headset_images(driving))


class HeadsetSignal(Signal):
    """The views of a headset's cameras."""

    name = "hmc"
    field = "hmc_images"

    def offered(self, context: AvatarContext) -> bool:
        """Whether the capture has headset cameras."""
        return bool(context.headset_cameras)

    def present(self, driving: DrivingSignals) -> Tensor:
        """``(B,)`` bool: the frames with at least one view."""
        return required(driving.hmc_present, "hmc_present").any(-1)

    def driver(self, config: AvatarConfig, context: AvatarContext) -> Driver:
        """A fresh encoder."""
        return HeadsetDriver(config, len(context.headset_cameras))

    def visible(self, driving: DrivingSignals, config: AvatarConfig, context: AvatarContext) -> DrivingSignals:
        """Only the views of ``config.headset_views`` are present."""
        if config.headset_views is None:
            return driving
        names = [camera.camera_id for camera in context.headset_cameras]
        seen = chosen_parts("headset_views", config.headset_views, names)
        if driving.hmc_present is None:
            return driving
        return replace(driving, hmc_present=driving.hmc_present & driving.hmc_present.new_tensor(seen))


def headset_views(driving: DrivingSignals) -> SeenViews:
    """The signal with its cameras; LipflowError if a part of it is missing."""
    return SeenViews(*_headset_images(driving), required(driving.hmc_cameras, "hmc_cameras"))


def _headset_images(driving: DrivingSignals) -> tuple[Tensor, Tensor]:
    """Images and presence of the views: all that a driver sees, without the cameras that a fit needs."""
    return required(driving.hmc_images, "hmc_images"), required(driving.hmc_present, "hmc_present")


register(HeadsetSignal())
