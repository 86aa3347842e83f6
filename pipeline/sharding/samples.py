"""One frame of a capture as the members of a WebDataset sample (DESIGN, section 4).

::

    SEG/FRAME.verts.npy.zst       (V, 3) float32 mm, head frame
    SEG/FRAME.avgtex.plz          average texture, row 0 is v = 1; lossless, see pipeline.images.planar (or .png, .webp)
    SEG/FRAME.keypoints.npy.zst   (L, 3) float32 x_px, y_px, confidence; pixels of the stored frontal image
    SEG/FRAME.hmc-NAME.png        headset views, monochrome
    SEG/FRAME.CAMERA.image.png    camera images, at the stored size
    SEG/FRAME.CAMERA.tex.png      textures unwrapped from one camera, RGBA, where they are stored
    SEG/FRAME.frame.json          ids, head pose, what is present
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np

from lipflow.errors import CaptureError
from lipflow.render.unwrap import TextureAverage
from lipflow.types import Camera
from pipeline.capture import Capture, CaptureFrame
from pipeline.capture_errors import check_image_size
from pipeline.images.codecs import (
    EXTENSION_OF_CODEC,
    Chroma,
    CodecError,
    ImageCodec,
    LosslessCodec,
    ResizeFilter,
    decode_any_image,
    encode_array,
    encode_image,
    is_plain_png,
    resize_image,
)
from pipeline.manifest import SkippedFile
from pipeline.sharding.segment_names import stored_segment
from pipeline.sharding.tar import check_member_name
from pipeline.sharding.undistort import Undistorter
from pipeline.unwrapping import FrameUnwrapper

_Read = TypeVar("_Read")

VERTICES, KEYPOINTS, FRAME = "verts.npy.zst", "keypoints.npy.zst", "frame.json"


@dataclass(frozen=True)
class SampleSettings:
    """How frames are stored; part of a shard's task.

    Attributes:
        image_size_hw: of the stored camera images.
        texture_size: of the stored textures.
        codec: of the camera images.
        quality: of a lossy codec.
        chroma: sampling of the colour differences of a lossy codec.
        texture_codec: of the average texture; lossless.
        resize_filter: for images and textures.
        store_view_textures: whether textures of single cameras are stored.
        unwrap_camera_ids: the cameras from which a missing average texture is made; held-out ones are not among
            them, so that nothing of their images reaches the encoder.
        capture_name: added to the segments' names, in a set of several captures.
    """

    image_size_hw: tuple[int, int]
    texture_size: int
    codec: ImageCodec
    quality: int
    chroma: Chroma
    texture_codec: LosslessCodec
    resize_filter: ResizeFilter
    store_view_textures: bool
    unwrap_camera_ids: tuple[str, ...]
    capture_name: str | None = None


def image_suffix(camera_id: str, codec: str) -> str:
    """The member of a camera's image, such as ``400029.image.png``."""
    return f"{camera_id}.image.{EXTENSION_OF_CODEC[codec]}"


def average_texture_suffix(codec: str) -> str:
    """The member of the average texture, such as ``avgtex.plz``."""
    return f"avgtex.{EXTENSION_OF_CODEC[codec]}"


