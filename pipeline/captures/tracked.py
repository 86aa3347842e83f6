"""Meshes, head poses, cameras, statistics and arrays as capture files state them: checked, in our conventions.

Every reader passes what it parsed through these functions, so that the same fault has the same name in all layouts.
"""

from __future__ import annotations

import io
import math
import tokenize

import numpy as np

from lipflow.errors import CaptureError
from pipeline.capture_errors import (
    PoseNotRigidError,
    SingularIntrinsicsError,
    VertexCountError,
    VertexNotFiniteError,
)

_RIGID_TOLERANCE = 1e-3
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def checked_vertices(vertices: np.ndarray, count: int, source: str) -> np.ndarray:
    """``vertices (V, 3)`` mm as float32.

    Raises:
        VertexCountError: V is not ``count``, the number of the capture's topology.
        VertexNotFiniteError: a coordinate is NaN or infinite.
    """
    if vertices.shape != (count, 3):
        raise VertexCountError(
            f"{source}: {len(vertices)} vertices, but the capture's topology has {count}; "
            "fetch it again, or track it with that topology"
        )
    finite = np.isfinite(vertices).all(axis=1)
    if not finite.all():
        bad = int((~finite).sum())
        raise VertexNotFiniteError(f"{source}: {bad} of {count} vertices are not finite numbers; track the frame again")
    return np.ascontiguousarray(vertices, np.float32)


def parse_vertices(body: bytes, count: int, source: str) -> np.ndarray:
    """The ``(V, 3)`` vertices of a headerless file of little-endian float32.

    Raises:
        VertexCountError: the file's size is not that of ``count`` vertices.
        VertexNotFiniteError: a coordinate is NaN or infinite.
    """
    if len(body) != count * 12:
        raise VertexCountError(
            f"{source}: {len(body) / 12:g} vertices (float32 x 3), but the capture's topology has {count}; "
            "fetch it again, or track it with that topology"
        )
    return checked_vertices(np.frombuffer(body, "<f4").reshape(count, 3).copy(), count, source)


def parse_pose(body: bytes, source: str) -> np.ndarray:
    """``world_from_head (3, 4)`` float64 from a text of twelve numbers.

    Raises:
        CaptureError: not twelve finite numbers.
        PoseNotRigidError: not a rotation and a translation.
    """
    words = body.decode("utf-8", "replace").split()
    try:
        pose = np.array([float(word) for word in words])
    except ValueError as error:
        raise CaptureError(f"{source}: expected 12 numbers, found text: {error}") from error
    if pose.size != 12 or not np.isfinite(pose).all():
        raise CaptureError(f"{source}: expected 12 finite numbers (3 x 4), found {pose.size}")
    pose = pose.reshape(3, 4)
    rotation = pose[:, :3]
    off = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
    if off > _RIGID_TOLERANCE or np.linalg.det(rotation) < 0:
        raise PoseNotRigidError(
            f"{source}: the head pose is not rigid: R R^T is off the identity by {off:.3g}, "
            f"determinant {np.linalg.det(rotation):.3g}; expected a rotation (millimetres, no scale)"
        )
    return pose


def check_camera(intrinsics: np.ndarray, cam_from_world: np.ndarray, camera_id: str, source: str) -> None:
    """Refuse a calibration that is none.

    Args:
        intrinsics: K ``(3, 3)``, pixels.
        cam_from_world: ``(3, 4)``.
        camera_id: named in the error.
        source: the calibration file, named in the error.

    Raises:
        SingularIntrinsicsError: K cannot be inverted, has a focal length that is not positive, or a last row other
            than 0 0 1.
        CaptureError: R is not a rotation.
    """
    proper = np.isfinite(intrinsics).all() and np.array_equal(intrinsics[2], [0, 0, 1]) and intrinsics[1, 0] == 0
    if not (proper and intrinsics[0, 0] > 0 and intrinsics[1, 1] > 0):
        rows = "; ".join(" ".join(f"{value:g}" for value in row) for row in intrinsics)
        raise SingularIntrinsicsError(
            f"{source}: K of camera {camera_id} is singular or no pinhole's: [{rows}]; expected positive focal "
            "lengths in an upper triangle with the last row 0 0 1; calibrate that camera again, or take it out"
        )
    rotation = cam_from_world[:, :3]
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=_RIGID_TOLERANCE) or np.linalg.det(rotation) < 0:
        raise CaptureError(f"{source}: R of camera {camera_id} is not a rotation; calibrate that camera again")


def parse_variance(body: bytes, source: str) -> float:
    """One positive number from a text.

    Raises:
        CaptureError: something else.
    """
    text = body.decode("utf-8", "replace").strip()
    try:
        value = float(text)
    except ValueError as error:
        raise CaptureError(f"{source}: expected one number, found {text[:40]!r}") from error
    if not (np.isfinite(value) and value > 0):
        raise CaptureError(f"{source}: expected a positive variance, found {value}")
    return value


def parse_npy(body: bytes, source: str) -> np.ndarray:
    """The array of an ``npy`` file of plain numbers.

    Raises:
        CaptureError: not such a file, one of objects, or one whose header and size disagree.
    """
    stream = io.BytesIO(body)
    try:
        shape, _, dtype = _NPY_HEADERS[np.lib.format.read_magic(stream)](stream)
        whole = not dtype.hasobject and len(body) - stream.tell() == math.prod(shape) * dtype.itemsize
        if not whole or dtype.kind not in "fiu":
            raise ValueError(f"{dtype} {shape} in {len(body)} bytes")
        return np.load(io.BytesIO(body), allow_pickle=False)
    except (ValueError, KeyError, EOFError, SyntaxError, OverflowError, tokenize.TokenError) as error:
        raise CaptureError(f"{source}: not a whole npy array of numbers ({error}); fetch it again") from error
