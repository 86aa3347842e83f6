"""The manifest of a shard set: the commit, written last. Without it there is no data set."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pydantic
from pydantic import Field, model_validator

from lipflow.config import StrictConfig
from lipflow.errors import ShardSetError
from lipflow.types import Camera
from pipeline import storage
from pipeline.images.codecs import EXTENSION_OF_CODEC, LosslessCodec
from pipeline.sealing import ChecksumError, seal, unseal
from pipeline.sharding.segment_names import CAPTURE_NAME, capture_name_of
from pipeline.sharding.splits import Split

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
_SAFE_NAME = re.compile(r"[^/\\.\x00-\x1f][^/\\\x00-\x1f]*")
_FRAME_ID = re.compile(r"(?!\.{1,2}/)[^/\\\x00-\x1f]+/[^/\\.\x00-\x1f]+")
_MAX_VERTICES = 10_000_000
_MAX_SIDE = 2**15
_NEEDED = frozenset({"verts.npy.zst", "frame.json"})
_OPTIONAL = frozenset({"keypoints.npy.zst"})

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""Also the name of a shard's copy in a cache, so that nothing else may stand here."""
Side = Annotated[int, Field(gt=0, le=_MAX_SIDE, description="pixels")]
Place = tuple[int, int, int]
"""Of a member: the offset of its bytes in the tar, their number, and their CRC-32, for those who read it alone."""
Row3 = tuple[float, float, float]
Row4 = tuple[float, float, float, float]


class ShardSetVersionError(ShardSetError):
    """A shard set that another version of this program has written, or will read."""


class CameraRecord(StrictConfig):
    """One camera, with K in pixels of the *stored* images. For a headset camera the pose is cam_from_head."""

    camera_id: str
    intrinsics: tuple[Row3, Row3, Row3]
    cam_from_world: tuple[Row4, Row4, Row4]
    image_size_hw: tuple[Side, Side]

    @classmethod
    def of(cls, camera: Camera) -> CameraRecord:
        """The record of a camera without distortion."""
        return cls(
            camera_id=camera.camera_id,
            intrinsics=np.asarray(camera.intrinsics, np.float64).tolist(),
            cam_from_world=np.asarray(camera.cam_from_world, np.float64).tolist(),
            image_size_hw=camera.image_size_hw,
        )

    def camera(self) -> Camera:
        """The camera itself."""
        return Camera(self.camera_id, np.array(self.intrinsics), np.array(self.cam_from_world), self.image_size_hw)


class CaptureRecord(StrictConfig):
    """One capture of the set, with its own calibration.

    Attributes:
        name: what its segments end in, as ``SEGMENT@NAME``; None for the only capture of a set.
        uri: where it lay.
        cameras: its dome cameras, which may lack some of the set's.
        headset_cameras: the same ones in every capture, each where this capture has it.
    """

    name: str | None
    uri: str
    cameras: tuple[CameraRecord, ...]
    headset_cameras: tuple[CameraRecord, ...]


class SkippedFile(StrictConfig):
    """A file that could not be used, where the ``skip`` policy allows that."""

    path: str
    reason: str


class SampleRecord(StrictConfig):
    """One frame in a shard.

    Attributes:
        frame_id: ``"SEGMENT/FRAME"``; in a set of several captures ``"SEGMENT@CAPTURE/FRAME"``.
        members: member suffix, such as ``"400029.image.png"``, to (offset, size in bytes, CRC-32).
        missing_views: cameras of its capture without an image of this frame; those that its capture lacks are not named
            in each frame, see :meth:`Manifest.views_missing_in`.
    """

    frame_id: str
    members: dict[str, Place]
    missing_views: tuple[str, ...] = ()


