"""Driving encoders P(y | h): what an impoverished signal says about the face, as a Gaussian over y.

Each sees only its own signal. Absent views and landmarks are masked: what stands in their place has no influence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipflow.config import AvatarConfig
from lipflow.errors import LipflowError
from lipflow.model.blocks import DownTower, NormLinear, leaky
from lipflow.model.context import AvatarContext
from lipflow.model.gaussian import DiagonalGaussian
from lipflow.render.camera import project_through_lens
from lipflow.types import CameraTensors, DrivingSignals, colour_planes, map_tensors

_T = TypeVar("_T")

LOG_STD_RANGE = (-6.0, 3.0)
"""Of every driven prior."""

_IMAGE_CENTRE, _IMAGE_SPREAD = 127.5, 64.0
"""How headset and frontal images (0..255) are normalised until their statistics are measured."""


@dataclass
class SeenViews:
    """Images of C known cameras in B frames.

    Attributes:
        images: ``(B, C, channels, h, w)`` uint8.
        present: ``(B, C)`` bool.
        cameras: ``(B, C, 3, 3)`` and ``(B, C, 3, 4)``.
    """

    images: Tensor
    present: Tensor
    cameras: CameraTensors


@dataclass
class SeenKeypoints:
    """Landmarks in the frontal camera of B frames.

    Attributes:
        keypoints: ``(B, L, 3)`` x_px, y_px, confidence.
        cameras: ``(B, 3, 3)`` and ``(B, 3, 4)``.
    """

    keypoints: Tensor
    cameras: CameraTensors


def headset_views(driving: DrivingSignals) -> SeenViews:
    """The ``hmc`` signal; LipflowError if a part of it is missing."""
    return SeenViews(*_headset_images(driving), _required(driving.hmc_cameras, "hmc_cameras"))


def frontal_view(driving: DrivingSignals) -> SeenViews:
    """The ``frontal`` signal as one view of each frame; LipflowError if a part of it is missing."""
    cameras = map_tensors(_required(driving.frontal_cameras, "frontal_cameras"), lambda tensor: tensor[:, None])
    return SeenViews(*_frontal_images(driving), cameras)


def seen_keypoints(driving: DrivingSignals) -> SeenKeypoints:
    """The ``keypoints`` signal; LipflowError if a part of it is missing."""
    return SeenKeypoints(
        _required(driving.keypoints, "keypoints"), _required(driving.frontal_cameras, "frontal_cameras")
    )


def signal_present(signal: str, driving: DrivingSignals) -> Tensor:
    """``(B,)`` bool: the frames in which ``signal`` shows anything; LipflowError if it is not there at all."""
    if signal == "hmc":
        return _required(driving.hmc_present, "hmc_present").any(-1)
    if signal == "frontal":
        return _required(driving.frontal_present, "frontal_present")
    return (_required(driving.keypoints, "keypoints")[..., 2] > 0).any(-1)


def build_driver(signal: str, config: AvatarConfig, context: AvatarContext) -> nn.Module:
    """The driving encoder of one signal."""
    if signal == "hmc":
        return HeadsetDriver(config, len(context.headset_cameras))
    if signal == "frontal":
        return FrontalDriver(config)
    return KeypointDriver(config, context)


class _ImageNormalizer(nn.Module):
    """Brings images of C fixed cameras to the driver's size, zero mean and unit spread.

    What changes from frame to frame is a small part of such an image: without its mean, which is the same in all of
    them, a driver learns in a fraction of the steps. The statistics are buffers, saved with the weights.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, cameras: int, channels: int, size: int):
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.full((cameras, channels, size, size), _IMAGE_CENTRE))
        self.register_buffer("spread", torch.tensor(_IMAGE_SPREAD))

    def measure(self, images: Tensor, present: Tensor) -> None:
        """Take the statistics of the present images: a mean image for each camera, one spread for all.

        Args:
            images: ``(B, C, channels, h, w)`` uint8.
            present: ``(B, C)`` bool.
        """
        images = _resized(images, self.size)
        present = present[..., None, None, None].to(images.dtype)
        count = present.sum(0)
        mean = (images * present).sum(0) / count.clamp(min=1)
        self.mean.copy_(torch.where(count > 0, mean, _IMAGE_CENTRE))
        squares = ((images - self.mean) * present).square().sum() / (present.sum() * self.mean[0].numel()).clamp(min=1)
        self.spread.copy_(squares.sqrt().clamp(min=1.0))

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, channels, h, w)`` uint8 to ``(B, C, channels, size, size)``."""
        return (_resized(images, self.size) - self.mean) / self.spread


class _GaussianHead(nn.Module):
    """Two layers to mean and clamped log standard deviation."""

    def __init__(self, inputs: int, config: AvatarConfig):
        super().__init__()
        self.fc = NormLinear(inputs, config.driver_hidden_size)
        self.out = NormLinear(config.driver_hidden_size, 2 * config.latent_size, last=True)
        with torch.no_grad():
            self.out.gain.mul_(0.1)  # P starts close to N(0, I)

    def forward(self, feature: Tensor) -> DiagonalGaussian:
        mean, log_std = self.out(leaky(self.fc(feature))).float().chunk(2, -1)
        return DiagonalGaussian(mean, log_std.clamp(*LOG_STD_RANGE))


class HeadsetDriver(nn.Module):
    """Monochrome headset views: one convolution tower for all cameras, a learned embedding of each camera, and the
    mean over the views that are present."""

    def __init__(self, config: AvatarConfig, num_cameras: int):
        super().__init__()
        hidden = config.driver_hidden_size
        self.dropout = config.driver_dropout
        self.normalize = _ImageNormalizer(num_cameras, 1, config.driver_image_size)
        self.tower = DownTower(1, config.driver_image_size, config.driver_channels)
        self.view_fc = NormLinear(self.tower.outputs, hidden)
        self.camera_embedding = nn.Parameter(torch.empty(num_cameras, hidden).normal_(0, 0.1))
        self.camera_fc = NormLinear(hidden, hidden)
        self.head = _GaussianHead(hidden, config)

    def forward(self, driving: DrivingSignals, generator: torch.Generator | None) -> DiagonalGaussian:
        """P(y | h), ``(B, D)``; with a generator, views are hidden at random."""
        images, present = _headset_images(driving)
        feature = self.tower(self.normalize(images).flatten(0, 1))
        feature = self.view_fc(feature).unflatten(0, present.shape) + self.camera_embedding
        feature = leaky(self.camera_fc(leaky(feature)))
        mask = _drop(present, self.dropout, generator)[..., None]
        # where, not a product: an absent view may hold anything.
        feature = torch.where(mask, feature, 0.0).sum(1) / mask.sum(1).clamp(min=1)
        return self.head(feature)

    def measure(self, driving: DrivingSignals) -> None:
        """Take the statistics of the headset images; see :meth:`lipflow.model.avatar.Avatar.measure_driving`."""
        self.normalize.measure(*_headset_images(driving))


class FrontalDriver(nn.Module):
    """One frontal colour image through a convolution tower."""

    def __init__(self, config: AvatarConfig):
        super().__init__()
        self.normalize = _ImageNormalizer(1, 3, config.driver_image_size)
        self.tower = DownTower(3, config.driver_image_size, config.driver_channels)
        self.head = _GaussianHead(self.tower.outputs, config)

    def forward(self, driving: DrivingSignals, generator: torch.Generator | None) -> DiagonalGaussian:
        """P(y | h), ``(B, D)``."""
        del generator  # nothing to hide: without its only image the signal is absent
        return self.head(self.tower(self.normalize(_frontal_images(driving)[0])[:, 0]))

    def measure(self, driving: DrivingSignals) -> None:
        """Take the statistics of the frontal images; see :meth:`lipflow.model.avatar.Avatar.measure_driving`."""
        self.normalize.measure(*_frontal_images(driving))


class KeypointDriver(nn.Module):
    """2-D landmarks as offsets from where the mean mesh projects under the known camera and head pose.

    The offsets are back-projected to millimetres at the landmark's mean depth and divided by the vertex std of the
    capture, so that they do not depend on the image's resolution. Every landmark has weights of its own; a landmark
    that is not seen contributes nothing, and a mask tells so.
    """

    mean_landmarks: Tensor

    def __init__(self, config: AvatarConfig, context: AvatarContext):
        super().__init__()
        mean = torch.from_numpy(context.normalization.vertices_mean[context.landmark_vertices]).float()
        self.register_buffer("mean_landmarks", mean, persistent=False)
        self.unit_mm = float(context.normalization.vertices_std)
        self.dropout = config.driver_dropout
        self.fc = NormLinear(3 * len(mean), config.driver_hidden_size)
        self.head = _GaussianHead(config.driver_hidden_size, config)

    def forward(self, driving: DrivingSignals, generator: torch.Generator | None) -> DiagonalGaussian:
        """P(y | h), ``(B, D)``; with a generator, landmarks are hidden at random."""
        seen = seen_keypoints(driving)
        expected, depth = project_through_lens(self.mean_landmarks, seen.cameras)
        offset = (seen.keypoints[..., :2] - expected) * _mm_per_pixel(seen.cameras.intrinsics, depth)
        offset = offset / self.unit_mm
        confidence = seen.keypoints[..., 2:]
        mask = _drop(confidence[..., 0] > 0, self.dropout, generator)[..., None]
        token = torch.where(mask, torch.cat([offset * confidence, confidence], -1), 0.0)
        return self.head(leaky(self.fc(token.flatten(1))))


def landmark_residuals_mm(landmarks: Tensor, driving: DrivingSignals) -> Tensor:
    """How far predicted landmarks project from the observed keypoints, in mm at their depth.

    Args:
        landmarks: ``(B, L, 3)`` mm, head frame.
        driving: with keypoints and frontal cameras.

    Returns:
        ``(B, L)`` distances; 0 where a keypoint is not seen.
    """
    seen = seen_keypoints(driving)
    pixels, depth = project_through_lens(landmarks, seen.cameras)
    offset = (pixels - seen.keypoints[..., :2]) * _mm_per_pixel(seen.cameras.intrinsics, depth.detach())
    # The root of an exact zero has no finite gradient.
    distance = (offset.square().sum(-1) + 1e-12).sqrt()
    return torch.where(seen.keypoints[..., 2] > 0, distance, 0.0)


def _required(part: _T | None, name: str) -> _T:
    if part is None:
        raise LipflowError(f"the driving signals lack {name}: give them with it, or use another signal")
    return part


def _headset_images(driving: DrivingSignals) -> tuple[Tensor, Tensor]:
    """Images and presence of the headset views: all that a driver sees, without the cameras that a fit needs."""
    return _required(driving.hmc_images, "hmc_images"), _required(driving.hmc_present, "hmc_present")


def _frontal_images(driving: DrivingSignals) -> tuple[Tensor, Tensor]:
    """Images and presence of the frontal camera, as one view of each frame."""
    images = _required(driving.frontal_images, "frontal_images")
    return images[:, None], _required(driving.frontal_present, "frontal_present")[:, None]


def _mm_per_pixel(intrinsics: Tensor, depth: Tensor) -> Tensor:
    focal = torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], -1)
    return depth[..., None] / focal[..., None, :]


def _resized(images: Tensor, size: int) -> Tensor:
    """``(B, C, channels, h, w)`` to float ``(B, C, channels, size, size)``, 0..255."""
    if images.shape[-2:] == (size, size):
        return colour_planes(images)
    flat = F.interpolate(
        colour_planes(images).flatten(0, 1), size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return flat.unflatten(0, images.shape[:2])


def _drop(present: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Hide present entries at random, but never all of a row; without a generator hide none."""
    if generator is None or probability == 0:
        return present
    draw = torch.rand(present.shape, generator=generator, device=generator.device).to(present.device)
    kept = present & (draw >= probability)
    return torch.where(kept.any(-1, keepdim=True), kept, present)
