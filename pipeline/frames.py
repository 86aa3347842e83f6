"""From the bytes of a sample's members to arrays. Textures are flipped here, and nowhere else on the way back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lipflow.errors import ShardSetError
from pipeline import storage
from pipeline.codecs import CodecError, decode_array, decode_image
from pipeline.manifest import Manifest, SampleRecord
from pipeline.samples import AVERAGE_TEXTURE, FRAME, KEYPOINTS, VERTICES, headset_suffix, image_suffix

MemberReader = Callable[[int, int], bytes]
"""Reads (offset, size) of a shard."""


@dataclass
class FrameArrays:
    """One decoded frame with some of its views.

    Attributes:
        vertices: ``(V, 3)`` float32 mm.
        average_texture: ``(3, T, T)`` uint8, row 0 is v = 0.
        world_from_head: ``(3, 4)`` float64.
        images: ``(K, 3, H, W)`` uint8; zero where the view is missing.
        view_present: ``(K,)`` bool.
        headset: ``(C, 1, h, w)`` uint8, or None if it was not asked for.
        headset_present: ``(C,)`` bool.
        frontal: ``(3, H, W)`` uint8, or None if it was not asked for.
        frontal_present: whether the frontal image is there.
        keypoints: ``(L, 3)`` float32; confidence 0 where the frame has none. None if not asked for.
    """

    vertices: np.ndarray
    average_texture: np.ndarray
    world_from_head: np.ndarray
    images: np.ndarray
    view_present: np.ndarray
    headset: np.ndarray | None = None
    headset_present: np.ndarray | None = None
    frontal: np.ndarray | None = None
    frontal_present: bool = False
    keypoints: np.ndarray | None = None


class FrameReader:
    """Decodes chosen views of a sample; whatever is damaged is an error that names the member.

    Args:
        manifest: of the shard set.
        signals: the driving signals to decode; those that the set lacks are left out.
    """

    def __init__(self, manifest: Manifest, signals: Sequence[str]):
        self._manifest = manifest
        self._codec = str(manifest.config["codec"])
        self.with_headset = "hmc" in signals and bool(manifest.headset_cameras)
        self.with_frontal = "frontal" in signals and manifest.frontal_camera_id is not None
        has_points = bool(manifest.keypoint_names) and manifest.frontal_camera_id is not None
        self.with_keypoints = "keypoints" in signals and has_points

    def read(self, sample: SampleRecord, read: MemberReader, camera_ids: Sequence[str | None]) -> FrameArrays:
        """Decode a frame.

        Args:
            sample: which frame.
            read: reads its shard.
            camera_ids: the views; None for padding.

        Raises:
            ShardSetError: a member is absent or damaged.
        """
        height, width = self._manifest.image_size_hw
        images = np.zeros((len(camera_ids), 3, height, width), np.uint8)
        present = np.zeros(len(camera_ids), bool)
        decoded: dict[str, np.ndarray | None] = {}
        for place, camera_id in enumerate(camera_ids):
            if camera_id is None:
                continue
            image = decoded[camera_id] = self._image(sample, read, camera_id)
            if image is not None:
                images[place], present[place] = image, True
        vertices, texture = mesh_and_texture(sample, read)
        frame = FrameArrays(vertices, texture, _head_pose(sample, read), images, present)
        frontal_id = self._manifest.frontal_camera_id
        if self.with_frontal and frontal_id is not None:
            image = decoded[frontal_id] if frontal_id in decoded else self._image(sample, read, frontal_id)
            frame.frontal_present = image is not None
            frame.frontal = image if image is not None else np.zeros((3, height, width), np.uint8)
        if self.with_headset:
            frame.headset, frame.headset_present = self._headset(sample, read)
        if self.with_keypoints:
            frame.keypoints = self._keypoints(sample, read)
        return frame

    def _image(self, sample: SampleRecord, read: MemberReader, camera_id: str) -> np.ndarray | None:
        suffix = image_suffix(camera_id, self._codec)
        if suffix not in sample.members:
            return None
        image = _image_member(sample, read, suffix)
        if image.shape[:2] != tuple(self._manifest.image_size_hw):
            raise ShardSetError(f"{sample.frame_id}.{suffix}: {image.shape[:2]} pixels (H, W), not as the manifest")
        return image.transpose(2, 0, 1)

    def _headset(self, sample: SampleRecord, read: MemberReader) -> tuple[np.ndarray, np.ndarray]:
        cameras = self._manifest.headset_cameras
        height, width = cameras[0].image_size_hw
        images, present = np.zeros((len(cameras), 1, height, width), np.uint8), np.zeros(len(cameras), bool)
        for place, camera in enumerate(cameras):
            suffix = headset_suffix(camera.camera_id)
            if suffix in sample.members:
                images[place, 0] = _image_member(sample, read, suffix, mono=True)
                present[place] = True
        return images, present

    def _keypoints(self, sample: SampleRecord, read: MemberReader) -> np.ndarray:
        expected = (len(self._manifest.keypoint_names), 3)
        if KEYPOINTS not in sample.members:
            return np.zeros(expected, np.float32)
        points = _array_member(sample, read, KEYPOINTS)
        if points.shape != expected:
            raise ShardSetError(f"{sample.frame_id}.{KEYPOINTS}: shape {points.shape}, expected {expected}")
        return points.astype(np.float32, copy=False)


def _head_pose(sample: SampleRecord, read: MemberReader) -> np.ndarray:
    try:
        pose = np.array(json.loads(_member(sample, read, FRAME))["world_from_head"], np.float64)
    except (ValueError, KeyError, TypeError) as error:
        raise ShardSetError(f"{sample.frame_id}.{FRAME}: no head pose ({error}); shard the capture again") from error
    if pose.shape != (3, 4):
        raise ShardSetError(f"{sample.frame_id}.{FRAME}: a head pose of shape {pose.shape}, expected (3, 4)")
    return pose


def mesh_and_texture(sample: SampleRecord, read: MemberReader) -> tuple[np.ndarray, np.ndarray]:
    """``(V, 3)`` float32 vertices in mm and the ``(3, T, T)`` uint8 average texture, row 0 is v = 0."""
    vertices = _array_member(sample, read, VERTICES)
    texture = _image_member(sample, read, AVERAGE_TEXTURE)
    return vertices, np.ascontiguousarray(texture[::-1].transpose(2, 0, 1))


def read_mesh_and_texture(shard_uri: str, sample: SampleRecord) -> tuple[np.ndarray, np.ndarray]:
    """Texture ``(3, T, T)`` uint8 and vertices ``(V, 3)`` of one frame of a shard, by range requests."""
    vertices, texture = mesh_and_texture(sample, lambda offset, size: storage.read_range(shard_uri, offset, size))
    return texture, vertices


def _member(sample: SampleRecord, read: MemberReader, suffix: str) -> bytes:
    if suffix not in sample.members:
        raise ShardSetError(f"{sample.frame_id}: the sample has no {suffix}; shard the capture again")
    return read(*sample.members[suffix])


def _array_member(sample: SampleRecord, read: MemberReader, suffix: str) -> np.ndarray:
    body, name = _member(sample, read, suffix), f"{sample.frame_id}.{suffix}"
    try:
        return decode_array(body, name)
    except CodecError as error:
        raise ShardSetError(f"{error}; the shard is damaged, fetch it or shard again") from error


def _image_member(sample: SampleRecord, read: MemberReader, suffix: str, *, mono: bool = False) -> np.ndarray:
    body, name = _member(sample, read, suffix), f"{sample.frame_id}.{suffix}"
    try:
        return decode_image(body, name, "L" if mono else "RGB")
    except CodecError as error:
        raise ShardSetError(f"{error}; the shard is damaged, fetch it or shard again") from error
