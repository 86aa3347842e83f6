"""Every byte of a shard set: the digests of the manifest, and every member decoded.

A shard is one task (:func:`verify_shard`). It is read once, from its first byte to its last, as a WebDataset reader
does: the tar's own headers have to say what the manifest says.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from lipflow.errors import LipflowError, ShardSetError
from pipeline import storage
from pipeline.captures.tracked import check_camera, checked_vertices, parse_pose
from pipeline.checks.shard_members import DigestedShard, ShardMemberError, plain_members
from pipeline.checks.verification_report import BadFile, FaultList, VerifyPart, VerifyReport, report_of
from pipeline.images.codecs import (
    EXTENSION_OF_CODEC,
    MAX_ARRAY_BYTES,
    ImageMode,
    decode_array,
    decode_image,
    image_size_hw,
)
from pipeline.loading.member_reads import check_crc32
from pipeline.manifest import MANIFEST_NAME, Manifest, SampleRecord, ShardRecord
from pipeline.setfiles import NORMALIZATION_NAME, TOPOLOGY_NAME, decode_normalization, decode_topology
from pipeline.sharding.samples import (
    FRAME,
    KEYPOINTS,
    VERTICES,
    average_texture_suffix,
    headset_suffix,
    image_suffix,
    view_texture_suffix,
)

LAYOUT = "shards"


class ShardDigestError(ShardSetError):
    """A file of the set whose bytes are not those that the manifest was made of."""


RunShards = Callable[[str, Manifest], Iterable[VerifyPart]]
"""Verifies all shards of the set at a URI, in any order and anywhere."""


def run_shards_in_process(uri: str, manifest: Manifest) -> Iterator[VerifyPart]:
    """One shard after the other."""
    return (verify_shard(uri, manifest, record) for record in manifest.shards)


def is_shard_set(uri: str) -> bool:
    """Whether a manifest lies at a path or URI."""
    return storage.exists(storage.join(uri, MANIFEST_NAME))


def verify_shards(uri: str, run_shards: RunShards = run_shards_in_process) -> VerifyReport:
    """Decode every file of a shard set, and compare all digests.

    Args:
        uri: path, ``file://`` or ``s3://``.
        run_shards: how the shards are done.

    Raises:
        StorageError: storage fails as a whole.
    """
    uri = storage.normalize_uri(uri)
    faults = FaultList(uri)
    try:
        with _any_fault_named(storage.join(uri, MANIFEST_NAME)):
            manifest = Manifest.load(uri)
    except LipflowError as error:
        faults.add(error, storage.join(uri, MANIFEST_NAME))
        return report_of(uri, LAYOUT, [VerifyPart(1, tuple(faults.bad))], complete=False)
    parts = [VerifyPart(1, _bad_cameras(uri, manifest)), _verify_set_files(uri, manifest)]
    report = report_of(uri, LAYOUT, [*parts, *run_shards(uri, manifest)], complete=True)
    missing = list(manifest.missing_views())
    return replace(
        report,
        missing_views=_counts(camera_id for _, camera_id in missing),
        missing_views_by_segment=_counts(frame_id.partition("/")[0] for frame_id, _ in missing),
        missing_headset_views=_counts(_missing_headset_views(manifest)),
    )


def verify_shard(uri: str, manifest: Manifest, record: ShardRecord) -> VerifyPart:
    """Read one shard whole, decode its members and compare its digest.

    Args:
        uri: of the set.
        manifest: of the set.
        record: of the shard.

    Raises:
        StorageError: storage fails as a whole.
    """
    shard_uri = storage.join(uri, record.name)
    faults = FaultList(uri)
    try:
        stream = DigestedShard(shard_uri)
        decoded, absent, broken = _decode_members(stream, shard_uri, manifest, record, faults)
        stream.skip_to(stream.size_bytes)
        if (stream.size_bytes, stream.digest.hexdigest()) != (record.size_bytes, record.sha256):
            faults.add(
                ShardDigestError(
                    f"{shard_uri}: {stream.size_bytes} bytes of SHA-256 {stream.digest.hexdigest()[:12]}…, but the "
                    f"manifest says {record.size_bytes} of {record.sha256[:12]}…; fetch it again, or shard again"
                ),
                shard_uri,
            )
        elif broken is not None:
            faults.add(broken, shard_uri)
        elif absent:
            faults.add(
                ShardMemberError(
                    f"{shard_uri}: {len(absent)} members of the manifest are not in it, first {absent[0]}; shard again"
                ),
                shard_uri,
            )
    except LipflowError as error:
        faults.add(error, shard_uri)
        return VerifyPart(1, tuple(faults.bad))
    return VerifyPart(1 + decoded, tuple(faults.bad))


def _bad_cameras(uri: str, manifest: Manifest) -> tuple[BadFile, ...]:
    faults, source = FaultList(uri), storage.join(uri, MANIFEST_NAME)
    for camera in (camera for capture in manifest.captures for camera in (*capture.cameras, *capture.headset_cameras)):
        try:
            with _any_fault_named(source):
                intrinsics, pose = np.array(camera.intrinsics), np.array(camera.cam_from_world)
                check_camera(intrinsics, pose, camera.camera_id, source)
        except LipflowError as error:
            faults.add(error, source)
    return tuple(faults.bad)


def _verify_set_files(uri: str, manifest: Manifest) -> VerifyPart:
    faults = FaultList(uri)
    for name, check in ((TOPOLOGY_NAME, _check_topology), (NORMALIZATION_NAME, _check_normalization)):
        source = storage.join(uri, name)
        try:
            body = storage.read_bytes(source)
            if hashlib.sha256(body).hexdigest() != manifest.files.get(name):
                raise ShardDigestError(f"{source}: its SHA-256 is not the manifest's; fetch it again, or shard again")
            with _any_fault_named(source):
                check(body, source, manifest)
        except LipflowError as error:
            faults.add(error, source)
    return VerifyPart(2, tuple(faults.bad))


@contextmanager
def _any_fault_named(source: str) -> Iterator[None]:
    """Whatever a parser raises is the fault of the bytes at ``source``: the other files are still to be checked."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise ShardMemberError(
            f"{source}: cannot be decoded ({type(error).__name__}: {reason}); shard again"
        ) from error


