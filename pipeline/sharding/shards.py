"""From captures to a WebDataset shard set: plan, write each shard, take statistics, commit.

Every step is a plain function that can run anywhere: :func:`plan_shards` is a pure function of the captures'
listings and the configuration, :func:`write_shard` is idempotent and gives the same bytes whenever it is run, and
:func:`commit` writes the manifest last, which makes the set exist.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lipflow.errors import CaptureError, ShardSetError
from lipflow.types import Normalization
from pipeline import storage
from pipeline.corrupt_files import CorruptFilesError, FaultLimit
from pipeline.images.codecs import resize_image
from pipeline.loading.member_reads import read_mesh_and_texture
from pipeline.manifest import CameraRecord, CaptureRecord, Manifest, SampleRecord, ShardRecord, SkippedFile
from pipeline.sealing import seal
from pipeline.setfiles import NORMALIZATION_NAME, TOPOLOGY_NAME, encode_normalization, encode_topology
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.plan import ShardPlan, ShardTask, plan_shards
from pipeline.sharding.samples import SampleEncoder
from pipeline.sharding.sources import Captures, ShardSources, StoredCapture, named_captures, open_for_sharding
from pipeline.sharding.splits import with_split_files
from pipeline.sharding.stats import FrameSums, OrderedSums, merge, normalization_from, sum_frames
from pipeline.sharding.tar import ShardWriter
from pipeline.sharding.target import (
    ShardSidecar,
    claimed,
    foreign_plan_error,
    read_sidecar,
    remove_leftovers,
    sidecar_uri,
)

_LOOK_UPS_AT_ONCE = 16


FETCH_OR_SKIP = "Fetch what is named here again, or set shard.on_error=skip to leave it out"
"""What to do about corrupt files under ``on_error: fail``."""


@dataclass(frozen=True)
class ShardOutcome:
    """A finished shard.

    Attributes:
        record: of the shard.
        kept: whether it was there already.
        sums: statistics of a training shard, where they are asked for and it has frames.
    """

    record: ShardRecord
    kept: bool
    sums: FrameSums | None


def finish_shard(capture: StoredCapture | Captures, config: ShardConfig, task: ShardTask, out_uri: str) -> ShardOutcome:
    """Write one shard, or keep it where the very same one is there, and take its part of the statistics.

    Raises:
        LipflowError: as :func:`write_shard`.
    """
    record = _present_record(config, task, out_uri)
    kept = record is not None
    if record is None:
        record = _write(capture, config, task, out_uri)
    wanted = task.split == "train" and config.statistics == "recompute"
    return ShardOutcome(record, kept, shard_statistics(out_uri, record) if wanted else None)


def write_shard(capture: StoredCapture | Captures, config: ShardConfig, task: ShardTask, out_uri: str) -> ShardRecord:
    """Write one shard, unless the very same one is there already. Its bytes depend on the arguments alone.

    Args:
        capture: the task's, as the plan's sources have it, or all captures that were planned.
        config: the configuration of the set.
        task: one of the plan's.
        out_uri: the folder of the set.

    Raises:
        CorruptFilesError: files of these frames are corrupt, and the policy is to fail; no shard is left.
        ConfigError: a shard of another plan lies there.
        StorageError: the shard cannot be written.
    """
    return _present_record(config, task, out_uri) or _write(capture, config, task, out_uri)


def _write(capture: StoredCapture | Captures, config: ShardConfig, task: ShardTask, out_uri: str) -> ShardRecord:
    if not isinstance(capture, StoredCapture):
        capture = open_for_sharding(capture, config).of(task.capture_name)
    encoder = SampleEncoder(capture.capture, capture.settings)
    samples = []
    with storage.open_for_writing(storage.join(out_uri, task.name)) as stream, ShardWriter(stream) as writer:
        for segment, frame in task.frames:
            sample = encoder.sample(segment, frame)
            if sample is not None:
                places = writer.add_sample(sample.frame_id, sample.members)
                missing = tuple(sample.missing_views)
                samples.append(SampleRecord(frame_id=sample.frame_id, members=places, missing_views=missing))
        if encoder.skipped and config.on_error == "fail":
            raise CorruptFilesError(capture.capture.uri, tuple(encoder.skipped), FETCH_OR_SKIP)
    record = ShardRecord(
        name=task.name,
        split=task.split,
        sha256=writer.sha256,
        size_bytes=writer.size_bytes,
        samples=tuple(samples),
        skipped=tuple(encoder.skipped),
    )
    sidecar = ShardSidecar(fingerprint=task.fingerprint, record=record)
    storage.write_bytes(sidecar_uri(out_uri, task.name), seal(sidecar.model_dump_json().encode()))
    return record


def shard_statistics(out_uri: str, record: ShardRecord) -> FrameSums | None:
    """Partial statistics of a written training shard, read back from it; None for a shard without frames."""
    if not record.samples:
        return None
    shard_uri = storage.join(out_uri, record.name)
    return sum_frames(record.name, (read_mesh_and_texture(shard_uri, sample) for sample in record.samples))


def reduce_statistics(plan: ShardPlan, partials: Iterable[FrameSums | None]) -> Normalization:
    """The set's normalisation from the partial statistics of all training shards, in any order.

    Raises:
        CaptureError: the capture's own statistics are asked for and it has none, or there is no training frame.
    """
    if plan.config.statistics == "recompute":
        return normalization_from(merge(partial for partial in partials if partial is not None))
    capture, size = plan.sources.captures[0].capture, plan.sources.captures[0].settings.texture_size
    own = capture.normalization()
    if own is None:
        raise CaptureError(f"{capture.uri}: the capture has no statistics of its own; set statistics=recompute")
    texture = np.stack([resize_image(channel, (size, size)) for channel in own.texture_mean.astype(np.float32)])
    return Normalization(texture, own.texture_std, own.vertices_mean, own.vertices_std)


def commit(
    out_uri: str,
    plan: ShardPlan,
    records: list[ShardRecord],
    normalization: Normalization,
) -> Manifest:
    """Write ``topology.npz`` and ``normalization.npz``, then the manifest, which makes the set exist.

    Where another job has committed the same shards in the meantime, its manifest stays.

    Raises:
        ShardSetError: a planned shard has no record.
        CaptureError: more files were skipped than the configuration allows.
    """
    by_name = {record.name: record for record in records}
    absent = [task.name for task in plan.shards if task.name not in by_name]
    if absent:
        raise ShardSetError(f"{out_uri}: {len(absent)} shards were not written, first {absent[0]}; run it again")
    ordered = tuple(by_name[task.name] for task in plan.shards)
    _check_skipped(plan.sources.uri, plan.config, ordered)
    first = plan.sources.captures[0]
    image_size_hw, size = first.settings.image_size_hw, first.settings.texture_size
    files = {
        TOPOLOGY_NAME: encode_topology(first.capture.topology, size),
        NORMALIZATION_NAME: encode_normalization(normalization),
    }
    for name, body in files.items():
        storage.write_bytes(storage.join(out_uri, name), body)
    manifest = Manifest(
        config=plan.config.model_dump(mode="json"),
        captures=tuple(
            CaptureRecord(
                name=stored.name,
                uri=stored.capture.uri,
                cameras=tuple(CameraRecord.of(camera.resized(image_size_hw)) for camera in stored.capture.cameras),
                headset_cameras=tuple(CameraRecord.of(camera) for camera in stored.capture.headset_cameras),
            )
            for stored in plan.sources.captures
        ),
        camera_ids=tuple(camera.camera_id for camera in plan.sources.cameras),
        fingerprint=plan.fingerprint,
        files={name: hashlib.sha256(body).hexdigest() for name, body in files.items()},
        shards=ordered,
        train_camera_ids=plan.sources.train_camera_ids,
        test_camera_ids=plan.sources.test_camera_ids,
        frontal_camera_id=plan.sources.frontal_camera_id,
        keypoint_names=first.capture.keypoint_names,
        splits={split: tuple(segments) for split, segments in plan.splits.items()},
        image_size_hw=image_size_hw,
        texture_size=size,
        num_vertices=first.capture.topology.num_vertices,
    )
    with contextlib.suppress(ShardSetError):
        present = Manifest.load(out_uri)
        if present.fingerprint == plan.fingerprint and (present.shards, present.files) == (ordered, manifest.files):
            return present
    manifest.save(out_uri)
    return manifest


def find_committed(out_uri: str, plan: ShardPlan, *, check_digests: bool = False) -> Manifest | None:
    """The manifest of a set that this very plan has written completely; None if there is work to do.

    Every shard's size is compared with the manifest; with ``check_digests`` every byte is. A set in which corrupt
    files were skipped is not complete for a plan whose policy is to fail.

    Raises:
        CaptureError: more files were skipped than the configuration allows.
    """
    try:
        manifest = Manifest.load(out_uri)
    except ShardSetError:
        return None
    if manifest.fingerprint != plan.fingerprint or (manifest.skipped() and plan.config.on_error == "fail"):
        return None
    _check_skipped(plan.sources.uri, plan.config, manifest.shards)
    digests = manifest.files | ({shard.name: shard.sha256 for shard in manifest.shards} if check_digests else {})

    def has_its_size(shard: ShardRecord) -> bool:
        return storage.size_bytes(storage.join(out_uri, shard.name)) == shard.size_bytes

    try:
        with ThreadPoolExecutor(_LOOK_UPS_AT_ONCE) as pool:
            intact = all(pool.map(has_its_size, manifest.shards))
        intact = intact and all(storage.sha256_hex(storage.join(out_uri, name)) == sha for name, sha in digests.items())
    except storage.ObjectNotFoundError:
        return None
    return manifest if intact else None


def write_shards(captures: Captures, config: ShardConfig, out_uri: str) -> Manifest:
    """The whole job in this process: plan, write, take statistics, commit; nothing if that was done before.

    Args:
        captures: one, or several by name, each open or by its URI.
        config: the configuration of the set.
        out_uri: the folder of the set.

    Raises:
        LipflowError: as the single steps.
    """
    config = config.model_copy(update={"splits": with_split_files(config.splits)})
    plan = plan_shards(captures, config)
    done = find_committed(out_uri, plan)
    if done is not None:
        remove_leftovers(out_uri, plan.fingerprint)
        return done
    names = [task.name for task in plan.shards]
    records: list[ShardRecord] = []
    faults: list[SkippedFile] = []
    limit = FaultLimit()
    sums = OrderedSums(names)
    with claimed(out_uri, plan.fingerprint, names):
        for task in plan.shards:
            try:
                outcome = finish_shard(plan.sources.of(task.capture_name), plan.config, task, out_uri)
            except CorruptFilesError as error:
                faults += error.files
                if limit.is_passed_by(len(error.files)):
                    break
            else:
                records.append(outcome.record)
                sums.add(task.name, outcome.sums)
        if faults:
            raise CorruptFilesError(plan.sources.uri, tuple(faults), FETCH_OR_SKIP)
        return commit(out_uri, plan, records, reduce_statistics(plan, [sums.total()]))


def _present_record(config: ShardConfig, task: ShardTask, out_uri: str) -> ShardRecord | None:
    """The record of the shard if the very same one lies there, whole; every byte of it is compared.

    Raises:
        ConfigError: a shard of another plan lies there.
    """
    sidecar = read_sidecar(out_uri, task.name)
    if sidecar is None:
        return None
    if sidecar.fingerprint != task.fingerprint:
        raise foreign_plan_error(out_uri, task.name)
    record, shard_uri = sidecar.record, storage.join(out_uri, task.name)
    if record.skipped and config.on_error == "fail":
        return None
    try:
        if storage.size_bytes(shard_uri) != record.size_bytes or storage.sha256_hex(shard_uri) != record.sha256:
            return None
    except storage.ObjectNotFoundError:
        return None
    return record


def _check_skipped(capture_uri: str, config: ShardConfig, records: tuple[ShardRecord, ...]) -> None:
    skipped = [item for record in records for item in record.skipped]
    total = len(skipped) + sum(len(sample.members) for record in records for sample in record.samples)
    if skipped and len(skipped) > config.max_skipped_fraction * total:
        raise CaptureError(
            f"{capture_uri}: {len(skipped)} of {total} files cannot be used, at most"
            f" {config.max_skipped_fraction:.1%} may be skipped; first: {skipped[0].path}: {skipped[0].reason}"
        )


__all__ = [
    "FETCH_OR_SKIP",
    "ShardConfig",
    "ShardOutcome",
    "ShardPlan",
    "ShardSources",
    "ShardTask",
    "StoredCapture",
    "commit",
    "find_committed",
    "finish_shard",
    "named_captures",
    "open_for_sharding",
    "plan_shards",
    "reduce_statistics",
    "shard_statistics",
    "write_shard",
    "write_shards",
]
