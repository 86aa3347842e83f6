"""What a shard set will hold: a pure function of the capture's listing and the configuration."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from lipflow.config import StrictConfig
from lipflow.errors import ConfigError
from pipeline.capture import Capture, require_pinhole
from pipeline.captures.opening import open_capture
from pipeline.captures.view import SelectedCameras
from pipeline.codecs import Chroma, ImageCodec, LosslessCodec, ResizeFilter, check_codec
from pipeline.driving.driven import DrivingConfig, with_driving
from pipeline.manifest import FORMAT_VERSION, CameraRecord, canonical_sha256
from pipeline.samples import SampleSettings
from pipeline.setfiles import encode_topology
from pipeline.shard_costs import frames_for, probe_frames
from pipeline.splits import SPLITS, Split, SplitConfig, hash_order, split_cameras, split_segments

_NOT_IN_FINGERPRINT = {"target_shard_bytes", "on_error", "max_skipped_fraction"}


class ShardConfig(StrictConfig):
    """What a shard set holds and how.

    Attributes:
        image_size_hw: of the stored images; None: as captured.
        texture_size: of the stored textures; None: as captured.
        codec: of the camera images; meshes, textures and headset views are always lossless.
        quality: of the lossy codecs.
        chroma: of the lossy codecs: ``"420"`` stores the differences of colour at half the size each way. On a real
            photo as jpeg at quality 95 that is 42.7 dB in place of 43.7, three quarters of the bytes, and seven tenths
            of the time to decode.
        texture_codec: of the average textures, all lossless. ``planar`` (:mod:`pipeline.planar`) decodes in a seventh
            of PNG's time; ``png`` is a format that everything reads, and passes the capture's files through.
        resize_filter: ``box`` averages the pixels that fall into one; ``lanczos`` is sharper and rings.
        target_shard_bytes: size of a shard, from which the number of its frames is chosen: a few frames are encoded
            to learn their size.
        frames_per_shard: samples of one tar; None: as many as ``target_shard_bytes`` holds.
        seed: of the order of frames.
        splits: segments and cameras of training, validation and test.
        store_view_textures: also store the textures unwrapped from single cameras, where the capture has them.
        statistics: ``recompute`` over the training segments, or take the ``capture``'s own files.
        distortion: what is done with images of cameras with lens distortion: undistorted to the same K, or refused.
        driving: the driving signals that are rendered where the capture has none.
        on_error: whether corrupt files fail the job, which names them all, or are listed in the manifest and skipped.
        max_skipped_fraction: with ``skip``, the fraction of all files above which the job fails nevertheless.
    """

    image_size_hw: tuple[int, int] | None = None
    texture_size: int | None = Field(default=None, gt=0)
    codec: ImageCodec = "png"
    quality: int = Field(default=95, ge=1, le=100)
    chroma: Chroma = "444"
    texture_codec: LosslessCodec = "planar"
    resize_filter: ResizeFilter = "box"
    target_shard_bytes: int = Field(default=256 * 2**20, gt=0)
    frames_per_shard: int | None = Field(default=None, gt=0)
    seed: int = 0
    splits: SplitConfig = SplitConfig()
    store_view_textures: bool = False
    statistics: Literal["recompute", "capture"] = "recompute"
    distortion: Literal["undistort", "refuse"] = "undistort"
    driving: DrivingConfig = DrivingConfig()
    on_error: Literal["fail", "skip"] = "fail"
    max_skipped_fraction: float = Field(default=0.01, ge=0, le=1)


@dataclass(frozen=True)
class ShardTask:
    """The work of one shard; small, and picklable."""

    name: str
    split: Split
    frames: tuple[tuple[str, str], ...]
    fingerprint: str


@dataclass(frozen=True)
class ShardPlan:
    """All shards of a set, in the order of the manifest.

    Attributes:
        shards: the tasks.
        config: the configuration, with ``frames_per_shard`` filled in.
        splits: split to segments.
        train_camera_ids: the training cameras.
        test_camera_ids: those that are held out.
        settings: how each frame is stored.
        fingerprint: of all that decides the shards' bytes and names.
    """

    shards: tuple[ShardTask, ...]
    config: ShardConfig
    splits: dict[str, list[str]]
    train_camera_ids: tuple[str, ...]
    test_camera_ids: tuple[str, ...]
    settings: SampleSettings
    fingerprint: str


def open_for_sharding(capture: Capture | str, config: ShardConfig) -> Capture:
    """The capture as it is stored: the cameras of the splits alone, and with driving signals.

    Args:
        capture: the open capture, or its URI.
        config: with splits that name no files any more; see :func:`pipeline.splits.with_split_files`.

    Raises:
        CaptureError: there is no such capture.
        ConfigError: splits or driving signals that do not fit it.
    """
    if isinstance(capture, str):
        capture = open_capture(capture)
    train, test = split_cameras(capture, config.splits)
    if len(train) + len(test) < len(capture.cameras):
        capture = SelectedCameras(capture, {*train, *test})
    # Cameras that are drawn by number spare the frontal one, which is therefore chosen first.
    return with_driving(capture, config.driving, frontal_among=train if config.splits.test_cameras else None)


def plan_shards(capture: Capture, config: ShardConfig) -> ShardPlan:
    """Which frames go into which shard. Frames are listed, and a few of them read; no pixel of the others is.

    Args:
        capture: as :func:`open_for_sharding` gives it.
        config: the configuration of the set.

    Raises:
        CaptureError: a camera with lens distortion that is to be refused, or a headset camera with any.
        ConfigError: splits or sizes that do not fit the capture, or a codec that is not installed.
    """
    check_codec(config.codec)
    check_codec(config.texture_codec)
    pinholes = (
        capture.headset_cameras if config.distortion == "undistort" else (*capture.cameras, *capture.headset_cameras)
    )
    require_pinhole(pinholes, capture.uri)
    splits = split_segments(capture, config.splits)
    train_cameras, test_cameras = split_cameras(capture, config.splits)
    settings = sample_settings(capture, config)
    order: dict[Split, list[tuple[str, str]]] = {}
    for split in SPLITS:
        keys = [f"{segment}/{frame}" for segment in splits[split] for frame in capture.segments[segment]]
        order[split] = [
            (key.partition("/")[0], key.partition("/")[2]) for key in hash_order(keys, config.seed, "frames")
        ]
    count = config.frames_per_shard
    if count is None:
        count = frames_for(config.target_shard_bytes, probe_frames(capture, settings, order["train"]))
        config = config.model_copy(update={"frames_per_shard": count})
    fingerprint = _fingerprint(capture, config, settings.texture_size)
    shards = tuple(
        ShardTask(f"{split}-{number:06d}.tar", split, tuple(order[split][start : start + count]), fingerprint)
        for split in SPLITS
        for number, start in enumerate(range(0, len(order[split]), count))
    )
    return ShardPlan(shards, config, splits, tuple(train_cameras), tuple(test_cameras), settings, fingerprint)


def sample_settings(capture: Capture, config: ShardConfig) -> SampleSettings:
    """How the frames of this capture are stored: the configuration, with what it leaves to the capture filled in.

    Raises:
        ConfigError: cameras of several image sizes, and none was chosen.
    """
    return SampleSettings(
        image_size_hw=config.image_size_hw or _common_image_size(capture),
        texture_size=config.texture_size or capture.texture_size,
        codec=config.codec,
        quality=config.quality,
        chroma=config.chroma,
        texture_codec=config.texture_codec,
        resize_filter=config.resize_filter,
        store_view_textures=config.store_view_textures,
        unwrap_camera_ids=tuple(split_cameras(capture, config.splits)[0]),
    )


def _common_image_size(capture: Capture) -> tuple[int, int]:
    sizes = {tuple(camera.image_size_hw) for camera in capture.cameras}
    if len(sizes) != 1:
        raise ConfigError(f"{capture.uri}: cameras with {len(sizes)} image sizes; set image_size_hw to store one size")
    height, width = sizes.pop()
    return height, width


def _fingerprint(capture: Capture, config: ShardConfig, texture_size: int) -> str:
    """What decides a set's content: the configuration, the capture's listing, and probes of its files.

    Reading every byte of a capture to name it would take as long as sharding it. The first frame of every segment
    is read instead, which tells a capture from another one that was made with the same names.

    What is done about corrupt files is not part of it: shards without one are the same under every policy, and a job
    that one has stopped can be run again with another policy.
    """
    probes = []
    for segment, frames in capture.segments.items():
        source = capture.frame(segment, frames[0])
        bodies = (source.average_texture_file(), source.image_file(capture.cameras[0].camera_id))
        probes.append([segment, *frames, *(None if body is None else _sha256(body) for body in bodies)])
    cameras = [*capture.cameras, *capture.headset_cameras]
    return canonical_sha256(
        {
            "format_version": FORMAT_VERSION,
            "config": config.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT),
            "cameras": [CameraRecord.of(camera).model_dump(mode="json") for camera in cameras],
            "frontal_camera_id": capture.frontal_camera_id,
            "keypoint_names": capture.keypoint_names,
            "topology": _sha256(encode_topology(capture.topology, texture_size)),
            "probes": probes,
        }
    )


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