def _check_topology(body: bytes, source: str, manifest: Manifest) -> None:
    topology, size = decode_topology(body, source), manifest.texture_size
    if topology.num_vertices != manifest.num_vertices or topology.weight_mask.shape != (size, size):
        raise ShardMemberError(f"{source}: not of {manifest.num_vertices} vertices, {size} texels; shard again")
    landmarks = np.array(list(topology.landmarks.values()), np.int64)
    for name, places, count in (
        ("faces", topology.faces, topology.num_vertices),
        ("uv_faces", topology.uv_faces, len(topology.uvs)),
        ("landmarks", landmarks, topology.num_vertices),
    ):
        if places.size and not 0 <= places.min() <= places.max() < count:
            raise ShardMemberError(f"{source}: {name} point beyond the {count} that there are; shard again")


def _check_normalization(body: bytes, source: str, manifest: Manifest) -> None:
    normalization, size = decode_normalization(body, source), manifest.texture_size
    _check_shape(normalization.vertices_mean.shape, (manifest.num_vertices, 3), source)
    _check_shape(normalization.texture_mean.shape, (3, size, size), source)
    scales = (normalization.texture_std, normalization.vertices_std)
    finite = all(np.isfinite(mean).all() for mean in (normalization.texture_mean, normalization.vertices_mean))
    if not finite or not all(0 < scale < np.inf for scale in scales):
        raise ShardMemberError(f"{source}: means that are not finite, or a std that is not positive; shard again")


def _decode_members(
    stream: DigestedShard, shard_uri: str, manifest: Manifest, record: ShardRecord, faults: FaultList
) -> tuple[int, list[str], ShardMemberError | None]:
    """The number of members that were looked at, the names of those that did not come, and why if a header ended it."""
    samples = {sample.frame_id: sample for sample in record.samples}
    waiting = dict.fromkeys(f"{sample.frame_id}.{suffix}" for sample in record.samples for suffix in sample.members)
    decoded = 0
    try:
        for entry in plain_members(stream, shard_uri):
            decoded += 1
            waiting.pop(entry.name, None)
            source = f"{shard_uri}!{entry.name}"
            try:
                folder, _, file = entry.name.rpartition("/")
                frame, _, suffix = file.partition(".")
                sample = samples.get(f"{folder}/{frame}")
                place = None if sample is None else sample.members.get(suffix)
                if sample is None or place is None or place[:2] != (entry.offset, entry.size_bytes):
                    raise ShardMemberError(f"{source}: not in the manifest, or at another place; shard again")
                if entry.size_bytes > MAX_ARRAY_BYTES:
                    raise ShardMemberError(
                        f"{source}: {entry.size_bytes} bytes, more than a sample can hold; shard again"
                    )
                body = stream.read(entry.size_bytes)
                check_crc32(body, place[2], source)
                with _any_fault_named(source):
                    _check_member(body, suffix, sample, source, manifest)
            except LipflowError as error:
                faults.add(error, source)
    except ShardMemberError as error:
        return decoded, list(waiting), error
    return decoded, list(waiting), None


