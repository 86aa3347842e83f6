"""Driving signals for captures that lack them: headset views, a frontal camera, keypoints.

Headset views are rendered from each frame's tracked mesh and its captured average texture through a simulated
headset (:mod:`pipeline.driving.headset`), the frontal camera is the dome camera nearest to the face's normal, and
keypoints are the mesh's landmarks projected into it. All of it is a function of the capture and the config:
neither the order of calls nor the process matters. What a capture has of its own is passed through.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt

from lipflow.config import StrictConfig
from lipflow.errors import CaptureError
from lipflow.types import Camera, Topology
from pipeline import storage
from pipeline.capture import Asset, Capture, CaptureFrame, SegmentListing
from pipeline.captures.view import CaptureView
from pipeline.driving.driven_frame import DrivenFrame, DrivingPlan, decode_texture, headset_pictures
from pipeline.driving.headset import HEADSET_LANDMARKS, HeadsetRig, headset_rig
from pipeline.driving.landmarks import frontal_camera_id, multiface_landmarks, read_landmarks
from pipeline.images.codecs import CodecError

_FIRST_FRAMES = 8
_TRIES_PER_SEGMENT = 4
_SKIN_GREY = 110.0
_MAX_BRIGHTNESS = 4.0


class DrivingConfig(StrictConfig):
    """How the driving signals that a capture lacks are made.

    Attributes:
        render: ``missing`` signals are made; ``never``: the capture is used as it is, and nothing below matters.
        headset_image_size_hw: (height, width) of rendered headset images, pixels.
        headset_noise_std: their sensor noise, grey levels.
        keypoint_noise_px: noise of projected keypoints, pixels of the frontal camera's stored images.
        landmarks: path or URI of a JSON of landmark names and vertex indices; None for the capture's own, or the
            built-in ones if its topology is Multiface's.
        frontal_camera: id of a dome camera; None for the one that the capture declares, or else the one nearest to
            the face's normal.
        seed: of the headset's mounting tolerances and gains, and of all noise.
        supersampling: rendered samples a headset pixel, along each axis.
    """

    render: Literal["missing", "never"] = "missing"
    headset_image_size_hw: tuple[PositiveInt, PositiveInt] = (96, 128)
    headset_noise_std: float = Field(2.0, ge=0.0)
    keypoint_noise_px: float = Field(0.0, ge=0.0)
    landmarks: str | None = None
    frontal_camera: str | None = None
    seed: int = Field(0, ge=0)
    supersampling: int = Field(2, ge=1, le=4)


def with_driving(capture: Capture, config: DrivingConfig, frontal_among: Collection[str] | None = None) -> Capture:
    """The capture with the driving signals that it lacks; itself if it lacks none, or if none are to be made.

    The headset and the frontal camera are placed by the mean of the first frames of up to eight segments, once.
    Where the landmarks for that are not known, the capture stays without these signals, and its notes say so.

    Args:
        capture: any capture.
        config: what to make.
        frontal_among: ids of the cameras among which a frontal one that has to be found is chosen, such as the
            training cameras; None for all.

    Raises:
        CaptureError: the landmarks or the frontal camera that the config names cannot be used, no first frame has a
            mesh and a head pose, or headset views are to be rendered and none of those frames has a texture.
    """
    if config.render == "never":
        return capture
    declared = capture.frontal_camera_id
    frontal_id = config.frontal_camera or declared
    by_id = {camera.camera_id: camera for camera in capture.cameras}
    if config.frontal_camera is not None and config.frontal_camera not in by_id:
        raise CaptureError(
            f"{capture.uri}: driving.frontal_camera is {config.frontal_camera!r}, which is none of its cameras; "
            f"choose one of {', '.join(by_id)}"
        )
    own_headset = bool(capture.headset_cameras)
    # Stored keypoints are pixels of the declared camera, in the order of the capture's own landmarks.
    keeps_both = declared is not None and declared == frontal_id and config.landmarks is None
    own_keypoints = keeps_both and _stores_keypoints(capture)
    if own_headset and own_keypoints:
        return capture
    landmarks = _landmarks(capture, config)
    topology = replace(capture.topology, landmarks=landmarks.vertices)
    rig, brightness, remarks = None, 1.0, []
    if landmarks.lacking:
        absent = (("headset views", not own_headset), ("frontal camera", frontal_id is None))
        names = [name for name, is_absent in absent if is_absent]
        names += ["keypoints"] if not own_keypoints and (frontal_id is None or not landmarks.vertices) else []
        if names:
            remarks.append(f"no {', '.join(names)}: {landmarks.lacking}; give driving.landmarks=FILE.json")
    elif not own_headset or frontal_id is None:
        frames = _first_frames(capture)
        head = np.mean([frame.vertices for frame in frames], axis=0)
        candidates = [camera for name, camera in by_id.items() if frontal_among is None or name in frontal_among]
        frontal_id = frontal_id or frontal_camera_id(
            candidates, landmarks.placing, head, _mean_pose([frame.pose for frame in frames])
        )
        if not own_headset:
            positions = {name: head[vertex] for name, vertex in landmarks.placing.items()}
            rig = headset_rig(positions, config.headset_image_size_hw, config.seed)
            brightness = _brightness(capture, frames, rig, topology)
    frontal = by_id.get(frontal_id or "")
    projects = not own_keypoints and frontal is not None and bool(landmarks.vertices)
    plan = DrivingPlan(config, topology, frontal, rig, brightness, projects)
    remarks += _remarks(plan, landmarks.origin, declared)
    return DrivenCapture(capture, plan, tuple(remarks))


class DrivenCapture(CaptureView):
    """A capture whose missing driving signals are made on demand; see :func:`with_driving`.

    Args:
        inner: where everything else comes from.
        plan: how the signals are made.
        remarks: lines that :meth:`notes` adds.
    """

    def __init__(self, inner: Capture, plan: DrivingPlan, remarks: tuple[str, ...]):
        super().__init__(inner)
        self.plan = plan
        self._remarks = remarks

    @property
    def headset_cameras(self) -> tuple[Camera, ...]:
        """The rig's, or the inner capture's."""
        return self.inner.headset_cameras if self.plan.rig is None else self.plan.rig.cameras

    @property
    def frontal_camera_id(self) -> str | None:
        """Chosen once, for all frames; None if it could not be told."""
        return None if self.plan.frontal is None else self.plan.frontal.camera_id

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        """The names of the projected landmarks, or of the inner capture's keypoints."""
        return tuple(self.topology.landmarks) if self.plan.projects_keypoints else self.inner.keypoint_names

    @property
    def topology(self) -> Topology:
        """The inner capture's, with landmarks where they are known."""
        return self.plan.topology

    def frame(self, segment: str, frame: str) -> CaptureFrame:
        """The frame of that segment and stem; CaptureError if the inner capture does not list it."""
        return DrivenFrame(self.inner.frame(segment, frame), self.plan)

    def listing(self, segment: str) -> SegmentListing:
        """The inner capture's, with the views and keypoints that can be made of its files."""
        listing = self.inner.listing(segment)
        if self.plan.rig is not None:
            rendered = listing.vertices & listing.average_textures
            listing = replace(listing, headset={camera.camera_id: rendered for camera in self.plan.rig.cameras})
        if self.plan.projects_keypoints:
            listing = replace(listing, keypoints=listing.vertices & listing.poses)
        return listing

    def shared_assets(self) -> Iterator[Asset]:
        """The inner capture's, and the landmarks that the config names."""
        yield from self.inner.shared_assets()
        path = self.plan.config.landmarks
        if path is not None:
            topology = self.inner.topology
            yield Asset(storage.normalize_uri(path), lambda: read_landmarks(path, topology, HEADSET_LANDMARKS))

    def notes(self) -> tuple[str, ...]:
        """The inner capture's, and what was made and how."""
        return (*self.inner.notes(), *self._remarks)


