"""Every file of a capture, decoded: which are bad, and why, and which views are missing.

A capture is cut into small tasks (:func:`plan_verification`), each of which any process can do
(:func:`verify_part`); :func:`verify_capture` puts them together. A bad file is reported by its path, the name of its
fault (:mod:`pipeline.capture_errors`) and the reason. A missing view is a fact and no fault: it is counted. Nothing
is kept of a file but that, so that memory does not grow with the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lipflow.errors import LipflowError
from lipflow.types import Camera
from pipeline import storage
from pipeline.capture import Capture, SegmentListing
from pipeline.capture_errors import EmptySegmentError
from pipeline.captures.opening import open_capture
from pipeline.checks.verification_report import (
    BadFile,
    FaultList,
    VerifyPart,
    VerifyReport,
    bad_file,
    is_content_fault,
    is_file_fault,
    report_of,
)

_FILES_PER_TASK = 512
_FILES_BESIDE_IMAGES = 4
"""Mesh, pose, average texture and keypoints of a frame."""


@dataclass(frozen=True)
class VerifyTask:
    """A part of the work, small and picklable.

    Attributes:
        part: the files that all frames share, some frames of the dome, or some of the unpaired headset sequence.
        segment: of the frames; empty for the shared files.
        frames: stems, in order.
    """

    part: Literal["shared", "frames", "headset"]
    segment: str = ""
    frames: tuple[str, ...] = ()


RunTasks = Callable[[Capture, Sequence[VerifyTask]], Iterable[VerifyPart]]
"""Does all tasks, in any order and anywhere."""


def run_in_process(capture: Capture, tasks: Iterable[VerifyTask]) -> Iterator[VerifyPart]:
    """One task after the other."""
    return (verify_part(capture, task) for task in tasks)


def verify_capture(uri: str, run_tasks: RunTasks = run_in_process) -> VerifyReport:
    """Decode every file of a capture.

    Args:
        uri: path, ``file://`` or ``s3://``.
        run_tasks: how the tasks are done.

    Raises:
        CaptureError: there is no capture at ``uri``.
        StorageError: storage fails as a whole; a single file that cannot be read is a bad one.
    """
    uri = storage.normalize_uri(uri)
    try:
        capture = open_capture(uri)
    except LipflowError as error:
        bad = bad_file(error, uri, uri)
        if not is_content_fault(error) or bad.path == uri:
            raise
        return report_of(uri, "unknown", [VerifyPart(files_checked=1, bad=(bad,))], complete=False)
    blocking = _blocking_fault(capture)
    if blocking is None:
        return report_of(uri, capture.layout, run_tasks(capture, plan_verification(capture)), complete=True)
    parts = list(run_tasks(capture, [VerifyTask("shared")]))
    listed = [bad for part in parts for bad in part.bad]
    if not any(blocking.path == bad.path or blocking.reason == bad.reason for bad in listed):
        parts.append(VerifyPart(files_checked=1, bad=(blocking,)))
    return report_of(uri, capture.layout, parts, complete=False)


def plan_verification(capture: Capture) -> list[VerifyTask]:
    """The tasks that cover a capture: its shared files, and runs of frames of a segment of some 500 files each.

    Raises:
        CaptureError: the capture's cameras cannot be used.
    """
    files = len(capture.cameras) + len(capture.headset_cameras) + _FILES_BESIDE_IMAGES
    tasks = [VerifyTask("shared")]
    for segment, frames in capture.segments.items():
        tasks += [VerifyTask("frames", segment, run) for run in _runs(frames, files)]
    sequence = capture.headset_sequence
    if sequence is not None:
        for segment, frames in sequence.segments.items():
            tasks += [VerifyTask("headset", segment, run) for run in _runs(frames, len(sequence.camera_ids))]
    return tasks


def verify_part(capture: Capture | str, task: VerifyTask) -> VerifyPart:
    """Do one task of :func:`plan_verification`.

    Args:
        capture: the open capture, or its URI.
        task: one of its tasks.

    Raises:
        StorageError: storage fails as a whole.
    """
    if isinstance(capture, str):
        capture = open_capture(capture)
    if task.part == "frames":
        return _verify_frames(capture, task)
    faults = FaultList(capture.uri)
    if task.part == "shared":
        files = faults.check(capture.shared_assets(), capture.uri)
    else:
        sequence = capture.headset_sequence
        frames = () if sequence is None else (sequence.assets(task.segment, stem) for stem in task.frames)
        files = sum(faults.check(assets, capture.uri) for assets in frames)
    return VerifyPart(files, tuple(faults.bad), task.segment)


def _verify_frames(capture: Capture, task: VerifyTask) -> VerifyPart:
    faults, files = FaultList(capture.uri), 0
    listing = capture.listing(task.segment)
    stems = capture.segments[task.segment]
    if _has_any_file(listing, stems):
        for stem in task.frames:
            frame = capture.frame(task.segment, stem)
            files += faults.check(frame.assets(), frame.source_of("vertices"))
    elif task.frames[:1] == stems[:1]:
        faults.add(_empty_segment(capture, task.segment), capture.uri)
    return VerifyPart(
        files,
        tuple(faults.bad),
        task.segment,
        _missing(listing.images, capture.cameras, task.frames),
        _missing(listing.headset, capture.headset_cameras, task.frames),
    )


def _runs(frames: Sequence[str], files_per_frame: int) -> list[tuple[str, ...]]:
    """At least one run, so that a segment without frames is looked at as well."""
    length = max(1, _FILES_PER_TASK // max(1, files_per_frame))
    return [tuple(frames[start : start + length]) for start in range(0, max(1, len(frames)), length)]


def _has_any_file(listing: SegmentListing, frames: Sequence[str]) -> bool:
    by_camera = (listing.images, listing.view_textures, listing.headset)
    kinds = [listing.vertices, listing.poses, listing.average_textures, listing.keypoints]
    kinds += [stems for cameras in by_camera for stems in cameras.values()]
    return any(not stems.isdisjoint(frames) for stems in kinds)


def _empty_segment(capture: Capture, segment: str) -> EmptySegmentError:
    frames = capture.segments[segment]
    where = capture.uri
    if frames:
        mesh = capture.frame(segment, frames[0]).source_of("vertices")
        archive, in_archive, _ = mesh.partition(".zip!")
        where = f"{archive}.zip" if in_archive else mesh.rpartition("/")[0]
    return EmptySegmentError(
        f"{where}: segment {segment} is listed with {len(frames)} frames, and none of them has a single file; "
        "fetch the segment, or take it out of the frame list"
    )


def _missing(
    stems_of_camera: Mapping[str, frozenset[str]], cameras: Iterable[Camera], frames: Sequence[str]
) -> dict[str, int]:
    """Camera id to the number of the frames that it lacks; only cameras that lack some."""
    counts = {}
    for camera in cameras:
        present = stems_of_camera.get(camera.camera_id, frozenset())
        count = sum(stem not in present for stem in frames)
        if count:
            counts[camera.camera_id] = count
    return counts


def _blocking_fault(capture: Capture) -> BadFile | None:
    """What keeps the frames from being checked: without cameras and topology nothing can be said of a file."""
    try:
        _ = (capture.cameras, capture.headset_cameras, capture.topology, capture.headset_sequence)
    except LipflowError as error:
        if not is_file_fault(error):
            raise
        return bad_file(error, capture.uri, capture.uri)
    return None


__all__ = [
    "BadFile",
    "RunTasks",
    "VerifyPart",
    "VerifyReport",
    "VerifyTask",
    "plan_verification",
    "report_of",
    "run_in_process",
    "verify_capture",
    "verify_part",
]
