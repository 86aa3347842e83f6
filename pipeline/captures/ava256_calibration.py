"""``camera_calibration.json`` of Ava-256: K and T transposed, and K for the full sensor whatever the images' size.

K is read as continuous image coordinates, in which the first pixel spans 0..1, so that K scales with the image and
nothing else is added: the public loader divides focal lengths and principal points by the downsampling factor alone.
(Multiface's KRT is another convention: there the first pixel's *centre* is 0.) The loader of Goliath, whose file has
the same format, takes the principal point for integer-centred; the two readings are half a *sensor* pixel apart:
0.125 px in the release of 1024 x 667 images, 0.25 px in that of 2048 x 1334.

Source: ``load_camera_calibration``, ``data/ava_dataset.py`` and ``assets/camera_calibration.json`` of
https://github.com/facebookresearch/ava-256; ``ca_code/utils/dataloader.py`` of
https://github.com/facebookresearch/goliath.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from lipflow.errors import CaptureError
from lipflow.types import Camera
from pipeline.capture_errors import DuplicateCameraError, ImageSizeError
from pipeline.captures.tracked import check_camera

SENSOR_SIZE_HW = (4096, 2668)
"""Height and width of the sensor that K is stated for, pixels."""

_PROJECTION, _DISTORTION = "Pinhole", "RadialAndTangential"
_SHAPES = {"K": (3, 3), "distortion": (4,), "T": (4, 4)}


def parse_calibration(text: str, image_size_hw: tuple[int, int], source: str) -> tuple[Camera, ...]:
    """The cameras of a ``camera_calibration.json``, in its order, for images of ``image_size_hw``.

    Distortion is k1, k2, p1, p2 of the file and k3 = 0.

    Args:
        text: the file's content.
        image_size_hw: (height, width) of the stored images, pixels.
        source: path named in errors.

    Raises:
        ImageSizeError: the images have another aspect than the sensor, so that no scale of K fits them.
        DuplicateCameraError: a camera that comes twice.
        SingularIntrinsicsError: a K that is no pinhole camera's.
        CaptureError: not such a file, another camera model, or a rotation that is none.
    """
    scale = _sensor_scale(image_size_hw, source)
    cameras: dict[str, Camera] = {}
    for number, entry in enumerate(_entries(text, source)):
        camera_id = _camera_id(entry, number, source)
        if camera_id in cameras:
            raise DuplicateCameraError(f"{source}: camera {camera_id} is calibrated twice; remove one of the two")
        _check_models(entry, camera_id, source)
        intrinsics = _numbers(entry, "K", camera_id, source).T
        pose = _numbers(entry, "T", camera_id, source).T
        if not np.array_equal(pose[3], [0, 0, 0, 1]):
            raise CaptureError(
                f"{source}: T of camera {camera_id} ends in {pose[3].tolist()} once transposed, expected 0 0 0 1; "
                "T is stored transposed, with the translation in its last row"
            )
        check_camera(intrinsics, pose[:3], camera_id, source)
        distortion = np.append(_numbers(entry, "distortion", camera_id, source), 0.0)
        cameras[camera_id] = Camera(camera_id, scale @ intrinsics, pose[:3].copy(), image_size_hw, distortion)
    return tuple(cameras.values())


def _sensor_scale(image_size_hw: tuple[int, int], source: str) -> np.ndarray:
    """``(3, 3)`` from the sensor's image coordinates to those of the stored images, per axis."""
    height, width = image_size_hw
    by_height, by_width = height / SENSOR_SIZE_HW[0], width / SENSOR_SIZE_HW[1]
    # Either side may have been rounded to whole pixels from the other.
    off_px = min(abs(width - by_height * SENSOR_SIZE_HW[1]), abs(height - by_width * SENSOR_SIZE_HW[0]))
    if min(height, width) < 1 or off_px >= 1.0:
        raise ImageSizeError(
            f"{source}: calibrated for a sensor of {SENSOR_SIZE_HW[1]}x{SENSOR_SIZE_HW[0]} pixels (W x H), but the "
            f"stored images are {width}x{height}, of another aspect; resize the uncropped images (1334x2048, 667x1024)"
        )
    return np.diag([by_width, by_height, 1.0])


def _entries(text: str, source: str) -> list[Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CaptureError(f"{source}: not JSON ({error}); fetch it again") from error
    entries = document.get("KRT") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise CaptureError(f'{source}: no camera in it; expected {{"KRT": [...]}} as in the Ava-256 release')
    return entries


def _camera_id(entry: Any, number: int, source: str) -> str:
    camera_id = entry.get("cameraId") if isinstance(entry, dict) else None
    if not isinstance(camera_id, str | int) or not str(camera_id).strip() or "/" in str(camera_id):
        raise CaptureError(f"{source}: entry {number} of KRT has no usable cameraId; fetch the calibration again")
    return str(camera_id)


def _check_models(entry: dict[str, Any], camera_id: str, source: str) -> None:
    for field, expected in (("projectionModel", _PROJECTION), ("distortionModel", _DISTORTION)):
        if entry.get(field) != expected:
            raise CaptureError(
                f"{source}: {field} of camera {camera_id} is {entry.get(field)!r}, only {expected!r} is read; "
                "undistort that camera's images and calibrate them as such, or take the camera out"
            )


def _numbers(entry: dict[str, Any], field: str, camera_id: str, source: str) -> np.ndarray:
    shape = _SHAPES[field]
    try:
        values = np.array(entry.get(field), dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        values = np.empty(0)
    if values.shape != shape or not np.isfinite(values).all():
        wanted = " x ".join(str(edge) for edge in shape)
        raise CaptureError(
            f"{source}: {field} of camera {camera_id} is not {wanted} finite numbers; fetch the calibration again"
        )
    return values