@dataclass(frozen=True)
class _Landmarks:
    """Named vertices: the keypoints' (maybe none), those that place the headset, and why they cannot, if so."""

    vertices: dict[str, int]
    placing: dict[str, int]
    origin: str
    lacking: str = ""


def _landmarks(capture: Capture, config: DrivingConfig) -> _Landmarks:
    topology = capture.topology
    if config.landmarks is not None:
        given = read_landmarks(config.landmarks, topology, HEADSET_LANDMARKS)
        return _Landmarks(given, given, f"of {config.landmarks}")
    own, built_in = dict(topology.landmarks), multiface_landmarks(topology) or {}
    placing, origin = built_in | own, "of the capture" if own else "of the Multiface topology"
    missing = [name for name in HEADSET_LANDMARKS if name not in placing]
    if not missing:
        return _Landmarks(own or built_in, placing, origin)
    lacks = f"lacks the landmarks {', '.join(missing)}" if own else "has no landmarks"
    lacking = f"the topology of {topology.num_vertices} vertices {lacks} and is not Multiface's"
    return _Landmarks(own, {}, origin, lacking)


@dataclass(frozen=True)
class _FirstFrame:
    source: CaptureFrame
    vertices: np.ndarray
    pose: np.ndarray


def _first_frames(capture: Capture) -> list[_FirstFrame]:
    """Of every segment the first frame with a mesh and a pose among its first few, of eight segments at most.

    Raises:
        CaptureError: there is none.
    """
    found: list[_FirstFrame] = []
    for segment, stems in capture.segments.items():
        for stem in stems[:_TRIES_PER_SEGMENT]:
            source = capture.frame(segment, stem)
            try:
                found.append(_FirstFrame(source, source.vertices(), source.world_from_head()))
            except CaptureError:  # Missing, or corrupt: that is reported when the frame itself is read.
                continue
            break
        if len(found) == _FIRST_FRAMES:
            break
    if not found:
        raise CaptureError(
            f"{capture.uri}: no first frame of a segment has a tracked mesh and a head pose, by which driving signals "
            "are placed; fetch them, or set driving.render=never"
        )
    return found


