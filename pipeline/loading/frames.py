"""From the bytes of a sample's members to arrays. Textures are flipped here, and nowhere else on the way back.

The pixels of a batch are decoded straight into one piece of memory, :class:`BatchPixels`: they are written once, and
that memory can be pinned. Camera images lie in it as their codec decodes them: by pixels, or by planes if they are
stored planar. Textures, which are flipped, always lie by planes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from lipflow.errors import ShardSetError
from lipflow.memory import empty
from pipeline.images.codecs import (
    CodecError,
    LosslessCodec,
    decode_array,
    decode_image,
    decode_image_into,
    is_interleaved,
)
from pipeline.manifest import Manifest, SampleRecord
from pipeline.sharding.samples import FRAME, KEYPOINTS, VERTICES, average_texture_suffix, headset_suffix, image_suffix

_NPY_HEADER_BYTES = 1024

MemberReader = Callable[[int, int], bytes | memoryview]
"""Reads (offset, size) of a shard; the bytes are valid until the same thread reads again."""
FramePiece = Callable[[MemberReader], None]
"""Decodes a part of a frame."""


@dataclass
class FramePixels:
    """Where one frame's pixels go, all uint8.

    Attributes:
        images: ``(K, 3, H, W)``, a view of ``(K, H, W, 3)`` memory unless they are stored planar.
        average_texture: ``(3, T, T)``, row 0 is v = 0.
        frontal: ``(3, H, W)`` with memory as that of the images, or None if it is not asked for.
    """

    images: np.ndarray
    average_texture: np.ndarray
    frontal: np.ndarray | None


@dataclass
class BatchPixels:
    """The pixels of a batch before and after they were decoded.

    Attributes:
        images: ``(B, K, 3, H, W)`` uint8, a view of ``(B, K, H, W, 3)`` memory unless they are stored planar.
        average_texture: ``(B, 3, T, T)`` uint8, row 0 is v = 0.
        frontal: ``(B, 3, H, W)`` uint8 with memory as that of the images, or None if it is not asked for.
    """

    images: Tensor
    average_texture: Tensor
    frontal: Tensor | None

    def frame(self, place: int) -> FramePixels:
        """The share of one frame."""
        frontal = None if self.frontal is None else self.frontal[place].numpy()
        return FramePixels(self.images[place].numpy(), self.average_texture[place].numpy(), frontal)


@dataclass
class FrameArrays:
    """What was decoded of one frame besides its pixels.

    Attributes:
        frame_id: of the sample.
        vertices: ``(V, 3)`` float32 mm.
        world_from_head: ``(3, 4)`` float64.
        view_present: ``(K,)`` bool.
        headset: ``(C, 1, h, w)`` uint8, or None if it was not asked for.
        headset_present: ``(C,)`` bool.
        frontal_present: whether the frontal image is there.
        keypoints: ``(L, 3)`` float32; confidence 0 where the frame has none. None if not asked for.
    """

    frame_id: str
    vertices: np.ndarray
    world_from_head: np.ndarray
    view_present: np.ndarray
    headset: np.ndarray | None = None
    headset_present: np.ndarray | None = None
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
        self._average_texture = average_texture_suffix(manifest.texture_codec)
        self.with_headset = "hmc" in signals and bool(manifest.headset_cameras)
        self.with_frontal = "frontal" in signals and manifest.frontal_camera_id is not None
        has_points = bool(manifest.keypoint_names) and manifest.frontal_camera_id is not None
        self.with_keypoints = "keypoints" in signals and has_points

    def allocate(self, frames: int, views: int, *, pinned: bool = False) -> BatchPixels:
        """Memory for a batch of ``frames`` with ``views`` each; ``pinned`` needs CUDA."""
        texture_size = self._manifest.texture_size

        def uint8(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True) if pinned else empty(shape, torch.uint8)

        def images(*shape: int) -> Tensor:
            height, width = self._manifest.image_size_hw
            if is_interleaved(self._codec):
                return uint8(*shape, height, width, 3).movedim(-1, -3)
            return uint8(*shape, 3, height, width)

        return BatchPixels(
            images=images(frames, views),
            average_texture=uint8(frames, 3, texture_size, texture_size),
            frontal=images(frames) if self.with_frontal else None,
        )

    def suffixes(self, camera_ids: Sequence[str | None]) -> Iterator[str]:
        """The members that :meth:`read` looks for, those that a frame may lack among them."""
        frontal_id = self._manifest.frontal_camera_id if self.with_frontal else None
        yield from (VERTICES, self._average_texture, FRAME)
        if self.with_keypoints:
            yield KEYPOINTS
        if self.with_headset:
            yield from (headset_suffix(camera.camera_id) for camera in self._manifest.headset_cameras)
        chosen = dict.fromkeys([*camera_ids, frontal_id])
        yield from (image_suffix(camera_id, self._codec) for camera_id in chosen if camera_id is not None)

    def read(
        self, sample: SampleRecord, read: MemberReader, camera_ids: Sequence[str | None], pixels: FramePixels
    ) -> FrameArrays:
        """Decode a frame.

        Args:
            sample: which frame.
            read: reads its shard.
            camera_ids: the views; None for padding.
            pixels: where its pixels are written; zero where the view is missing.

        Raises:
            ShardSetError: a member is absent or damaged.
        """
        frame, pieces = self.pieces(sample, camera_ids, pixels)
        for piece in pieces:
            piece(read)
        return frame

    def pieces(
        self, sample: SampleRecord, camera_ids: Sequence[str | None], pixels: FramePixels
    ) -> tuple[FrameArrays, list[FramePiece]]:
        """What :meth:`read` does as pieces for any threads, in any order: image by image, then all the rest.

        Returns:
            The frame, whole once all pieces were called, and the pieces, each of which may raise as :meth:`read` does.
        """
        frame = FrameArrays(
            frame_id=sample.frame_id,
            vertices=np.empty((self._manifest.num_vertices, 3), np.float32),
            world_from_head=np.empty((3, 4)),
            view_present=np.zeros(len(camera_ids), bool),
        )
        frontal_id = self._manifest.frontal_camera_id
        pieces: list[FramePiece] = [
            partial(self._view, sample, frame, pixels, place, camera_id) for place, camera_id in enumerate(camera_ids)
        ]
        if pixels.frontal is not None and frontal_id not in camera_ids:
            pieces.append(partial(self._frontal, sample, frame, pixels.frontal))
        pieces.append(partial(self._rest, sample, frame, pixels))
        return frame, pieces

    def _view(
        self,
        sample: SampleRecord,
        frame: FrameArrays,
        pixels: FramePixels,
        place: int,
        camera_id: str | None,
        read: MemberReader,
    ) -> None:
        present = self._image(sample, read, camera_id, pixels.images[place])
        frame.view_present[place] = present
        if pixels.frontal is not None and camera_id is not None and camera_id == self._manifest.frontal_camera_id:
            pixels.frontal[...] = pixels.images[place]
            frame.frontal_present = present

    def _frontal(self, sample: SampleRecord, frame: FrameArrays, target: np.ndarray, read: MemberReader) -> None:
        frame.frontal_present = self._image(sample, read, self._manifest.frontal_camera_id, target)

    def _rest(self, sample: SampleRecord, frame: FrameArrays, pixels: FramePixels, read: MemberReader) -> None:
        _image_member(sample, read, self._average_texture, pixels.average_texture, bottom_up=True)
        frame.vertices[...] = self._vertices(sample, read)
        frame.world_from_head[...] = _head_pose(sample, read)
        if self.with_headset:
            frame.headset, frame.headset_present = self._headset(sample, read)
        if self.with_keypoints:
            frame.keypoints = self._keypoints(sample, read)

    def read_view(self, sample: SampleRecord, read: MemberReader, camera_id: str, target: np.ndarray) -> bool:
        """Decode one view into ``target (3, H, W)`` uint8 of either layout; False, and zeros, if the frame lacks it.

        Raises:
            ShardSetError: the member is damaged.
        """
        return self._image(sample, read, camera_id, target)

    def _image(self, sample: SampleRecord, read: MemberReader, camera_id: str | None, target: np.ndarray) -> bool:
        suffix = None if camera_id is None else image_suffix(camera_id, self._codec)
        if suffix is None or suffix not in sample.members:
            target[...] = 0
            return False
        _image_member(sample, read, suffix, target)
        return True

    def _vertices(self, sample: SampleRecord, read: MemberReader) -> np.ndarray:
        expected = (self._manifest.num_vertices, 3)
        vertices = _array_member(sample, read, VERTICES, max_bytes=_most_bytes(expected))
        if vertices.shape != expected or vertices.dtype != np.float32:
            raise ShardSetError(
                f"{sample.frame_id}.{VERTICES}: {vertices.dtype} {vertices.shape}, expected float32 {expected};"
                " shard the capture again"
            )
        return vertices

    def _headset(self, sample: SampleRecord, read: MemberReader) -> tuple[np.ndarray, np.ndarray]:
        cameras = self._manifest.headset_cameras
        height, width = cameras[0].image_size_hw
        images, present = np.zeros((len(cameras), 1, height, width), np.uint8), np.zeros(len(cameras), bool)
        for place, camera in enumerate(cameras):
            suffix = headset_suffix(camera.camera_id)
            if suffix in sample.members:
                _image_member(sample, read, suffix, images[place])
                present[place] = True
        return images, present

    def _keypoints(self, sample: SampleRecord, read: MemberReader) -> np.ndarray:
        expected = (len(self._manifest.keypoint_names), 3)
        if KEYPOINTS not in sample.members:
            return np.zeros(expected, np.float32)
        points = _array_member(sample, read, KEYPOINTS, max_bytes=_most_bytes(expected))
        if points.shape != expected or points.dtype != np.float32:
            found = f"{points.dtype} {points.shape}"
            raise ShardSetError(f"{sample.frame_id}.{KEYPOINTS}: {found}, expected float32 {expected}")
        return points


def _head_pose(sample: SampleRecord, read: MemberReader) -> np.ndarray:
    try:
        pose = np.array(json.loads(bytes(_member(sample, read, FRAME)))["world_from_head"], np.float64)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ShardSetError(f"{sample.frame_id}.{FRAME}: no head pose ({error}); shard the capture again") from error
    if pose.shape != (3, 4) or not np.isfinite(pose).all():
        raise ShardSetError(f"{sample.frame_id}.{FRAME}: a head pose of shape {pose.shape}, expected finite (3, 4)")
    return pose


def average_texture_member(sample: SampleRecord) -> str:
    """The suffix of the frame's average texture, in whichever codec it is."""
    suffixes = [average_texture_suffix(codec) for codec in get_args(LosslessCodec)]
    return next((suffix for suffix in suffixes if suffix in sample.members), suffixes[0])


