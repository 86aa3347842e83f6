"""What a shard set will hold: a pure function of the captures' listings and the configuration."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from lipflow.errors import ConfigError
from pipeline.capture import Capture, require_pinhole
from pipeline.images.codecs import check_codec
from pipeline.manifest import FORMAT_VERSION, CameraRecord, canonical_sha256
from pipeline.setfiles import encode_topology
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.costs import frames_for, probe_frames
from pipeline.sharding.segment_names import captured_segment, stored_segment
from pipeline.sharding.sources import Captures, ShardSources, StoredCapture, open_for_sharding
from pipeline.sharding.splits import SPLITS, Split, hash_order, split_segments

_NOT_IN_FINGERPRINT = {"target_shard_bytes", "on_error", "max_skipped_fraction"}


@dataclass(frozen=True)
class ShardTask:
    """The work of one shard; small, and picklable.

    Attributes:
        name: of the tar.
        split: of its frames.
        frames: segment and frame, as the capture calls them.
        fingerprint: of the plan.
        capture_name: the capture of all its frames; None for the only one of a set.
    """

    name: str
    split: Split
    frames: tuple[tuple[str, str], ...]
    fingerprint: str
    capture_name: str | None = None


@dataclass(frozen=True)
class ShardPlan:
    """All shards of a set, in the order of the manifest: of each split, capture by capture.

    Attributes:
        shards: the tasks.
        config: the configuration, with ``frames_per_shard`` filled in.
        splits: split to segments, as the set calls them.
        sources: the captures, and the cameras of training and test.
        fingerprint: of all that decides the shards' bytes and names.
    """

    shards: tuple[ShardTask, ...]
    config: ShardConfig
    splits: dict[str, list[str]]
    sources: ShardSources
    fingerprint: str


def plan_shards(sources: ShardSources | Captures, config: ShardConfig) -> ShardPlan:
    """Which frames go into which shard. Frames are listed, and a few of them read; no pixel of the others is.

    Args:
        sources: as :func:`pipeline.sharding.sources.open_for_sharding` gives them, or what it takes.
        config: the configuration of the set.

    Raises:
        CaptureError: a camera with lens distortion that is to be refused, or a headset camera with any.
        ConfigError: splits or sizes that do not fit the captures, or a codec that is not installed.
    """
    check_codec(config.codec)
    check_codec(config.texture_codec)
    if not isinstance(sources, ShardSources):
        sources = open_for_sharding(sources, config)
    several = len(sources.captures) > 1
    if several and config.statistics == "capture":
        raise ConfigError(
            f"shard.statistics=capture takes one capture's own files, but there are {len(sources.captures)} captures"
            f" ({sources.uri}); set shard.statistics=recompute"
        )
    for stored in sources.captures:
        headset = stored.capture.headset_cameras
        pinholes = headset if config.distortion == "undistort" else (*stored.capture.cameras, *headset)
        require_pinhole(pinholes, stored.capture.uri)
    splits = split_segments(sources, config.splits, captured_segment if several else str)
    orders = {stored.name: _orders(stored, splits, config.seed) for stored in sources.captures}
    count = config.frames_per_shard
    if count is None:
        costs = [
            probe_frames(stored.capture, stored.settings, _first_filled(orders[stored.name]))
            for stored in sources.captures
        ]
        count = min(frames_for(config.target_shard_bytes, cost) for cost in costs)
        config = config.model_copy(update={"frames_per_shard": count})
    fingerprint = _fingerprint(sources, config)
    shards = []
    for split in SPLITS:
        parts = [
            (stored.name, orders[stored.name][split][start : start + count])
            for stored in sources.captures
            for start in range(0, len(orders[stored.name][split]), count)
        ]
        shards += [
            ShardTask(f"{split}-{number:06d}.tar", split, tuple(frames), fingerprint, name)
            for number, (name, frames) in enumerate(parts)
        ]
    return ShardPlan(tuple(shards), config, splits, sources, fingerprint)


def _orders(stored: StoredCapture, splits: dict[str, list[str]], seed: int) -> dict[Split, list[tuple[str, str]]]:
    """Split to the frames of one capture, as it calls them, in the order of the shards."""
    order: dict[Split, list[tuple[str, str]]] = {}
    for split in SPLITS:
        chosen = set(splits[split])
        frames = {
            f"{stored_segment(segment, stored.name)}/{frame}": (segment, frame)
            for segment, names in stored.capture.segments.items()
            if stored_segment(segment, stored.name) in chosen
            for frame in names
        }
        order[split] = [frames[key] for key in hash_order(frames, seed, "frames")]
    return order


def _first_filled(order: dict[Split, list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """The training frames; those of another split where a capture has none for training."""
    return next((order[split] for split in SPLITS if order[split]), [])


def _fingerprint(sources: ShardSources, config: ShardConfig) -> str:
    """What decides a set's content: the configuration, the captures' listings, and probes of their files.

    Reading every byte of a capture to name it would take as long as sharding it. The first frame of every segment
    is read instead, which tells a capture from another one that was made with the same names.

    What is done about corrupt files is not part of it: shards without one are the same under every policy, and a job
    that one has stopped can be run again with another policy.
    """
    return canonical_sha256(
        {
            "format_version": FORMAT_VERSION,
            "config": config.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT),
            "captures": [
                {"name": stored.name, **_listing(stored.capture, stored.settings.texture_size)}
                for stored in sources.captures
            ],
        }
    )


def _listing(capture: Capture, texture_size: int) -> dict[str, Any]:
    probes = []
    for segment, frames in capture.segments.items():
        source = capture.frame(segment, frames[0])
        bodies = (source.average_texture_file(), source.image_file(capture.cameras[0].camera_id))
        probes.append([segment, *frames, *(None if body is None else _sha256(body) for body in bodies)])
    cameras = [*capture.cameras, *capture.headset_cameras]
    return {
        "cameras": [CameraRecord.of(camera).model_dump(mode="json") for camera in cameras],
        "frontal_camera_id": capture.frontal_camera_id,
        "keypoint_names": capture.keypoint_names,
        "topology": _sha256(encode_topology(capture.topology, texture_size)),
        "probes": probes,
    }


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
