"""One frame of a capture as the members of a WebDataset sample (DESIGN, section 4).

::

    SEG/FRAME.verts.npy.zst       (V, 3) float32 mm, head frame
    SEG/FRAME.avgtex.png          average texture, row 0 is v = 1
    SEG/FRAME.keypoints.npy.zst   (L, 3) float32 x_px, y_px, confidence; pixels of the stored frontal image
    SEG/FRAME.hmc-NAME.png        headset views, monochrome
    SEG/FRAME.CAMERA.image.png    camera images, at the stored size
    SEG/FRAME.CAMERA.tex.png      textures unwrapped from one camera, where they are stored
    SEG/FRAME.frame.json          ids, head pose, what is present
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from lipflow.errors import CaptureError
from lipflow.render.camera import cam_from_head_tensor
from lipflow.render.unwrap import Unwrapper
from lipflow.types import Camera, CameraTensors
from pipeline.capture import Capture, CaptureFrame
from pipeline.codecs import (
    EXTENSION_OF_CODEC,
    CodecError,
    ImageCodec,
    ResizeFilter,
    decode_any_image,
    encode_array,
    encode_image,
    is_plain_png,
    resize_image,
)
from pipeline.manifest import SkippedFile
from pipeline.tar import check_member_name

VERTICES, AVERAGE_TEXTURE, KEYPOINTS, FRAME = "verts.npy.zst", "avgtex.png", "keypoints.npy.zst", "frame.json"


@dataclass(frozen=True)
class SampleSettings:
    """How frames are stored; part of a shard's task.

    Attributes:
        image_size_hw: of the stored camera images.
        texture_size: of the stored textures.
        codec: of the camera images and view textures.
        quality: of a lossy codec.
        resize_filter: for images and textures.
        store_view_textures: whether textures of single cameras are stored.
        unwrap_camera_ids: the cameras from which a missing average texture is made; held-out ones are not among
            them, so that nothing of their images reaches the encoder.
        on_error: what a corrupt file does.
    """

    image_size_hw: tuple[int, int]
    texture_size: int
    codec: ImageCodec
    quality: int
    resize_filter: ResizeFilter
    store_view_textures: bool
    unwrap_camera_ids: tuple[str, ...]
    on_error: Literal["fail", "skip"]


def image_suffix(camera_id: str, codec: str) -> str:
    """The member of a camera's image, such as ``400029.image.png``."""
    return f"{camera_id}.image.{EXTENSION_OF_CODEC[codec]}"


def view_texture_suffix(camera_id: str, codec: str) -> str:
    """The member of a camera's unwrapped texture."""
    return f"{camera_id}.tex.{EXTENSION_OF_CODEC[codec]}"


def headset_suffix(camera_id: str) -> str:
    """The member of a headset view."""
    return f"hmc-{camera_id}.png"


@dataclass
class FrameSample:
    """One frame on its way into a shard; what turned out to be missing is known once the members were drawn."""

    frame_id: str
    members: Iterator[tuple[str, bytes]]
    missing_views: list[str] = field(default_factory=list)


