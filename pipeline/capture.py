"""What a capture is to the rest of the pipeline; :mod:`pipeline.captures.opening` opens one.

A capture is read lazily: opening it lists cameras and frames, and nothing else is read before a method of a frame
is called. A file that the capture lacks is None (a recorded fact); a file that is there and cannot be used is a
:class:`~lipflow.errors.CaptureError` that names it (:mod:`pipeline.capture_errors` has one class for each fault).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from lipflow.errors import CaptureError
from lipflow.types import Camera, Normalization, Topology

AssetKind = Literal["vertices", "pose", "average_texture", "image", "view_texture", "headset", "keypoints"]
"""The files that a frame can have. ``image``, ``view_texture`` and ``headset`` come once for each camera."""


@dataclass(frozen=True)
class Asset:
    """A file of a capture that is there, or has to be.

    Attributes:
        source: its address; of a member of an archive, ``ARCHIVE!MEMBER``.
        check: reads and decodes it whole; raises a LipflowError that says what is wrong with it.
    """

    source: str
    check: Callable[[], object]


@dataclass(frozen=True)
class SegmentListing:
    """The frame stems of one segment that have a file of each kind, by listing alone: no file is opened.

    Stems that the frame list does not name may be among them.

    Attributes:
        vertices: tracked meshes.
        poses: head poses.
        average_textures: textures averaged over cameras.
        images: dome camera id to stems.
        view_textures: dome camera id to stems.
        headset: headset camera id to stems.
        keypoints: stored 2-D keypoints.
    """

    vertices: frozenset[str]
    poses: frozenset[str]
    average_textures: frozenset[str]
    images: Mapping[str, frozenset[str]]
    view_textures: Mapping[str, frozenset[str]] = field(default_factory=dict)
    headset: Mapping[str, frozenset[str]] = field(default_factory=dict)
    keypoints: frozenset[str] = frozenset()


@runtime_checkable
class CaptureFrame(Protocol):
    """One instant of a capture, seen by all cameras. Files come back encoded, exactly as they are stored."""

    @property
    def segment(self) -> str:
        """The segment it belongs to."""

    @property
    def frame(self) -> str:
        """The stem of its files, such as ``"000012"``."""

    def vertices(self) -> np.ndarray:
        """``(V, 3)`` float32 tracked mesh, mm, head frame."""

    def world_from_head(self) -> np.ndarray:
        """``(3, 4)`` float64 rigid head pose, mm."""

    def average_texture_file(self) -> bytes | None:
        """The encoded texture averaged over cameras; row 0 of the file is v = 1. None if the capture lacks it."""

    def image_file(self, camera_id: str) -> bytes | None:
        """The encoded image of one camera; None if the view is missing."""

    def view_texture_file(self, camera_id: str) -> bytes | None:
        """The encoded texture unwrapped from one camera, row 0 is v = 1; None if the capture lacks it."""

    def headset_file(self, camera_id: str) -> bytes | None:
        """The encoded monochrome image of one headset camera; None if it is missing."""

    def keypoints(self) -> np.ndarray | None:
        """``(L, 3)`` float32 x_px, y_px and confidence 0..1, in ``keypoint_names`` order.

        Pixels are those of the frontal camera without its lens distortion.
        """

    def source_of(self, kind: AssetKind, camera_id: str | None = None) -> str:
        """Where a file of the frame lies (or would lie), for messages and reports."""

    def assets(self) -> Iterator[Asset]:
        """Every file of the frame that is there, and those that have to be; nothing is read before a check."""


@runtime_checkable
class HeadsetSequence(Protocol):
    """Frames of a headset worn by the captured subject at another time: not paired with the dome's frames."""

    @property
    def camera_ids(self) -> tuple[str, ...]:
        """The headset's cameras, which have no calibration."""

    @property
    def segments(self) -> dict[str, tuple[str, ...]]:
        """Segment to its sorted frame stems."""

    def image_file(self, segment: str, frame: str, camera_id: str) -> bytes | None:
        """The encoded monochrome image; None if it is missing."""

    def assets(self, segment: str, frame: str) -> Iterator[Asset]:
        """The images of one frame that are there."""


@runtime_checkable
class Capture(Protocol):
    """Cameras, topology and frames of one captured subject."""

    @property
    def layout(self) -> str:
        """The name of the layout it was read in, such as ``"multiface"``."""

    @property
    def uri(self) -> str:
        """Where the capture lies."""

    @property
    def cameras(self) -> tuple[Camera, ...]:
        """The dome cameras, in calibration order, K in pixels of the stored images."""

    @property
    def headset_cameras(self) -> tuple[Camera, ...]:
        """Head-fixed cameras whose ``cam_from_world`` holds cam_from_head; empty if there are none."""

    @property
    def frontal_camera_id(self) -> str | None:
        """The dome camera that drives with a single image; None if none was declared."""

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        """The names of the rows of :meth:`CaptureFrame.keypoints`; empty if there are none."""

    @property
    def topology(self) -> Topology:
        """What all meshes share."""

    @property
    def segments(self) -> dict[str, tuple[str, ...]]:
        """Segment to its sorted frame stems."""

    @property
    def texture_size(self) -> int:
        """Edge length of the average texture files, texels."""

    def frame(self, segment: str, frame: str) -> CaptureFrame:
        """The frame of that segment and stem; CaptureError if the capture does not list it."""

    def normalization(self) -> Normalization | None:
        """Statistics from the capture's own files (over all of its segments); None where it has none."""

    def listing(self, segment: str) -> SegmentListing:
        """Which files of a segment are there; a few listings of folders, or none, and no file is opened."""

    def shared_assets(self) -> Iterator[Asset]:
        """The files that belong to no single frame: calibration, topology, statistics, audio."""

    def notes(self) -> tuple[str, ...]:
        """What else it holds, a line each, such as audio; for people."""

    @property
    def headset_sequence(self) -> HeadsetSequence | None:
        """The unpaired headset capture of the same subject; None if there is none."""


def require_pinhole(cameras: Iterable[Camera], source: str) -> None:
    """Refuse cameras with lens distortion, which the renderer does not model.

    Raises:
        CaptureError: a camera has a distortion coefficient other than zero.
    """
    for camera in cameras:
        if np.any(camera.distortion):
            raise CaptureError(
                f"{source}: camera {camera.camera_id} has distortion {np.asarray(camera.distortion).tolist()}; "
                "undistort its images and set the coefficients to zero, or leave the camera out"
            )
