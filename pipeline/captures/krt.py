"""The KRT text format of Multiface: camera calibrations with integer pixel centres.

A camera is an id line, three lines of K, one line of five distortion coefficients (k1, k2, p1, p2, k3), three
lines of the world-to-camera ``[R | t]`` in millimetres, and an empty line. The file states no image size, and its
pixel ``(0, 0)`` is the *centre* of the first pixel; ours is ``(0.5, 0.5)``. Both conversions are made here only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from lipflow.errors import CaptureError
from lipflow.types import Camera
from pipeline.capture_errors import DuplicateCameraError
from pipeline.captures.tracked import check_camera

_BLOCK_SHAPES = ((3, 3), (1, 5), (3, 4))
_PIXEL_CENTRE = 0.5


def parse_krt(text: str, image_size_hw: tuple[int, int], source: str) -> tuple[Camera, ...]:
    """Cameras of a KRT file, in its order, converted to pixel centres at +0.5.

    Args:
        text: the file's content.
        image_size_hw: size of the images that the calibration refers to, pixels.
        source: path named in errors.

    Raises:
        DuplicateCameraError: a camera id that comes twice.
        SingularIntrinsicsError: a K that is no pinhole camera's.
        CaptureError: a line that is not what the format wants there, a rotation that is none, or no camera at all.
    """
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise CaptureError(f"{source}: no camera in it; expected a KRT calibration")
    cameras: dict[str, Camera] = {}
    position = 0
    while position < len(lines):
        number, words = lines[position]
        if len(words) != 1:
            raise CaptureError(f"{source}:{number}: expected a camera id alone on its line, found {len(words)} words")
        camera_id = words[0]
        if camera_id in cameras:
            raise DuplicateCameraError(
                f"{source}:{number}: camera {camera_id} is calibrated twice; remove one of the two"
            )
        position += 1
        blocks = []
        for rows, columns in _BLOCK_SHAPES:
            blocks.append(_parse_block(lines, position, rows, columns, camera_id, source))
            position += rows
        intrinsics, distortion, cam_from_world = blocks
        check_camera(intrinsics, cam_from_world, camera_id, f"{source}:{number}")
        intrinsics[:2, 2] += _PIXEL_CENTRE
        cameras[camera_id] = Camera(camera_id, intrinsics, cam_from_world, image_size_hw, distortion[0])
    return tuple(cameras.values())


def format_krt(cameras: Iterable[Camera]) -> str:
    """The KRT file of ``cameras``; reading it back gives the same float64 values to the last bit or so."""
    blocks = []
    for camera in cameras:
        intrinsics = np.array(camera.intrinsics, dtype=np.float64)
        intrinsics[:2, 2] -= _PIXEL_CENTRE
        rows = [*intrinsics, camera.distortion, *camera.cam_from_world]
        numbers = [" ".join(repr(float(value)) for value in row) for row in rows]
        blocks.append("\n".join([camera.camera_id, *numbers]) + "\n")
    return "\n".join(blocks)


def _parse_block(
    lines: list[tuple[int, list[str]]], start: int, rows: int, columns: int, camera_id: str, source: str
) -> np.ndarray:
    block = np.empty((rows, columns))
    for row in range(rows):
        if start + row >= len(lines):
            raise CaptureError(f"{source}:{lines[-1][0]}: the file ends inside the calibration of camera {camera_id}")
        number, words = lines[start + row]
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        if len(values) != columns or not all(math.isfinite(value) for value in values):
            raise CaptureError(
                f"{source}:{number}: expected {columns} numbers of camera {camera_id}, found {' '.join(words)!r}"
            )
        block[row] = values
    return block
