"""The single files of the Ava-256 layout: bytes in, checked arrays out."""

from __future__ import annotations

import csv
import io
import re

import numpy as np
from trimesh.exchange.ply import load_ply

from lipflow.errors import CaptureError
from pipeline.capture_errors import EmptySegmentError, VertexCountError
from pipeline.captures.tracked import checked_vertices, parse_npy

NUM_KEYPOINTS = 274
"""Ids of 3-D keypoints are 0..273."""

_MAX_PLY_BYTES = 64 * 2**20
_MAX_PLY_ELEMENTS = 10**6
_PLY_ELEMENT = re.compile(rb"^element\s+(\S+)\s+(\S+)", re.MULTILINE)
_MAX_DIGITS = 12


def frame_stem(frame: int) -> str:
    """The stem of a frame's files: six digits, or more."""
    return f"{frame:06d}"


def parse_frame_list(text: str, source: str) -> dict[str, tuple[str, ...]]:
    """Segment to its sorted frame stems, of a ``frame_list.csv`` with the columns ``seg_id`` and ``frame_id``.

    Frame numbers may be padded with zeros or not. They name the members of the zips, which know no segments: a number
    that comes twice is refused, since two segments would share a frame.

    Raises:
        EmptySegmentError: a row with a segment and without a frame.
        CaptureError: other columns, a row that is none, a frame that comes twice, or no frame at all.
    """
    found: dict[str, list[int]] = {}
    line_of_frame: dict[int, int] = {}
    rows = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if not {"seg_id", "frame_id"} <= set(header):
            raise CaptureError(f"{source}:1: expected the columns seg_id,frame_id, found {','.join(header)!r}")
        for row in (row for row in rows if row):
            place = f"{source}:{rows.line_num}"
            if len(row) != len(header):
                raise CaptureError(f"{place}: {len(row)} values, expected {len(header)} ({','.join(header)})")
            values = dict(zip(header, (value.strip() for value in row), strict=True))
            segment, frame = values["seg_id"], _frame_number(values["seg_id"], values["frame_id"], place)
            if frame in line_of_frame:
                raise CaptureError(
                    f"{place}: frame {frame} is listed already in line {line_of_frame[frame]}; "
                    "frame numbers are unique over a capture: remove one of the two"
                )
            line_of_frame[frame] = rows.line_num
            found.setdefault(segment, []).append(frame)
    except csv.Error as error:
        raise CaptureError(f"{source}:{rows.line_num}: not CSV ({error}); fetch the list again") from error
    if not found:
        raise CaptureError(f"{source}: no frame is listed; fetch the list again")
    return {segment: tuple(frame_stem(frame) for frame in sorted(found[segment])) for segment in sorted(found)}


def _frame_number(segment: str, frame: str, place: str) -> int:
    if not segment or "/" in segment or segment in (".", ".."):
        raise CaptureError(f"{place}: expected the name of a segment, found {segment!r}")
    if not frame:
        raise EmptySegmentError(
            f"{place}: segment {segment} is listed without a frame; remove the row, or fetch the segment's frames"
        )
    if not (frame.isascii() and frame.isdigit() and len(frame) <= _MAX_DIGITS):
        raise CaptureError(f"{place}: expected a frame number, found {frame!r}")
    return int(frame)


def parse_ply_vertices(body: bytes, count: int, source: str) -> np.ndarray:
    """``(V, 3)`` float32 mm: x, y, z of the element ``vertex``, whatever else the mesh has.

    Raises:
        VertexCountError: V is not ``count``, the number of the capture's topology.
        VertexNotFiniteError: a coordinate is NaN or infinite.
        CaptureError: not a PLY, a damaged one, or a larger one than any mesh of a face.
    """
    if len(body) > _MAX_PLY_BYTES:
        raise CaptureError(f"{source}: {len(body)} bytes of PLY, at most {_MAX_PLY_BYTES} are read; check the file")
    # The parser allocates what the header declares, so that it is held against what is possible first.
    header, ended, _ = body.partition(b"end_header")
    elements = _PLY_ELEMENT.findall(header)
    if not header.startswith(b"ply") or not ended or not all(number.isdigit() for _, number in elements):
        raise CaptureError(f"{source}: not a PLY mesh with a whole header; fetch it again")
    declared = sum(int(number[:_MAX_DIGITS]) for name, number in elements if name == b"vertex")
    if declared != count:
        raise VertexCountError(
            f"{source}: {declared} vertices, but the capture's topology has {count}; "
            "fetch it again, or track it with that topology"
        )
    if any(int(number[:_MAX_DIGITS]) > _MAX_PLY_ELEMENTS for _, number in elements):
        raise CaptureError(f"{source}: declares more than {_MAX_PLY_ELEMENTS} elements; check the file")
    try:
        vertices = np.asarray(load_ply(io.BytesIO(body), fix_texture=False)["vertices"], np.float64)
    except (ValueError, KeyError, TypeError, IndexError, EOFError, StopIteration) as error:
        raise CaptureError(f"{source}: not a whole PLY mesh with x, y, z ({error}); fetch it again") from error
    return checked_vertices(vertices, count, source)


def parse_keypoints_3d(body: bytes, source: str) -> np.ndarray:
    """``(N, 6)`` float64 of an ``npy`` file, which may be stored flat; see :meth:`Ava256Frame.keypoints_3d`.

    Raises:
        CaptureError: not rows of six finite numbers, or ids that are not unique and in 0..273.
    """
    values = parse_npy(body, source)
    if values.size % 6 or (values.ndim == 2 and values.shape[1] != 6) or values.ndim > 2:
        raise CaptureError(f"{source}: expected rows of 6 numbers, found shape {values.shape}; fetch it again")
    rows = values.reshape(-1, 6).astype(np.float64)
    if not np.isfinite(rows).all():
        raise CaptureError(f"{source}: a keypoint has a value that is not a finite number; triangulate it again")
    ids = rows[:, 0]
    if (ids != np.rint(ids)).any() or (ids < 0).any() or (ids >= NUM_KEYPOINTS).any():
        raise CaptureError(f"{source}: a keypoint's id is not a whole number in 0..{NUM_KEYPOINTS - 1}; fetch it again")
    if len(np.unique(ids)) != len(ids):
        raise CaptureError(f"{source}: a keypoint's id comes twice; fetch it again")
    return rows