def _check_member(body: bytes, suffix: str, sample: SampleRecord, source: str, manifest: Manifest) -> None:
    if suffix == FRAME:
        _check_frame(body, sample, source, manifest)
    elif suffix == VERTICES:
        checked_vertices(_decode_numbers(body, (manifest.num_vertices, 3), source), manifest.num_vertices, source)
    elif suffix == KEYPOINTS:
        points = _decode_numbers(body, (len(manifest.keypoint_names), 3), source)
        if not np.isfinite(points).all():
            raise ShardMemberError(f"{source}: keypoints that are not finite; shard again")
    else:
        mode, size_hw = _expected_image(suffix, source, manifest)
        if not suffix.endswith(f".{EXTENSION_OF_CODEC['planar']}"):
            # by its header first: decoding another size could take far more memory than the set's own pictures do
            _check_shape(image_size_hw(io.BytesIO(body), source), size_hw, source)
        _check_shape(decode_image(body, source, mode).shape[:2], size_hw, source)


def _decode_numbers(body: bytes, shape: tuple[int, int], source: str) -> np.ndarray:
    values = decode_array(body, source)
    if values.dtype != np.float32:
        raise ShardMemberError(f"{source}: an array of {values.dtype}, expected float32; shard again")
    _check_shape(values.shape, shape, source)
    return values


def _expected_image(suffix: str, source: str, manifest: Manifest) -> tuple[ImageMode, tuple[int, int]]:
    texture_size_hw = (manifest.texture_size, manifest.texture_size)
    if suffix == average_texture_suffix(manifest.texture_codec):
        return "RGB", texture_size_hw
    codec = str(manifest.config["codec"])
    for camera in manifest.cameras:
        if suffix == image_suffix(camera.camera_id, codec):
            return "RGB", manifest.image_size_hw
        if suffix == view_texture_suffix(camera.camera_id):
            return "RGBA", texture_size_hw
    for camera in manifest.headset_cameras:
        if suffix == headset_suffix(camera.camera_id):
            return "L", camera.image_size_hw
    raise ShardMemberError(f"{source}: no member of that name belongs to a sample of this set; shard again")


def _check_frame(body: bytes, sample: SampleRecord, source: str, manifest: Manifest) -> None:
    """The ids, the pose, and the cameras: each is either present, with a member, or missing by the manifest."""
    try:
        facts = json.loads(body)
        frame_id = f"{facts['segment']}/{facts['frame']}"
        pose, present = np.array(facts["world_from_head"], np.float64), list(facts["cameras"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ShardMemberError(f"{source}: not the facts of a frame ({error}); shard again") from error
    _check_shape(pose.shape, (3, 4), source)
    parse_pose(" ".join(str(number) for number in pose.ravel()).encode(), source)
    codec = str(manifest.config["codec"])
    capture = manifest.capture_of(sample.frame_id)
    stored = [camera.camera_id for camera in capture.cameras if image_suffix(camera.camera_id, codec) in sample.members]
    missing = {camera.camera_id for camera in capture.cameras} - set(stored)
    if frame_id != sample.frame_id or present != stored or missing != set(sample.missing_views):
        raise ShardMemberError(f"{source}: frame {frame_id} with {len(present)} cameras, not as the manifest has it")


def _check_shape(found: tuple[int, ...], expected: tuple[int, ...], source: str) -> None:
    if tuple(found) != tuple(expected):
        raise ShardMemberError(f"{source}: shape {tuple(found)}, but the manifest says {tuple(expected)}; shard again")


def _missing_headset_views(manifest: Manifest) -> Iterator[str]:
    for record in manifest.shards:
        for sample in record.samples:
            for camera in manifest.headset_cameras:
                if headset_suffix(camera.camera_id) not in sample.members:
                    yield camera.camera_id


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


__all__ = [
    "LAYOUT",
    "RunShards",
    "ShardDigestError",
    "ShardMemberError",
    "is_shard_set",
    "run_shards_in_process",
    "verify_shard",
    "verify_shards",
]