class SampleEncoder:
    """Turns frames of one capture into members, and collects the files that could not be used.

    Args:
        capture: where the frames come from.
        settings: how they are stored.
    """

    def __init__(self, capture: Capture, settings: SampleSettings):
        self.capture = capture
        self.settings = settings
        self.skipped: list[SkippedFile] = []
        self._cameras = {camera.camera_id: camera for camera in capture.cameras}

    def sample(self, segment: str, frame: str) -> FrameSample | None:
        """The sample of a frame; None if its mesh, pose or texture is corrupt and the policy is to skip.

        Raises:
            CaptureError: a file is corrupt and the policy is to fail.
        """
        source = self.capture.frame(segment, frame)
        frame_id = f"{segment}/{frame}"
        try:
            vertices = np.asarray(source.vertices(), np.float32)
            pose = np.asarray(source.world_from_head(), np.float64)
            texture, texture_facts = self._average_texture(source, frame_id, vertices, pose)
        except (CaptureError, CodecError) as error:
            self._skip_or_raise(f"frame {frame_id}", error)
            return None
        facts = {"segment": segment, "frame": frame, "world_from_head": pose.tolist(), **texture_facts}
        sample = FrameSample(frame_id, iter(()))
        sample.members = self._members(source, sample, vertices, texture, facts)
        return sample

    def _members(
        self, source: CaptureFrame, sample: FrameSample, vertices: np.ndarray, texture: bytes, facts: dict
    ) -> Iterator[tuple[str, bytes]]:
        for suffix, body in self._all_members(source, sample, vertices, texture, facts):
            check_member_name(sample.frame_id, suffix)
            yield suffix, body

    def _all_members(
        self, source: CaptureFrame, sample: FrameSample, vertices: np.ndarray, texture: bytes, facts: dict
    ) -> Iterator[tuple[str, bytes]]:
        yield VERTICES, encode_array(vertices)
        yield AVERAGE_TEXTURE, texture
        keypoints = self._keypoints(source, sample.frame_id)
        if keypoints is not None:
            yield KEYPOINTS, encode_array(keypoints)
        headset = []
        for camera in self.capture.headset_cameras:
            body = self._headset(source, camera, sample.frame_id)
            if body is not None:
                headset.append(camera.camera_id)
                yield headset_suffix(camera.camera_id), body
        present = []
        for camera in self.capture.cameras:
            body = self._image(source, camera, sample.frame_id)
            if body is None:
                sample.missing_views.append(camera.camera_id)
                continue
            present.append(camera.camera_id)
            yield image_suffix(camera.camera_id, self.settings.codec), body
        if self.settings.store_view_textures:
            for camera in self.capture.cameras:
                body = self._view_texture(source, camera, sample.frame_id)
                if body is not None:
                    yield view_texture_suffix(camera.camera_id, self.settings.codec), body
        facts |= {"cameras": present, "headset_cameras": headset, "keypoints": keypoints is not None}
        yield FRAME, json.dumps(facts, sort_keys=True).encode()

    def _image(self, source: CaptureFrame, camera: Camera, frame_id: str) -> bytes | None:
        name = f"image of camera {camera.camera_id}, frame {frame_id}"
        try:
            body = source.image_file(camera.camera_id)
            if body is None:
                return None
            image = self._decode(body, name, camera.image_size_hw)
        except (CaptureError, CodecError) as error:
            self._skip_or_raise(name, error)
            return None
        return self._encode(image, body, self.settings.image_size_hw)

    def _view_texture(self, source: CaptureFrame, camera: Camera, frame_id: str) -> bytes | None:
        name = f"texture of camera {camera.camera_id}, frame {frame_id}"
        try:
            body = source.view_texture_file(camera.camera_id)
            if body is None:
                return None
            image = self._decode(body, name, None)
        except (CaptureError, CodecError) as error:
            self._skip_or_raise(name, error)
            return None
        return self._encode(image, body, (self.settings.texture_size, self.settings.texture_size))

    def _headset(self, source: CaptureFrame, camera: Camera, frame_id: str) -> bytes | None:
        name = f"headset view {camera.camera_id}, frame {frame_id}"
        try:
            body = source.headset_file(camera.camera_id)
            if body is None:
                return None
            image = decode_any_image(body, name, "L")
            _check_size(image, name, camera.image_size_hw)
        except (CaptureError, CodecError) as error:
            self._skip_or_raise(name, error)
            return None
        return body if is_plain_png(body, "L") else encode_image(image, "png")

    def _keypoints(self, source: CaptureFrame, frame_id: str) -> np.ndarray | None:
        frontal = self._cameras.get(self.capture.frontal_camera_id or "")
        if frontal is None or not self.capture.keypoint_names:
            return None
        try:
            points = source.keypoints()
        except CaptureError as error:
            self._skip_or_raise(f"keypoints of frame {frame_id}", error)
            return None
        if points is None:
            return None
        height, width = frontal.image_size_hw
        scale = [self.settings.image_size_hw[1] / width, self.settings.image_size_hw[0] / height, 1.0]
        return (np.asarray(points, np.float64) * scale).astype(np.float32)

    def _average_texture(
        self, source: CaptureFrame, frame_id: str, vertices: np.ndarray, pose: np.ndarray
    ) -> tuple[bytes, dict]:
        name = f"average texture of frame {frame_id}"
        size = (self.settings.texture_size, self.settings.texture_size)
        body: bytes | None = None
        try:
            body = source.average_texture_file()
            if body is not None:
                image = decode_any_image(body, name)
                if image.shape[:2] == size and is_plain_png(body, "RGB"):
                    return body, {"average_texture": "capture"}
                resized = resize_image(image, size, self.settings.resize_filter)
                return encode_image(resized, "png"), {"average_texture": "capture"}
        except (CaptureError, CodecError) as error:
            self._skip_or_raise(name, error)
        unwrapped, seen_fraction = self._unwrap(source, frame_id, vertices, pose)
        facts = {"average_texture": "unwrapped", "texture_seen_fraction": seen_fraction}
        return encode_image(np.ascontiguousarray(unwrapped[::-1]), "png"), facts

    @cached_property
    def _unwrapper(self) -> Unwrapper:
        return Unwrapper(self.capture.topology, self.settings.texture_size)

    def _unwrap(
        self, source: CaptureFrame, frame_id: str, vertices: np.ndarray, pose: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """Average texture ``(T, T, 3)`` uint8, row 0 is v = 0, and the fraction of the atlas that was seen.

        One camera is in memory at a time. Texels that no camera sees get the mean colour of the others.
        """
        size = self.settings.texture_size
        total, weights = torch.zeros(3, size, size), torch.zeros(size, size)
        mesh = torch.from_numpy(vertices)
        for camera_id in self.settings.unwrap_camera_ids:
            camera = self._cameras[camera_id]
            name = f"image of camera {camera_id}, frame {frame_id}"
            try:
                body = source.image_file(camera_id)
                if body is None:
                    continue
                image = self._decode(body, name, camera.image_size_hw)
            except (CaptureError, CodecError):
                if self.settings.on_error == "fail":
                    raise
                continue
            cameras = CameraTensors(
                torch.from_numpy(camera.intrinsics).float()[None],
                cam_from_head_tensor(camera.cam_from_world, pose)[None],
            )
            pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float()[None]
            texture, weight = self._unwrapper.unwrap(mesh, pixels, cameras)
            total += texture[0] * weight
            weights += weight[0]
        seen = weights > 0
        if not seen.any():
            raise CaptureError(f"frame {frame_id}: no average texture, and no image from which to make one")
        average = total / weights.clamp(min=1e-8)
        average = torch.where(seen, average, average[:, seen].mean(1)[:, None, None])
        covered = self._unwrapper.covered
        fraction = float((seen & covered).sum() / covered.sum())
        return average.round().clamp(0, 255).byte().permute(1, 2, 0).numpy(), fraction

    def _decode(self, body: bytes, name: str, size_hw: tuple[int, int] | None) -> np.ndarray:
        image = decode_any_image(body, name)
        if size_hw is not None:
            _check_size(image, name, size_hw)
        return image

    def _encode(self, image: np.ndarray, body: bytes, size_hw: tuple[int, int]) -> bytes:
        settings = self.settings
        if settings.codec == "png" and image.shape[:2] == tuple(size_hw) and is_plain_png(body, "RGB"):
            return body
        return encode_image(resize_image(image, size_hw, settings.resize_filter), settings.codec, settings.quality)

    def _skip_or_raise(self, name: str, error: CaptureError | CodecError) -> None:
        if self.settings.on_error == "fail":
            raise CaptureError(
                f"{self.capture.uri}: {error}; fetch that file again, or set on_error=skip to leave it out"
            ) from error
        self.skipped.append(SkippedFile(path=name, reason=str(error)))


def _check_size(image: np.ndarray, name: str, size_hw: tuple[int, int]) -> None:
    if image.shape[:2] != tuple(size_hw):
        found, expected = "x".join(map(str, image.shape[1::-1])), "x".join(map(str, size_hw[::-1]))
        raise CodecError(f"{name}: {found} pixels (W x H), but its camera is calibrated for {expected}")
