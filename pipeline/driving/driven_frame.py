"""The driving signals of one frame, made from its tracked mesh and its average texture; see
:mod:`pipeline.driving.driven`."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from lipflow.errors import CaptureError
from lipflow.types import Camera, Topology
from pipeline.capture import Asset, AssetKind, CaptureFrame
from pipeline.capture_errors import MissingFileError
from pipeline.driving.headset import HeadsetRig, headset_exposure
from pipeline.driving.landmarks import noisy_keypoints, project_landmarks
from pipeline.driving.picture import PictureTaker
from pipeline.images.codecs import decode_any_image, encode_image

if TYPE_CHECKING:
    from pipeline.driving.driven import DrivingConfig

_NOISE_STREAMS = {"headset": 1, "keypoints": 2}


@dataclass(frozen=True)
class DrivingPlan:
    """How the signals of all frames of a capture are made.

    Attributes:
        config: sizes, noise and seed.
        topology: the capture's, with landmarks.
        frontal: the frontal camera; None if there is none.
        rig: the simulated headset; None: the capture's own views, or their absence, are passed through.
        brightness: of the headset's illumination: a factor on the captured colours.
        projects_keypoints: keypoints are projected landmarks; else the capture's own are passed through.
    """

    config: DrivingConfig
    topology: Topology
    frontal: Camera | None
    rig: HeadsetRig | None
    brightness: float
    projects_keypoints: bool


@dataclass(frozen=True)
class DrivenFrame:
    """One frame; implements :class:`pipeline.capture.CaptureFrame`.

    Its mesh and texture are read once, and its headset views are rendered together, at the first call.
    """

    inner: CaptureFrame
    plan: DrivingPlan

    @property
    def segment(self) -> str:
        """As the inner frame's."""
        return self.inner.segment

    @property
    def frame(self) -> str:
        """As the inner frame's."""
        return self.inner.frame

    def vertices(self) -> np.ndarray:
        """As the inner frame's."""
        return self._vertices

    def world_from_head(self) -> np.ndarray:
        """As the inner frame's."""
        return self.inner.world_from_head()

    def average_texture_file(self) -> bytes | None:
        """As the inner frame's."""
        return self._average_texture_file

    def image_file(self, camera_id: str) -> bytes | None:
        """As the inner frame's."""
        return self.inner.image_file(camera_id)

    def view_texture_file(self, camera_id: str) -> bytes | None:
        """As the inner frame's."""
        return self.inner.view_texture_file(camera_id)

    def headset_file(self, camera_id: str) -> bytes | None:
        """The view as a monochrome PNG; None if the frame has no mesh or no average texture.

        Raises:
            CaptureError: the mesh cannot be used, or the texture is not square.
            CodecError: the texture cannot be decoded.
        """
        if self.plan.rig is None:
            return self.inner.headset_file(camera_id)
        return self._headset_files.get(camera_id)

    def keypoints(self) -> np.ndarray | None:
        """``(L, 3)`` float32 x_px, y_px and confidence 0..1; None if the frame has no mesh or no pose.

        Projected ones are those of the frontal camera without its lens distortion.

        Raises:
            CaptureError: the mesh or the pose cannot be used.
        """
        plan = self.plan
        if plan.frontal is None or not plan.projects_keypoints:
            return self.inner.keypoints()
        try:
            mesh, pose = self.vertices(), self.world_from_head()
        except MissingFileError:
            return None
        pixels, visibility = project_landmarks(plan.topology, mesh, plan.frontal, pose)
        return noisy_keypoints(pixels, visibility, plan.config.keypoint_noise_px, self._generator("keypoints"))

    def source_of(self, kind: AssetKind, camera_id: str | None = None) -> str:
        """Where the file lies; of what is made, the mesh that it is made from."""
        if kind == "headset" and self.plan.rig is not None:
            return f"{self.inner.source_of('vertices')} (rendered for {camera_id})"
        if kind == "keypoints" and self.plan.projects_keypoints:
            return f"{self.inner.source_of('vertices')} (projected landmarks)"
        return self.inner.source_of(kind, camera_id)

    def assets(self) -> Iterator[Asset]:
        """As the inner frame's: what is made is no file."""
        return self.inner.assets()

    @cached_property
    def _vertices(self) -> np.ndarray:
        return self.inner.vertices()

    @cached_property
    def _average_texture_file(self) -> bytes | None:
        return self.inner.average_texture_file()

    @cached_property
    def _headset_files(self) -> Mapping[str, bytes]:
        plan, rig, body = self.plan, self.plan.rig, self.average_texture_file()
        if rig is None or body is None:
            return {}
        try:
            mesh = self.vertices()
        except MissingFileError:
            return {}
        texture = decode_texture(body, self.inner.source_of("average_texture"))
        pictures = headset_pictures(plan.topology, mesh, texture, rig, plan.config.supersampling)
        colours = plan.brightness * pictures[..., :3]
        images = headset_exposure(colours, rig, plan.config.headset_noise_std, self._generator("headset"))
        return {camera.camera_id: encode_image(image, "png") for camera, image in zip(rig.cameras, images, strict=True)}

    def _generator(self, signal: str) -> np.random.Generator:
        """Of one signal's noise: a function of the seed and the frame's name."""
        name = zlib.crc32(f"{self.segment}/{self.frame}".encode())
        return np.random.default_rng([self.plan.config.seed, name, _NOISE_STREAMS[signal]])


def decode_texture(body: bytes, source: str) -> np.ndarray:
    """An encoded texture as ``(T, T, 3)`` float32, row 0 is v = 0.

    Raises:
        CaptureError: it is not square.
        CodecError: it cannot be decoded.
    """
    image = decode_any_image(body, source)
    if image.shape[0] != image.shape[1]:
        raise CaptureError(f"{source}: a texture has to be square, found {image.shape[1]} x {image.shape[0]} (W x H)")
    return np.ascontiguousarray(image[::-1], np.float32)


def headset_pictures(
    topology: Topology, vertices: np.ndarray, texture: np.ndarray, rig: HeadsetRig, supersampling: int
) -> np.ndarray:
    """What the rig's cameras would see without lens and housing.

    Args:
        topology: faces and atlas.
        vertices: ``(V, 3)`` mm, head frame.
        texture: ``(T, T, 3)`` float32, row 0 is v = 0.
        rig: the headset.
        supersampling: samples along each axis of a pixel.

    Returns:
        ``(C, h, w, 4)`` float32: colour times coverage, and coverage in 0..1.
    """
    taker = PictureTaker(topology, supersampling)
    return np.stack([taker.take(vertices, texture, camera, np.eye(3, 4)) for camera in rig.cameras])
