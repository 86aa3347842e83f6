"""The configuration of a shard set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lipflow.config import StrictConfig
from pipeline.driving.driven import DrivingConfig
from pipeline.images.codecs import Chroma, ImageCodec, LosslessCodec, ResizeFilter
from pipeline.sharding.splits import SplitConfig


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
        texture_codec: of the average textures, all lossless. ``planar`` (:mod:`pipeline.images.planar`) decodes in a
            seventh of PNG's time; ``png`` is a format that everything reads, and passes the capture's files through.
        resize_filter: ``box`` averages the pixels that fall into one; ``lanczos`` is sharper and rings.
        target_shard_bytes: size of a shard, from which the number of its frames is chosen: a few frames are encoded
            to learn their size.
        frames_per_shard: samples of one tar; None: as many as ``target_shard_bytes`` holds.
        seed: of the order of frames.
        splits: segments and cameras of training, validation and test.
        store_view_textures: also store the textures unwrapped from single cameras, where the capture has them.
        statistics: ``recompute`` over the training segments, or take the only ``capture``'s own files.
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