def decode_mesh_and_texture(sample: SampleRecord, read: MemberReader) -> tuple[np.ndarray, np.ndarray]:
    """Texture ``(3, T, T)`` uint8, row 0 is v = 0, and vertices ``(V, 3)`` of a frame."""
    suffix = average_texture_member(sample)
    with _errors_named(sample, suffix) as name:
        texture = decode_image(bytes(_member(sample, read, suffix)), name)
    return np.ascontiguousarray(texture[::-1].transpose(2, 0, 1)), _array_member(sample, read, VERTICES)


@contextmanager
def _errors_named(sample: SampleRecord, suffix: str) -> Iterator[str]:
    try:
        yield f"{sample.frame_id}.{suffix}"
    except CodecError as error:
        raise ShardSetError(f"{error}; the shard is damaged, fetch it or shard again") from error


def _member(sample: SampleRecord, read: MemberReader, suffix: str) -> bytes | memoryview:
    if suffix not in sample.members:
        raise ShardSetError(f"{sample.frame_id}: the sample has no {suffix}; shard the capture again")
    offset, size, _ = sample.members[suffix]
    return read(offset, size)


def _most_bytes(shape: tuple[int, int]) -> int:
    """Of a float32 array with its header."""
    return 4 * math.prod(shape) + _NPY_HEADER_BYTES


def _array_member(sample: SampleRecord, read: MemberReader, suffix: str, max_bytes: int | None = None) -> np.ndarray:
    with _errors_named(sample, suffix) as name:
        return decode_array(_member(sample, read, suffix), name, max_bytes)


def _image_member(
    sample: SampleRecord, read: MemberReader, suffix: str, target: np.ndarray, *, bottom_up: bool = False
) -> None:
    with _errors_named(sample, suffix) as name:
        decode_image_into(_member(sample, read, suffix), name, target, bottom_up=bottom_up)
