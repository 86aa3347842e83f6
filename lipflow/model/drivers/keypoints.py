"""The ``keypoints`` signal: 2-D landmarks in the frontal camera, each with a confidence."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lipflow.config import AvatarConfig
from lipflow.model.context import AvatarContext
from lipflow.model.drivers.head import GaussianHead
from lipflow.model.drivers.hiding import hide_at_random
from lipflow.model.drivers.masked_set import MaskedSetEncoder
from lipflow.model.drivers.signal import Driver, Signal, chosen_parts, register, required
from lipflow.model.gaussian import DiagonalGaussian
from lipflow.render.camera import project_through_lens
from lipflow.types import CameraTensors, DrivingSignals


@dataclass
class SeenKeypoints:
    """Landmarks in the frontal camera of B frames.

    Attributes:
        keypoints: ``(B, L, 3)`` x_px, y_px, confidence.
        cameras: ``(B, 3, 3)`` and ``(B, 3, 4)``.
    """

    keypoints: Tensor
    cameras: CameraTensors

    @property
    def present(self) -> Tensor:
        """``(B, L)`` bool."""
        return self.keypoints[..., 2] > 0


class KeypointDriver(Driver):
    """Landmarks as tokens of a :class:`MaskedSetEncoder`, each with an embedding and weights of its own.

    What a seen landmark adds to its embedding is its offset from where the mean mesh projects under the known camera
    and head pose: back-projected to millimetres at the landmark's mean depth and divided by the vertex std of the
    capture, so that it does not depend on the image's resolution; scaled by the confidence, which stands beside it and
    tells a seen landmark in its mean place from a missing one.
    """

    mean_landmarks: Tensor
    nearest_first: Tensor

    def __init__(self, config: AvatarConfig, context: AvatarContext):
        super().__init__()
        self.config = config
        mean = torch.from_numpy(context.normalization.vertices_mean[context.landmark_vertices]).float()
        self.register_buffer("mean_landmarks", mean, persistent=False)
        ranks = torch.cdist(mean, mean).argsort(dim=-1, stable=True).argsort(-1)
        self.register_buffer("nearest_first", ranks, persistent=False)
        self.unit_mm = float(context.normalization.vertices_std)
        count, width = len(mean), config.driver_landmark_size
        self.weight = nn.Parameter(torch.empty(count, 3, width).normal_(0, 0.5))
        self.embedding = nn.Parameter(torch.empty(count, width).normal_(0, 0.1))
        self.landmarks = MaskedSetEncoder(count, width, config.driver_hidden_size)
        self.head = GaussianHead(config.driver_hidden_size, config)

    def forward(self, driving: DrivingSignals, generator: torch.Generator | None) -> DiagonalGaussian:
        """P(y | h), ``(B, D)``; with a generator, landmarks are hidden at random."""
        seen = seen_keypoints(driving)
        mask = hide_at_random(seen.present, self.config, generator, self.nearest_first)
        expected, depth = project_through_lens(self.mean_landmarks, seen.cameras)
        offset = (seen.keypoints[..., :2] - expected) * _mm_per_pixel(seen.cameras.intrinsics, depth) / self.unit_mm
        confidence = seen.keypoints[..., 2:]
        # First of all: whatever stands in place of an unseen landmark, it must not reach a gradient either.
        shown = torch.where(mask[..., None], torch.cat([offset * confidence, confidence], -1), 0.0)
        token = torch.einsum("bli,lio->blo", shown, self.weight) + self.embedding
        return self.head(self.landmarks(token, mask))


class KeypointSignal(Signal):
    """2-D landmarks."""

    name = "keypoints"
    field = "keypoints"

    def offered(self, context: AvatarContext) -> bool:
        """Whether the capture names landmarks."""
        return bool(context.keypoint_names)

    def present(self, driving: DrivingSignals) -> Tensor:
        """``(B,)`` bool: the frames with at least one landmark."""
        return (required(driving.keypoints, "keypoints")[..., 2] > 0).any(-1)

    def driver(self, config: AvatarConfig, context: AvatarContext) -> Driver:
        """A fresh encoder."""
        return KeypointDriver(config, context)

    def visible(self, driving: DrivingSignals, config: AvatarConfig, context: AvatarContext) -> DrivingSignals:
        """Only the landmarks of ``config.keypoints`` have a confidence."""
        if config.keypoints is None:
            return driving
        seen = chosen_parts("keypoints", config.keypoints, context.keypoint_names)
        if driving.keypoints is None:
            return driving
        keypoints = driving.keypoints.clone()
        keypoints[..., 2] *= keypoints.new_tensor(seen)
        return replace(driving, keypoints=keypoints)


def seen_keypoints(driving: DrivingSignals) -> SeenKeypoints:
    """The signal with its cameras; LipflowError if a part of it is missing."""
    return SeenKeypoints(required(driving.keypoints, "keypoints"), required(driving.frontal_cameras, "frontal_cameras"))


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
    # First of all: whatever stands in place of an unseen landmark, it must not reach a gradient either.
    offset = torch.where(seen.present[..., None], pixels - seen.keypoints[..., :2], 0.0)
    offset = offset * _mm_per_pixel(seen.cameras.intrinsics, depth.detach())
    # The root of an exact zero has no finite gradient.
    distance = (offset.square().sum(-1) + 1e-12).sqrt()
    return torch.where(seen.present, distance, 0.0)


def _mm_per_pixel(intrinsics: Tensor, depth: Tensor) -> Tensor:
    focal = torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], -1)
    return depth[..., None] / focal[..., None, :]


register(KeypointSignal())
