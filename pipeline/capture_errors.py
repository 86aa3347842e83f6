"""The named faults of captures: one class for each way in which a file can be bad.

``lipflow verify`` reports the fault's name, which is the class name in words: ``VertexCountError`` is
``vertex-count``. Faults of single images (truncated, too large) are :mod:`pipeline.images.codecs`' own.
"""

from __future__ import annotations

import re

from lipflow.errors import CaptureError, LipflowError
from lipflow.types import Camera


class MissingFileError(CaptureError):
    """A file that the frame list promises is not there."""


class VertexCountError(CaptureError):
    """A mesh with another number of vertices than the capture's topology."""


class VertexNotFiniteError(CaptureError):
    """A mesh with a coordinate that is not a finite number."""


class PoseNotRigidError(CaptureError):
    """A head pose that is not a rotation and a translation."""


class SingularIntrinsicsError(CaptureError):
    """A camera whose K cannot be inverted, or has no positive focal lengths."""


class ImageSizeError(CaptureError):
    """An image of another size than its camera is calibrated for."""


class DuplicateCameraError(CaptureError):
    """A camera that is calibrated twice."""


class EmptySegmentError(CaptureError):
    """An expression or sentence that is listed without any frame."""


class DamagedArchiveError(CaptureError):
    """A zip that cannot be read, or a member whose bytes are not those that were stored."""


class ArchiveBombError(CaptureError):
    """A zip, or a member of one, that would unpack to more than any real file of its kind."""


_UNNAMED = ("capture", "codec", "storage")


def fault_name(error: LipflowError) -> str:
    """The name of a fault as reports show it, such as ``"vertex-count"``; ``"unreadable"`` where it has no class."""
    words = re.findall(r"[A-Z][a-z0-9]*", type(error).__name__.removesuffix("Error"))
    name = "-".join(word.lower() for word in words)
    return "unreadable" if name in _UNNAMED else name


def check_image_size(size_hw: tuple[int, int], camera: Camera, source: str) -> None:
    """Refuse an image of another size than the camera's.

    Raises:
        ImageSizeError: with both sizes.
    """
    if tuple(size_hw) != tuple(camera.image_size_hw):
        found, expected = (f"{width}x{height}" for height, width in (size_hw, camera.image_size_hw))
        raise ImageSizeError(
            f"{source}: {found} pixels (W x H), but camera {camera.camera_id} is calibrated for {expected}; "
            "fetch the image again, or the calibration that belongs to it"
        )
