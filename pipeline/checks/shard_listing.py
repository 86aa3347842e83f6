"""What is inside a shard set, told by its manifest and by range reads of single members; nothing is unpacked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lipflow.errors import ShardSetError
from pipeline import storage
from pipeline.images.codecs import EXTENSION_OF_CODEC, MAX_ARRAY_BYTES, CodecError, decode_image, encode_image
from pipeline.loading.member_reads import check_crc32
from pipeline.manifest import Manifest, SampleRecord, ShardRecord
from pipeline.sharding.samples import FRAME, headset_suffix, image_suffix

_MAX_OFFSET = 2**63


@dataclass(frozen=True)
class ShardFacts:
    """One shard.

    Attributes:
        capture: the one of its frames; None in a set of one capture.
        views: stored camera images.
        missing_views: cameras without an image, over all frames.
    """

    name: str
    split: str
    capture: str | None
    frames: int
    views: int
    missing_views: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class FrameFacts:
    """One frame, and what it takes in its shard.

    Attributes:
        views: stored camera images.
        missing_views: the cameras without an image.
        members_bytes: of all members, without the tar's headers.
    """

    frame_id: str
    shard: str
    split: str
    views: int
    missing_views: tuple[str, ...]
    members: int
    members_bytes: int


@dataclass(frozen=True)
class SetListing:
    """A whole set: its shards in the order of the manifest, and their frames in the order of the shards."""

    uri: str
    digest: str
    shards: tuple[ShardFacts, ...]
    frames: tuple[FrameFacts, ...]

    @property
    def size_bytes(self) -> int:
        """Of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def views(self) -> int:
        """Stored camera images."""
        return sum(shard.views for shard in self.shards)

    @property
    def missing_views(self) -> int:
        """Camera images that the capture lacks."""
        return sum(shard.missing_views for shard in self.shards)


@dataclass(frozen=True)
class MemberFacts:
    """A member, and where its bytes lie in the shard."""

    name: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class FrameListing:
    """A frame as it is stored.

    Attributes:
        facts: what ``frame.json`` says, head pose and driving signals included.
        members: in the order of the shard.
    """

    frame: FrameFacts
    facts: Mapping[str, Any]
    members: tuple[MemberFacts, ...]


@dataclass(frozen=True)
class StoredView:
    """A camera's or headset camera's image of a frame.

    Attributes:
        member: where it lies.
        body: its bytes, as they are stored.
        image_size_hw: of the decoded picture, pixels.
    """

    member: MemberFacts
    body: bytes
    image_size_hw: tuple[int, int]
    _mono: bool

    def encoded_for(self, name: str) -> bytes:
        """The bytes for a file of that name: as stored if the extension is the member's own, else as a PNG.

        Raises:
            ShardSetError: an extension that is neither.
        """
        own, wanted = (text.rpartition(".")[2].lower() for text in (self.member.name, name))
        if wanted == own:
            return self.body
        if wanted != "png":
            raise ShardSetError(f"{name}: a view is written as it is stored (.{own}) or as .png; choose one of these")
        return encode_image(decode_image(self.body, self.member.name, "L" if self._mono else "RGB"), "png")


def list_shards(uri: str) -> SetListing:
    """All shards and frames of the set at a path or URI; only the manifest is read.

    Raises:
        ShardSetError: there is no manifest, or it is damaged.
        StorageError: it cannot be read.
    """
    manifest = Manifest.load(uri)
    known = _image_suffixes(manifest, uri)
    shards, frames = [], []
    for shard in manifest.shards:
        own = [_frame_facts(manifest, shard, sample, known) for sample in shard.samples]
        frames += own
        shards.append(
            ShardFacts(
                name=shard.name,
                split=shard.split,
                capture=manifest.capture_of(own[0].frame_id).name if own else None,
                frames=len(own),
                views=sum(frame.views for frame in own),
                missing_views=sum(len(frame.missing_views) for frame in own),
                size_bytes=shard.size_bytes,
                sha256=shard.sha256,
            )
        )
    return SetListing(storage.normalize_uri(uri), manifest.digest, tuple(shards), tuple(frames))


def show_frame(uri: str, frame_id: str) -> FrameListing:
    """One frame; of its shard, ``frame.json`` alone is read.

    Raises:
        ShardSetError: there is no such set or frame, or the member is damaged.
        StorageError: storage cannot be read.
    """
    manifest = Manifest.load(uri)
    shard, sample = _find(manifest, uri, frame_id)
    body = _read_member(uri, shard, sample, FRAME)
    try:
        facts = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ShardSetError(f"{_address(uri, shard, sample, FRAME)}: not JSON ({error}); shard again") from error
    if not isinstance(facts, dict):
        raise ShardSetError(f"{_address(uri, shard, sample, FRAME)}: not the facts of a frame; shard again")
    members = sorted((_member_facts(sample, suffix) for suffix in sample.members), key=lambda member: member.offset)
    return FrameListing(_frame_facts(manifest, shard, sample, _image_suffixes(manifest, uri)), facts, tuple(members))


