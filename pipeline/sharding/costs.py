"""What frames of a capture take when they are stored, measured on a few of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lipflow.errors import LipflowError
from pipeline.capture import Capture
from pipeline.captures.view import SelectedCameras
from pipeline.sharding.samples import SampleEncoder, SampleSettings
from pipeline.sharding.splits import spread

MAX_FRAMES_PER_SHARD = 256
FRAMES_PER_SHARD_UNPROBED = 16
"""Where no frame can be probed: the job itself will say why."""

_PROBED_FRAMES, _TRIED_FRAMES, _PROBED_CAMERAS = 3, 8, 8
_TAR_BLOCK_BYTES = 512


@dataclass(frozen=True)
class FrameCost:
    """Of one frame with all its cameras.

    Attributes:
        size_bytes: in a tar.
        cpu_s: of one core, to read, resize and encode it.
    """

    size_bytes: float
    cpu_s: float


def probe_frames(capture: Capture, settings: SampleSettings, frames: Sequence[tuple[str, str]]) -> FrameCost | None:
    """The mean cost of a frame, from the first usable ones of ``frames`` and at most eight cameras of each.

    The size depends on the arguments alone, the time on the machine. None if no frame can be used.
    """
    cameras = spread([camera.camera_id for camera in capture.cameras], _PROBED_CAMERAS)
    unwrap_ids = tuple(camera_id for camera_id in settings.unwrap_camera_ids if camera_id in cameras)
    encoder = SampleEncoder(SelectedCameras(capture, cameras), replace(settings, unwrap_camera_ids=unwrap_ids))
    size_bytes, cpu_s, count = 0.0, 0.0, 0
    for segment, frame in frames[:_TRIED_FRAMES]:
        if count == _PROBED_FRAMES:
            break
        try:
            cost = _probe(encoder, segment, frame, cameras, len(capture.cameras))
        except LipflowError:
            continue
        if cost is not None:
            size_bytes, cpu_s, count = size_bytes + cost.size_bytes, cpu_s + cost.cpu_s, count + 1
    return FrameCost(size_bytes / count, cpu_s / count) if count else None


def frames_for(target_bytes: int, cost: FrameCost | None) -> int:
    """Frames of a shard of at most about ``target_bytes``; at least one."""
    if cost is None:
        return FRAMES_PER_SHARD_UNPROBED
    return max(1, min(MAX_FRAMES_PER_SHARD, int(target_bytes / cost.size_bytes)))


def _probe(encoder: SampleEncoder, segment: str, frame: str, cameras: list[str], all_cameras: int) -> FrameCost | None:
    """One frame's cost; what was measured on some cameras is scaled to all."""
    started = time.process_time()
    sample = encoder.sample(segment, frame)
    if sample is None:
        return None
    per_camera = tuple(f"{camera_id}." for camera_id in cameras)
    scale = all_cameras / len(cameras)
    size_bytes = cpu_s = 0.0
    for suffix, body in sample.members:
        now = time.process_time()
        weight = scale if suffix.startswith(per_camera) else 1.0
        size_bytes += weight * (_TAR_BLOCK_BYTES + -(-len(body) // _TAR_BLOCK_BYTES) * _TAR_BLOCK_BYTES)
        cpu_s += weight * (now - started)
        started = now
    return FrameCost(size_bytes, cpu_s)
