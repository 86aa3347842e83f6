"""What a report on a capture says: the facts that :func:`pipeline.checks.inspection.inspect_capture` gathers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DrivingSource = Literal["stored", "rendered when sharded", "needs driving.landmarks"]
FrontalSource = Literal["declared", "chosen when sharded", "needs driving.landmarks"]


@dataclass(frozen=True)
class CameraFacts:
    """One dome camera.

    Attributes:
        camera_id: the capture's own name.
        image_size_hw: pixels.
        focal_px: (x, y).
        principal_point_px: (x, y), pixel centres at +0.5.
        distortion: k1, k2, p1, p2, k3; None for a pinhole camera.
        distortion_shift_px: the farthest that the lens moves a point of the image, pixels.
        missing_views: listed frames without an image of this camera.
    """

    camera_id: str
    image_size_hw: tuple[int, int]
    focal_px: tuple[float, float]
    principal_point_px: tuple[float, float]
    distortion: tuple[float, ...] | None
    distortion_shift_px: float
    missing_views: int


@dataclass(frozen=True)
class SegmentFacts:
    """One expression or sentence.

    Attributes:
        segment: its name.
        frames: how many the frame list names.
        missing_views: pairs of a listed frame and a calibrated camera without an image.
        missing_meshes: listed frames without a tracked mesh.
        missing_poses: listed frames without a head pose.
        missing_average_textures: listed frames without a texture averaged over cameras.
        stray_frames: frames with files on storage that the frame list does not name.
    """

    segment: str
    frames: int
    missing_views: int
    missing_meshes: int
    missing_poses: int
    missing_average_textures: int
    stray_frames: int


@dataclass(frozen=True)
class MissingViews:
    """How many views of one camera a segment lacks; only non-zero counts are kept."""

    segment: str
    camera_id: str
    views: int


@dataclass(frozen=True)
class Totals:
    """Sums over segments; ``views`` is listed frames times calibrated cameras, there or not.

    ``view_textures`` counts the textures unwrapped from single cameras that are there.
    """

    frames: int
    views: int
    missing_views: int
    missing_share: float
    missing_meshes: int
    missing_poses: int
    missing_average_textures: int
    stray_frames: int
    view_textures: int
    view_textures_share: float


@dataclass(frozen=True)
class StatisticsFacts:
    """The capture's own statistics: mean colour over all texels and one std, 0..255; one vertex std, mm."""

    mean_colour: tuple[float, float, float]
    texture_std: float
    vertices_std_mm: float


@dataclass(frozen=True)
class TopologyFacts:
    """Counts of the mesh that all frames share."""

    vertices: int
    faces: int
    uvs: int
    landmarks: int


@dataclass(frozen=True)
class DrivingFacts:
    """The impoverished signals, paired with the dome's frames.

    What the capture does not store is made from its tracked mesh when it is sharded (:mod:`pipeline.driving.driven`),
    provided that the landmarks which tell the head's axes are known.

    Attributes:
        headset: where headset views come from.
        headset_camera_ids: of the stored ones.
        headset_views: listed frames times these cameras.
        missing_headset_views: of them, without a file.
        frontal: whether the frontal dome camera is declared.
        frontal_camera_id: the declared one.
        keypoints: where 2-D keypoints come from.
        keypoint_names: how many a frame has.
        keypoint_frames: listed frames with stored keypoints.
    """

    headset: DrivingSource
    headset_camera_ids: tuple[str, ...]
    headset_views: int
    missing_headset_views: int
    frontal: FrontalSource
    frontal_camera_id: str | None
    keypoints: DrivingSource
    keypoint_names: int
    keypoint_frames: int


@dataclass(frozen=True)
class HeadsetSequenceFacts:
    """The headset capture that is not paired with the dome's frames."""

    camera_ids: tuple[str, ...]
    segments: int
    frames: int
    views: int
    missing_views: int


@dataclass(frozen=True)
class CaptureReport:
    """All of it; ``dataclasses.asdict`` gives a JSON document.

    Attributes:
        uri: where the capture lies.
        layout: the reader's name.
        totals: sums over segments.
        image_sizes: ``"WxH"`` to the number of cameras that are calibrated for it.
        texture_size: edge length of the average textures, texels.
        topology: counts of the mesh.
        statistics: None where the capture has none.
        driving: the paired driving signals.
        headset_sequence: None where there is none.
        notes: what else the reader found.
        uncalibrated_cameras: cameras with images but without calibration; they are not read.
        cameras: in calibration order.
        segments: in the frame list's order.
        missing_views: where views are missing, by segment and camera.
    """

    uri: str
    layout: str
    totals: Totals
    image_sizes: dict[str, int]
    texture_size: int
    topology: TopologyFacts
    statistics: StatisticsFacts | None
    driving: DrivingFacts
    headset_sequence: HeadsetSequenceFacts | None
    notes: tuple[str, ...]
    uncalibrated_cameras: tuple[str, ...]
    cameras: tuple[CameraFacts, ...]
    segments: tuple[SegmentFacts, ...]
    missing_views: tuple[MissingViews, ...]