class ShardRecord(StrictConfig):
    """One tar: what a reader must find in it."""

    name: str
    split: Split
    sha256: Sha256
    size_bytes: int = Field(ge=0, lt=2**63)
    samples: tuple[SampleRecord, ...]
    skipped: tuple[SkippedFile, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> ShardRecord:
        if not _SAFE_NAME.fullmatch(self.name):
            raise ValueError(f"shard name {self.name!r} is not a plain file name")
        for sample in self.samples:
            for suffix, (offset, size, crc32) in sample.members.items():
                if offset < 0 or size < 0 or offset + size > self.size_bytes:
                    raise ValueError(f"{self.name}: {sample.frame_id}.{suffix} lies outside of the shard")
                if not 0 <= crc32 < 2**32:
                    raise ValueError(f"{self.name}: {sample.frame_id}.{suffix} has {crc32} for a CRC-32")
        return self


class Manifest(StrictConfig):
    """All that a reader has to know of a shard set.

    Attributes:
        fingerprint: of the configuration and the capture's listing; the same one means the same shards.
        captures: in the order of their names.
        camera_ids: the cameras of all captures, in the order of the views.
        files: the digests of ``topology.npz`` and ``normalization.npz``.
        image_size_hw: of every dome camera's stored images.
        texture_size: of the stored textures.
    """

    format: Literal["lipflow-shards"] = "lipflow-shards"
    format_version: Literal[2] = 2
    config: dict[str, Any]
    captures: tuple[CaptureRecord, ...] = Field(min_length=1)
    camera_ids: tuple[str, ...]
    fingerprint: str
    files: dict[str, Sha256]
    shards: tuple[ShardRecord, ...]
    train_camera_ids: tuple[str, ...]
    test_camera_ids: tuple[str, ...]
    frontal_camera_id: str | None
    keypoint_names: tuple[str, ...]
    splits: dict[str, tuple[str, ...]]
    image_size_hw: tuple[Side, Side]
    texture_size: Side
    num_vertices: int = Field(gt=0, le=_MAX_VERTICES)

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        """What readers rely on; verified once, here."""
        extension = EXTENSION_OF_CODEC.get(str(self.config.get("codec")))
        if extension is None:
            raise ValueError(f"config.codec is {self.config.get('codec')!r}, no known image codec")
        if self.config.get("texture_codec") not in get_args(LosslessCodec):
            raise ValueError(f"config.texture_codec is {self.config.get('texture_codec')!r}, no lossless image codec")
        needed = _NEEDED | {f"avgtex.{EXTENSION_OF_CODEC[self.texture_codec]}"}
        _check_captures(self.captures, self.camera_ids, self.frontal_camera_id)
        cameras = list(self.camera_ids)
        samples = [(shard, sample) for shard in self.shards for sample in shard.samples]
        for name, ids in (
            ("cameras", cameras),
            ("train_camera_ids", list(self.train_camera_ids)),
            ("test_camera_ids", list(self.test_camera_ids)),
            ("shards", [shard.name for shard in self.shards]),
            ("samples", [sample.frame_id for _, sample in samples]),
            ("splits", [segment for segments in self.splits.values() for segment in segments]),
        ):
            if len(set(ids)) < len(ids):
                raise ValueError(f"{name}: {Counter(ids).most_common(1)[0][0]!r} stands there twice")
        if not self.train_camera_ids:
            raise ValueError("train_camera_ids: no camera is for training")
        frontal = () if self.frontal_camera_id is None else (self.frontal_camera_id,)
        missing = {camera_id for _, sample in samples for camera_id in sample.missing_views}
        unknown = {*self.train_camera_ids, *self.test_camera_ids, *frontal, *missing} - set(cameras)
        if unknown:
            raise ValueError(f"camera {min(unknown)!r} is named, but not among the cameras")
        images = {f"{camera_id}.image.{extension}": camera_id for camera_id in cameras}
        textures = {f"{camera_id}.tex.png" for camera_id in cameras}
        headset = {f"hmc-{camera.camera_id}.png" for camera in self.headset_cameras}
        of_capture = {capture.name: {camera.camera_id for camera in capture.cameras} for capture in self.captures}
        for shard, sample in samples:
            other = sample.members.keys() - images.keys() - textures - headset
            if not needed <= other <= needed | _OPTIONAL:
                odd = min(other ^ needed)
                raise ValueError(f"{sample.frame_id}.{odd}: an unknown member, or one that is absent")
            own = of_capture.get(self._capture_name(sample.frame_id))
            if own is None:
                raise ValueError(f"{sample.frame_id}: of none of the captures {[item.name for item in self.captures]}")
            stored = {camera_id for suffix, camera_id in images.items() if suffix in sample.members}
            absent = own - stored
            if not stored <= own or absent != set(sample.missing_views):
                raise ValueError(f"{sample.frame_id}: missing views {sorted(absent)}, listed {sample.missing_views}")
            if not _FRAME_ID.fullmatch(sample.frame_id):
                raise ValueError(f"{sample.frame_id!r} is not SEGMENT/FRAME")
            if sample.frame_id.partition("/")[0] not in self.splits.get(shard.split, ()):
                raise ValueError(f"{sample.frame_id} lies in {shard.name}, but its segment is not in {shard.split}")
        return self

    @classmethod
    def load(cls, shards_uri: str) -> Manifest:
        """The manifest of the shard set at a path or URI.

        Raises:
            ShardSetVersionError: it is of another version.
            ChecksumError: its bytes are not those that were written.
            ShardSetError: there is none, or it is no manifest.
        """
        uri = storage.join(shards_uri, MANIFEST_NAME)
        try:
            sealed = storage.read_bytes(uri)
        except storage.ObjectNotFoundError as error:
            raise ShardSetError(
                f"{storage.normalize_uri(shards_uri)}: no {MANIFEST_NAME}, so no shard set;"
                " correct the address or run `lipflow shard` to the end"
            ) from error
        try:
            return cls.model_validate_json(unseal(sealed, uri))
        except ChecksumError:
            _check_version(sealed, uri)
            raise
        except pydantic.ValidationError as error:
            _check_version(sealed, uri)
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ShardSetError(f"{uri}: damaged at {where} ({first['msg']}); shard again") from error
        except (ValueError, AttributeError, RecursionError) as error:
            raise ShardSetError(f"{uri}: not a manifest ({error}); shard again") from error

    def save(self, shards_uri: str) -> None:
        """Write the manifest atomically: this commits the set. No indentation: half of its bytes would be that."""
        storage.write_bytes(storage.join(shards_uri, MANIFEST_NAME), seal(self.model_dump_json().encode()))

    @property
    def digest(self) -> str:
        """SHA-256 over everything that determines the data: equal digests mean equal batches, wherever they lie."""
        content = self.model_dump(mode="json", exclude={"captures": {"__all__": {"uri"}}, "shards": True})
        content["shards"] = [(shard.name, shard.sha256, shard.size_bytes) for shard in self.shards]
        return canonical_sha256(content)

    @property
    def texture_codec(self) -> LosslessCodec:
        """Of the average textures."""
        return self.config["texture_codec"]

    @property
    def cameras(self) -> tuple[CameraRecord, ...]:
        """Every camera once, in the order of the views; its calibration is that of the first capture that has it."""
        first = {camera.camera_id: camera for capture in self.captures[::-1] for camera in capture.cameras}
        return tuple(first[camera_id] for camera_id in self.camera_ids)

    @property
    def headset_cameras(self) -> tuple[CameraRecord, ...]:
        """The headset's cameras; their calibration is that of the first capture."""
        return self.captures[0].headset_cameras

    def capture_of(self, frame_id: str) -> CaptureRecord:
        """The capture that a frame of this set is of."""
        name = self._capture_name(frame_id)
        return next(capture for capture in self.captures if capture.name == name)

    def views_missing_in(self, sample: SampleRecord) -> tuple[str, ...]:
        """The cameras without an image of a frame, those that its whole capture lacks among them."""
        capture = self.capture_of(sample.frame_id)
        if len(capture.cameras) == len(self.camera_ids):
            return sample.missing_views
        present = {camera.camera_id for camera in capture.cameras} - set(sample.missing_views)
        return tuple(camera_id for camera_id in self.camera_ids if camera_id not in present)

    def missing_views(self) -> Iterator[tuple[str, str]]:
        """All (frame id, camera id) without an image."""
        for shard in self.shards:
            for sample in shard.samples:
                yield from ((sample.frame_id, camera_id) for camera_id in self.views_missing_in(sample))

    def _capture_name(self, frame_id: str) -> str | None:
        return None if self.captures[0].name is None else capture_name_of(frame_id)

    def skipped(self) -> tuple[SkippedFile, ...]:
        """All files that could not be used."""
        return tuple(item for shard in self.shards for item in shard.skipped)


def _check_version(text: bytes, uri: str) -> None:
    """Of what could not be read: sets of older versions had no checksum, and their members had none."""
    try:
        version = json.loads(text).get("format_version", FORMAT_VERSION)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ShardSetError(f"{uri}: not a manifest ({error}); shard again") from error
    if version != FORMAT_VERSION:
        raise ShardSetVersionError(
            f"{uri}: format version {version!r:.20}, expected {FORMAT_VERSION}; shard again, to another place"
        )


def _check_captures(
    captures: tuple[CaptureRecord, ...], camera_ids: tuple[str, ...], frontal_camera_id: str | None
) -> None:
    """Names that are safe and sorted, and cameras of which the set's views can be made.

    Raises:
        ValueError: naming what is wrong.
    """
    names = [capture.name for capture in captures]
    if names != [None] and names != sorted({name for name in names if name and CAPTURE_NAME.fullmatch(name)}):
        raise ValueError(f"captures: {names} are no names, or not sorted, or one stands there twice")
    ids = [[camera.camera_id for camera in capture.cameras] for capture in captures]
    headset = [[camera.camera_id for camera in capture.headset_cameras] for capture in captures]
    for name, of_capture in (("cameras", ids), ("headset_cameras", headset)):
        for own in of_capture:
            if len(set(own)) < len(own):
                raise ValueError(f"{name}: {Counter(own).most_common(1)[0][0]!r} stands there twice")
    if {camera_id for own in ids for camera_id in own} != set(camera_ids):
        raise ValueError("camera_ids: not the cameras of the captures")
    if any(not own or (frontal_camera_id is not None and frontal_camera_id not in own) for own in ids):
        raise ValueError(f"captures: one has no camera, or lacks the frontal camera {frontal_camera_id!r}")
    if any(own != headset[0] for own in headset):
        raise ValueError("captures: their headset cameras differ")


def canonical_sha256(content: Any) -> Sha256:
    """SHA-256 of JSON with sorted keys and no spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
