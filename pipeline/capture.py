"""What a capture is to the rest of the pipeline, and the one function that opens one.

A capture is read lazily: opening it lists cameras and frames, and nothing else is read before a method of a frame
is called. A file that the capture lacks is None (a recorded fact); a file that is there and cannot be used is a
:class:`~lipflow.errors.CaptureError` that names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from lipflow.errors import CaptureError
from lipflow.types import Camera, Normalization, Topology


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
        """PNG of the texture averaged over cameras; row 0 of the file is v = 1. None if the capture lacks it."""

    def image_file(self, camera_id: str) -> bytes | None:
        """The encoded image of one camera; None if the view is missing."""

    def view_texture_file(self, camera_id: str) -> bytes | None:
        """The encoded texture unwrapped from one camera, row 0 is v = 1; None if the capture lacks it."""

    def headset_file(self, camera_id: str) -> bytes | None:
        """The encoded monochrome image of one headset camera; None if it is missing."""

    def keypoints(self) -> np.ndarray | None:
        """``(L, 3)`` float32 x_px, y_px in the frontal camera and confidence 0..1, in ``keypoint_names`` order."""


@runtime_checkable
class Capture(Protocol):
    """Cameras, topology and frames of one captured subject."""

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


def open_capture(uri: str | Path) -> Capture:
    """Open the capture at a path, ``file://`` or ``s3://`` URI.

    Raises:
        CaptureError: there is no capture, or its calibration or frame list cannot be used.
    """
    from pipeline.captures.multiface import MultifaceCapture

    return MultifaceCapture(str(uri))


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