def _stores_keypoints(capture: Capture) -> bool:
    """Whether one of the first frames has keypoints, be they readable or not."""
    if not capture.keypoint_names:
        return False
    for segment, stems in list(capture.segments.items())[:_FIRST_FRAMES]:
        try:
            if capture.frame(segment, stems[0]).keypoints() is not None:
                return True
        except CaptureError:
            return True
    return False


def _mean_pose(poses: list[np.ndarray]) -> np.ndarray:
    """``(3, 4)`` the rigid pose nearest to the mean of ``poses``."""
    mean = np.mean(poses, axis=0)
    u, _, vt = np.linalg.svd(mean[:, :3])
    rotation = u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt
    return np.concatenate([rotation, mean[:, 3:]], axis=1)


def _brightness(capture: Capture, frames: list[_FirstFrame], rig: HeadsetRig, topology: Topology) -> float:
    """The factor that brings a dark capture to the level at which a headset, which has lights of its own, sees skin.

    Raises:
        CaptureError: no frame has an average texture that can be used.
    """
    reason = "has one"
    for frame in frames:
        try:
            body = frame.source.average_texture_file()
            if body is None:
                continue
            texture = decode_texture(body, frame.source.source_of("average_texture"))
        except (CaptureError, CodecError) as error:
            reason = f"has one that can be used ({error})"
            continue
        pictures = headset_pictures(topology, frame.vertices, texture, rig, supersampling=1)
        level = float(pictures[..., :3].mean(axis=-1).sum() / max(float(pictures[..., 3].sum()), 1e-6))
        return float(np.clip(_SKIN_GREY / max(level, 1e-6), 1.0, _MAX_BRIGHTNESS))
    raise CaptureError(
        f"{capture.uri}: headset views are rendered from average textures, and no first frame of a segment {reason}; "
        f"run `lipflow unwrap {capture.uri}` first, or set driving.render=never"
    )


def _remarks(plan: DrivingPlan, landmarks_origin: str, declared: str | None) -> Iterator[str]:
    """What is made, a line each."""
    config, frontal = plan.config, plan.frontal
    if frontal is not None and frontal.camera_id != declared:
        why = "chosen by driving.frontal_camera" if config.frontal_camera else "the nearest to the face's normal"
        yield f"frontal camera {frontal.camera_id}: {why}"
    if plan.rig is not None:
        height, width = config.headset_image_size_hw
        yield (
            f"headset views of {len(plan.rig.cameras)} cameras, {width} x {height} (W x H): rendered from the tracked "
            f"mesh and the average texture, {plan.brightness:.2f} times as bright, seed {config.seed}"
        )
    if plan.projects_keypoints and frontal is not None:
        lens = " without its lens distortion" if np.any(frontal.distortion) else ""
        yield (
            f"keypoints: {len(plan.topology.landmarks)} landmarks {landmarks_origin}, "
            f"projected into camera {frontal.camera_id}{lens}"
        )