def view_texture_suffix(camera_id: str) -> str:
    """The member of a camera's unwrapped texture, RGBA and lossless."""
    return f"{camera_id}.tex.png"


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

    Images of cameras with lens distortion are undistorted: the stored set knows pinhole cameras alone.

    Args:
        capture: where the frames come from.
        settings: how they are stored.

    Attributes:
        skipped: the files that could not be used, each with its address and the reason.
    """

    def __init__(self, capture: Capture, settings: SampleSettings):
        self.capture = capture
        self.settings = settings
        self.skipped: list[SkippedFile] = []
        self._lenses = {camera.camera_id: Undistorter(camera) for camera in capture.cameras}

    def sample(self, segment: str, frame: str) -> FrameSample | None:
        """The sample of a frame; None if its mesh or pose cannot be used, or no average texture can be had."""
        source = self.capture.frame(segment, frame)
        stored_name = stored_segment(segment, self.settings.capture_name)
        frame_id = f"{stored_name}/{frame}"
        vertices = self._attempt(source.source_of("vertices"), source.vertices)
        pose = self._attempt(source.source_of("pose"), source.world_from_head)
        if vertices is None or pose is None:
            return None
        stored = self._average_texture(source)
        if stored is None:
            stored = self._attempt(
                source.source_of("average_texture"), lambda: self._unwrapped_texture(source, vertices, pose)
            )
        if stored is None:
            return None
        texture, texture_facts = stored
        facts = {"segment": stored_name, "frame": frame, "world_from_head": pose.tolist(), **texture_facts}
        sample = FrameSample(frame_id, iter(()))
        sample.members = self._members(source, sample, vertices, texture, facts)
        return sample

    def _attempt(self, path: str, read: Callable[[], _Read | None]) -> _Read | None:
        """What ``read`` returns; None, and an entry among the skipped files, if it finds a fault."""
        try:
            return read()
        except (CaptureError, CodecError) as error:
            self.skipped.append(SkippedFile(path=path, reason=str(error)))
            return None

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
        yield average_texture_suffix(self.settings.texture_codec), texture
        keypoints = self._attempt(source.source_of("keypoints"), lambda: self._keypoints(source))
        if keypoints is not None:
            yield KEYPOINTS, encode_array(keypoints)
        headset = []
        for camera in self.capture.headset_cameras:
            body = self._headset(source, camera)
            if body is not None:
                headset.append(camera.camera_id)
                yield headset_suffix(camera.camera_id), body
        present = []
        for camera in self.capture.cameras:
            body = self._image(source, camera)
            if body is None:
                sample.missing_views.append(camera.camera_id)
                continue
            present.append(camera.camera_id)
            yield image_suffix(camera.camera_id, self.settings.codec), body
        if self.settings.store_view_textures:
            for camera in self.capture.cameras:
                body = self._view_texture(source, camera.camera_id)
                if body is not None:
                    yield view_texture_suffix(camera.camera_id), body
        facts |= {"cameras": present, "headset_cameras": headset, "keypoints": keypoints is not None}
        yield FRAME, json.dumps(facts, sort_keys=True).encode()

    def _image(self, source: CaptureFrame, camera: Camera) -> bytes | None:
        path = source.source_of("image", camera.camera_id)

        def encoded() -> bytes | None:
            body = source.image_file(camera.camera_id)
            if body is None:
                return None
            image = decode_any_image(body, path)
            check_image_size(image.shape[:2], camera, path)
            if camera.distortion.any():
                return self._encode(self._lenses[camera.camera_id].apply(image), None, self.settings.image_size_hw)
            return self._encode(image, body, self.settings.image_size_hw)

        return self._attempt(path, encoded)

    def _view_texture(self, source: CaptureFrame, camera_id: str) -> bytes | None:
        path = source.source_of("view_texture", camera_id)

        def encoded() -> bytes | None:
            body = source.view_texture_file(camera_id)
            if body is None:
                return None
            # Alpha is 0 where the camera does not see the texel.
            image = decode_any_image(body, path, "RGBA")
            if image.shape[:2] == self._texture_size_hw and is_plain_png(body, "RGBA"):
                return body
            return encode_image(resize_image(image, self._texture_size_hw, self.settings.resize_filter), "png")

        return self._attempt(path, encoded)

    def _headset(self, source: CaptureFrame, camera: Camera) -> bytes | None:
        path = source.source_of("headset", camera.camera_id)

        def encoded() -> bytes | None:
            body = source.headset_file(camera.camera_id)
            if body is None:
                return None
            image = decode_any_image(body, path, "L")
            check_image_size(image.shape[:2], camera, path)
            return body if is_plain_png(body, "L") else encode_image(image, "png")

        return self._attempt(path, encoded)

    def _keypoints(self, source: CaptureFrame) -> np.ndarray | None:
        """``(L, 3)`` in pixels of the stored frontal image; None where there is none."""
        frontal = next((c for c in self.capture.cameras if c.camera_id == self.capture.frontal_camera_id), None)
        if frontal is None or not self.capture.keypoint_names:
            return None
        points = source.keypoints()
        if points is None:
            return None
        height, width = frontal.image_size_hw
        scale = [self.settings.image_size_hw[1] / width, self.settings.image_size_hw[0] / height, 1.0]
        return (np.asarray(points, np.float64) * scale).astype(np.float32)

    def _average_texture(self, source: CaptureFrame) -> tuple[bytes, dict] | None:
        """The capture's own, at the stored size; None if it has none that can be used."""
        path = source.source_of("average_texture")

        def encoded() -> tuple[bytes, dict] | None:
            body = source.average_texture_file()
            if body is None:
                return None
            codec = self.settings.texture_codec
            image = decode_any_image(body, path)
            if codec != "png" or image.shape[:2] != self._texture_size_hw or not is_plain_png(body, "RGB"):
                body = encode_image(resize_image(image, self._texture_size_hw, self.settings.resize_filter), codec)
            return body, {"average_texture": "capture"}

        return self._attempt(path, encoded)

    @property
    def _texture_size_hw(self) -> tuple[int, int]:
        return self.settings.texture_size, self.settings.texture_size

    @cached_property
    def _unwrapper(self) -> FrameUnwrapper:
        return FrameUnwrapper(self.capture, self.settings.texture_size, self.settings.unwrap_camera_ids)

    def _unwrapped_texture(self, source: CaptureFrame, vertices: np.ndarray, pose: np.ndarray) -> tuple[bytes, dict]:
        """Made from the images of the training cameras, one in memory at a time.

        Images that cannot be used are passed over: they are reported where they are stored.

        Raises:
            CaptureError: no camera sees anything of the atlas.
        """
        surface = self._unwrapper.surface(vertices)
        total = TextureAverage(3, self.settings.texture_size)
        for camera_id in self.settings.unwrap_camera_ids:
            try:
                view = self._unwrapper.read(source, camera_id, surface, pose)
            except (CaptureError, CodecError):
                continue
            if view is not None:
                total.add(*view)
        average, seen = total.mean()
        if not seen.any():
            raise CaptureError("no average texture, and no image from which to make one")
        facts = {"average_texture": "unwrapped", "texture_seen_fraction": self._unwrapper.seen_fraction(seen)}
        rows = average.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()[::-1]
        return encode_image(np.ascontiguousarray(rows), self.settings.texture_codec), facts

    def _encode(self, image: np.ndarray, body: bytes | None, size_hw: tuple[int, int]) -> bytes:
        """``image`` as it is stored; the captured ``body`` itself where that is the same."""
        settings = self.settings
        if (
            body is not None
            and settings.codec == "png"
            and image.shape[:2] == tuple(size_hw)
            and is_plain_png(body, "RGB")
        ):
            return body
        resized = resize_image(image, size_hw, settings.resize_filter)
        return encode_image(resized, settings.codec, settings.quality, settings.chroma)
