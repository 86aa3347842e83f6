"""What is in a capture, and what it lacks: counts of everything, from listings and a few headers alone.

The facts are those of storage against the capture's own frame list and calibration. Whether a file that is there can
be used is another question, which decoding it answers (:mod:`pipeline.checks.verification`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from lipflow.render.lens import distort, valid_radius
from lipflow.types import Camera
from pipeline.capture import Capture, HeadsetSequence
from pipeline.checks.capture_report import (
    CameraFacts,
    CaptureReport,
    DrivingFacts,
    DrivingSource,
    FrontalSource,
    HeadsetSequenceFacts,
    MissingViews,
    SegmentFacts,
    StatisticsFacts,
    TopologyFacts,
    Totals,
)
from pipeline.driving.headset import HEADSET_LANDMARKS
from pipeline.driving.landmarks import multiface_landmarks

__all__ = ["distortion_shift_px", "inspect_capture"]

_LISTING_THREADS = 8
_SHIFT_GRID = 65


@dataclass(frozen=True)
class _SegmentCounts:
    facts: SegmentFacts
    missing_by_camera: dict[str, int]
    uncalibrated_cameras: frozenset[str]
    view_textures: int
    missing_headset_views: int
    keypoint_frames: int


def inspect_capture(capture: Capture, on_segment: Callable[[], None] | None = None) -> CaptureReport:
    """Count what a capture has and lacks. No image is decoded but the mean texture of its statistics.

    Segments are listed a few at a time in threads, and only counts are kept of each.

    Args:
        capture: an open capture.
        on_segment: called once for each segment that has been listed, for progress.

    Raises:
        CaptureError: what the reader raises about calibration, topology or statistics that cannot be used.
        StorageError: storage that cannot be listed.
    """
    cameras, topology = capture.cameras, capture.topology
    statistics = _statistics(capture)
    counts = []
    for segment_counts in _count_all(capture):
        counts.append(segment_counts)
        if on_segment is not None:
            on_segment()
    missing = Counter[str]()
    for segment_counts in counts:
        missing.update(segment_counts.missing_by_camera)
    frames = sum(part.facts.frames for part in counts)
    sizes = Counter(_wxh(camera.image_size_hw) for camera in cameras)
    return CaptureReport(
        uri=capture.uri,
        layout=capture.layout,
        totals=_totals(counts, frames * len(cameras)),
        image_sizes=dict(sizes),
        texture_size=capture.texture_size,
        topology=TopologyFacts(topology.num_vertices, len(topology.faces), len(topology.uvs), len(topology.landmarks)),
        statistics=statistics,
        driving=_driving(capture, counts),
        headset_sequence=None if capture.headset_sequence is None else _sequence(capture.headset_sequence),
        notes=capture.notes(),
        uncalibrated_cameras=tuple(sorted(frozenset().union(*(part.uncalibrated_cameras for part in counts)))),
        cameras=tuple(_camera(camera, missing[camera.camera_id]) for camera in cameras),
        segments=tuple(part.facts for part in counts),
        missing_views=tuple(
            MissingViews(part.facts.segment, camera_id, views)
            for part in counts
            for camera_id, views in part.missing_by_camera.items()
            if views
        ),
    )


def distortion_shift_px(camera: Camera) -> float:
    """The farthest that a camera's lens moves a point whose pinhole projection lies in the image, pixels.

    Points beyond the radius at which the lens model turns back are left out: it says nothing about them.
    """
    if not np.any(camera.distortion):
        return 0.0
    height, width = camera.image_size_hw
    x, y = np.meshgrid(np.linspace(0, width, _SHIFT_GRID), np.linspace(0, height, _SHIFT_GRID))
    pixels = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], axis=-1)
    points = (pixels @ np.linalg.inv(camera.intrinsics).T)[:, :2]
    points = points[np.linalg.norm(points, axis=1) <= valid_radius(camera.distortion)]
    moved = distort(torch.from_numpy(points), torch.from_numpy(np.asarray(camera.distortion, np.float64))).numpy()
    return float(np.linalg.norm((moved - points) @ camera.intrinsics[:2, :2].T, axis=1).max(initial=0.0))


def _count_all(capture: Capture) -> Iterator[_SegmentCounts]:
    first, *others = capture.segments
    # Alone, so that what a reader keeps of its archives is not read by all threads at once.
    yield _count(capture, first)
    pool = ThreadPoolExecutor(_LISTING_THREADS, thread_name_prefix="listing")
    try:
        yield from pool.map(lambda segment: _count(capture, segment), others)
    finally:
        pool.shutdown(cancel_futures=True)


def _count(capture: Capture, segment: str) -> _SegmentCounts:
    listed, listing = frozenset(capture.segments[segment]), capture.listing(segment)
    calibrated = [camera.camera_id for camera in capture.cameras]
    none: frozenset[str] = frozenset()
    missing = {camera_id: len(listed - listing.images.get(camera_id, none)) for camera_id in calibrated}
    by_camera = (listing.images, listing.view_textures, listing.headset)
    stored = frozenset().union(
        listing.vertices,
        listing.poses,
        listing.average_textures,
        listing.keypoints,
        *(stems for kind in by_camera for stems in kind.values()),
    )
    facts = SegmentFacts(
        segment=segment,
        frames=len(listed),
        missing_views=sum(missing.values()),
        missing_meshes=len(listed - listing.vertices),
        missing_poses=len(listed - listing.poses),
        missing_average_textures=len(listed - listing.average_textures),
        stray_frames=len(stored - listed),
    )
    return _SegmentCounts(
        facts=facts,
        missing_by_camera=missing,
        uncalibrated_cameras=frozenset(listing.images) - frozenset(calibrated),
        view_textures=sum(len(listed & listing.view_textures.get(camera_id, none)) for camera_id in calibrated),
        missing_headset_views=sum(
            len(listed - listing.headset.get(camera.camera_id, none)) for camera in capture.headset_cameras
        ),
        keypoint_frames=len(listed & listing.keypoints) if capture.keypoint_names else 0,
    )


def _totals(counts: list[_SegmentCounts], views: int) -> Totals:
    facts = [part.facts for part in counts]
    missing_views = sum(part.missing_views for part in facts)
    view_textures = sum(part.view_textures for part in counts)
    return Totals(
        frames=sum(part.frames for part in facts),
        views=views,
        missing_views=missing_views,
        missing_share=missing_views / views,
        missing_meshes=sum(part.missing_meshes for part in facts),
        missing_poses=sum(part.missing_poses for part in facts),
        missing_average_textures=sum(part.missing_average_textures for part in facts),
        stray_frames=sum(part.stray_frames for part in facts),
        view_textures=view_textures,
        view_textures_share=view_textures / views,
    )


def _driving(capture: Capture, counts: Sequence[_SegmentCounts]) -> DrivingFacts:
    topology, headset, frontal_id = capture.topology, capture.headset_cameras, capture.frontal_camera_id
    frames = sum(part.facts.frames for part in counts)
    keypoint_frames = sum(part.keypoint_frames for part in counts)
    known = (multiface_landmarks(topology) or {}) | dict(topology.landmarks)
    placeable = all(name in known for name in HEADSET_LANDMARKS)
    made: DrivingSource = "rendered when sharded" if placeable else "needs driving.landmarks"
    projected: DrivingSource = "rendered when sharded" if known and frontal_id is not None else made
    chosen: FrontalSource = "chosen when sharded" if placeable else "needs driving.landmarks"
    return DrivingFacts(
        headset="stored" if headset else made,
        headset_camera_ids=tuple(camera.camera_id for camera in headset),
        headset_views=frames * len(headset),
        missing_headset_views=sum(part.missing_headset_views for part in counts),
        frontal=chosen if frontal_id is None else "declared",
        frontal_camera_id=frontal_id,
        keypoints="stored" if keypoint_frames else projected,
        keypoint_names=len(capture.keypoint_names),
        keypoint_frames=keypoint_frames,
    )


def _camera(camera: Camera, missing_views: int) -> CameraFacts:
    (fx, _, cx), (_, fy, cy), _ = camera.intrinsics.tolist()
    height, width = camera.image_size_hw
    return CameraFacts(
        camera_id=camera.camera_id,
        image_size_hw=(int(height), int(width)),
        focal_px=(fx, fy),
        principal_point_px=(cx, cy),
        distortion=tuple(float(k) for k in camera.distortion) if np.any(camera.distortion) else None,
        distortion_shift_px=distortion_shift_px(camera),
        missing_views=missing_views,
    )


def _statistics(capture: Capture) -> StatisticsFacts | None:
    normalization = capture.normalization()
    if normalization is None:
        return None
    red, green, blue = normalization.texture_mean.mean(axis=(1, 2), dtype=np.float64).tolist()
    return StatisticsFacts((red, green, blue), float(normalization.texture_std), float(normalization.vertices_std))


def _sequence(sequence: HeadsetSequence) -> HeadsetSequenceFacts:
    frames = sum(len(stems) for stems in sequence.segments.values())
    views = frames * len(sequence.camera_ids)
    there = sum(
        1 for segment, stems in sequence.segments.items() for stem in stems for _ in sequence.assets(segment, stem)
    )
    return HeadsetSequenceFacts(sequence.camera_ids, len(sequence.segments), frames, views, views - there)


def _wxh(size_hw: tuple[int, int]) -> str:
    return f"{size_hw[1]}x{size_hw[0]}"