def read_view(uri: str, frame_id: str, camera_id: str) -> StoredView:
    """The image of one camera, or headset camera, by one range read of its shard.

    Raises:
        ShardSetError: there is no such set, frame, camera or view, or the member is damaged.
        StorageError: storage cannot be read.
    """
    manifest = Manifest.load(uri)
    shard, sample = _find(manifest, uri, frame_id)
    suffix, mono = _view_suffix(manifest, uri, camera_id)
    if suffix not in sample.members:
        raise ShardSetError(
            f"{storage.normalize_uri(uri)}: {frame_id} has no image of camera {camera_id}; it is missing in the capture"
        )
    body = _read_member(uri, shard, sample, suffix)
    try:
        image = decode_image(body, f"{frame_id}.{suffix}", "L" if mono else "RGB")
    except CodecError as error:
        raise ShardSetError(f"{error}; fetch {shard.name} again, or shard again") from error
    return StoredView(_member_facts(sample, suffix), body, (image.shape[0], image.shape[1]), mono)


def _view_suffix(manifest: Manifest, uri: str, camera_id: str) -> tuple[str, bool]:
    """The member of a camera, and whether it is monochrome."""
    cameras = [camera.camera_id for camera in manifest.cameras]
    headset = [camera.camera_id for camera in manifest.headset_cameras]
    if camera_id in cameras:
        return image_suffix(camera_id, _codec(manifest, uri)), False
    if camera_id in headset:
        return headset_suffix(camera_id), True
    raise ShardSetError(
        f"{storage.normalize_uri(uri)}: no camera {camera_id!r}; choose from {', '.join(cameras + headset)}"
    )


def _find(manifest: Manifest, uri: str, frame_id: str) -> tuple[ShardRecord, SampleRecord]:
    for shard in manifest.shards:
        for sample in shard.samples:
            if sample.frame_id == frame_id:
                return shard, sample
    raise ShardSetError(
        f"{storage.normalize_uri(uri)}: no frame {frame_id!r}; expected SEGMENT/FRAME as `lipflow shards ls --frames`"
        " lists them"
    )


def _read_member(uri: str, shard: ShardRecord, sample: SampleRecord, suffix: str) -> bytes:
    if suffix not in sample.members:
        raise ShardSetError(f"{_address(uri, shard, sample, suffix)}: the sample has no such member; shard again")
    offset, size, crc32 = sample.members[suffix]
    if size > MAX_ARRAY_BYTES or offset >= _MAX_OFFSET:
        raise ShardSetError(
            f"{_address(uri, shard, sample, suffix)}: {size} bytes at {offset} are no member; shard again"
        )
    body = storage.read_range(storage.join(uri, shard.name), offset, size)
    check_crc32(body, crc32, _address(uri, shard, sample, suffix))
    return body


def _codec(manifest: Manifest, uri: str) -> str:
    codec = str(manifest.config.get("codec"))
    if codec not in EXTENSION_OF_CODEC:
        raise ShardSetError(f"{storage.normalize_uri(uri)}: the manifest's codec {codec!r} is not known; shard again")
    return codec


def _image_suffixes(manifest: Manifest, uri: str) -> frozenset[str]:
    codec = _codec(manifest, uri)
    return frozenset(image_suffix(camera.camera_id, codec) for camera in manifest.cameras)


def _frame_facts(
    manifest: Manifest, shard: ShardRecord, sample: SampleRecord, image_suffixes: frozenset[str]
) -> FrameFacts:
    return FrameFacts(
        frame_id=sample.frame_id,
        shard=shard.name,
        split=shard.split,
        views=len(image_suffixes & sample.members.keys()),
        missing_views=manifest.views_missing_in(sample),
        members=len(sample.members),
        members_bytes=sum(size for _, size, _ in sample.members.values()),
    )


def _member_facts(sample: SampleRecord, suffix: str) -> MemberFacts:
    offset, size, _ = sample.members[suffix]
    return MemberFacts(f"{sample.frame_id}.{suffix}", offset, size)


def _address(uri: str, shard: ShardRecord, sample: SampleRecord, suffix: str) -> str:
    return f"{storage.join(uri, shard.name)}!{sample.frame_id}.{suffix}"


__all__ = [
    "FrameFacts",
    "FrameListing",
    "MemberFacts",
    "SetListing",
    "ShardFacts",
    "StoredView",
    "list_shards",
    "read_view",
    "show_frame",
]
