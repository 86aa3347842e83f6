"""``lipflow inspect CAPTURE``: what is in a capture, what it lacks, and pictures that show whether it aligns.

It states facts and ends with exit code 0 whatever they are; ``lipflow verify`` judges. It needs no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster import command
from cluster.command import JsonOption
from lipflow.errors import ConfigError
from pipeline import storage
from pipeline.capture import Capture
from pipeline.captures.opening import open_capture
from pipeline.checks.capture_report import CameraFacts, CaptureReport, SegmentFacts
from pipeline.checks.inspection import inspect_capture
from pipeline.checks.overlay import contact_sheet, draw_overlay, first_tracked_frame
from pipeline.images.codecs import encode_image

_ROWS_SHOWN = 20
"""Longer tables show the rows with most missing, and one row for all others."""

_CAMERAS_NAMED = 4
_PIPE_WIDTH = 200

_Row = TypeVar("_Row", CameraFacts, SegmentFacts)


def inspect(capture: Capture) -> CaptureReport:
    """The facts about a capture, with progress on standard error.

    Raises:
        CaptureError: calibration, topology or statistics that cannot be used.
        StorageError: storage that cannot be listed.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=command.console, transient=True) as progress:
        bar = progress.add_task("list segments", total=len(capture.segments))
        return inspect_capture(capture, on_segment=lambda: progress.advance(bar))


def print_report(report: CaptureReport, console: Console, *, every_row: bool) -> None:
    """Counts first, then the cameras and the segments, with what is missing where."""
    overview = Table.grid(padding=(0, 2))
    overview.add_column(style="bold", no_wrap=True)
    overview.add_column()
    for name, text in _overview(report):
        overview.add_row(name, escape(text))
    console.print(overview)
    console.print()
    console.print(_cameras_table(report, every_row=every_row))
    console.print()
    console.print(_segments_table(report, every_row=every_row))


def _overview(report: CaptureReport) -> list[tuple[str, str]]:
    totals, topology, driving = report.totals, report.topology, report.driving
    lines = [
        ("capture", f"{report.uri} ({report.layout})"),
        (
            "holds",
            f"{_counted(len(report.cameras), 'camera')}, {_counted(len(report.segments), 'segment')}, "
            f"{_counted(totals.frames, 'frame')}, {_counted(totals.views - totals.missing_views, 'view')}",
        ),
        ("missing", _missing(report)),
        ("images", ", ".join(f"{size} ({_counted(count, 'camera')})" for size, count in report.image_sizes.items())),
        ("distortion", _distortion(report)),
        (
            "textures",
            f"{report.texture_size}x{report.texture_size}; unwrapped from single cameras: "
            + (f"{100 * totals.view_textures_share:.4g} % of views" if totals.view_textures else "none"),
        ),
        ("mesh", f"{topology.vertices:,} vertices, {topology.faces:,} faces, {topology.uvs:,} texture coordinates"),
        ("statistics", _statistics(report)),
        ("headset", _headset(report)),
        ("frontal", f"camera {driving.frontal_camera_id}" if driving.frontal == "declared" else driving.frontal),
        (
            "keypoints",
            f"{driving.keypoint_names} in {driving.keypoint_frames:,} of {totals.frames:,} frames, stored"
            if driving.keypoints == "stored"
            else driving.keypoints,
        ),
    ]
    sequence = report.headset_sequence
    if sequence is not None:
        lines.append(
            (
                "headset capture",
                f"{_counted(len(sequence.camera_ids), 'camera')}, {_counted(sequence.segments, 'segment')}, "
                f"{_counted(sequence.frames, 'frame')}, {sequence.missing_views:,} of "
                f"{_counted(sequence.views, 'view')} missing; not paired with the dome's frames",
            )
        )
    if report.uncalibrated_cameras:
        named = _named(report.uncalibrated_cameras, 8)
        lines.append(("not calibrated", f"{_counted(len(report.uncalibrated_cameras), 'camera')}, not read: {named}"))
    return lines + [("note", note) for note in report.notes]


def _missing(report: CaptureReport) -> str:
    totals = report.totals
    counts = (
        (totals.missing_meshes, "mesh", "meshes"),
        (totals.missing_poses, "head pose", "head poses"),
        (totals.missing_average_textures, "average texture", "average textures"),
    )
    parts = [f"{totals.missing_views:,} of {_counted(totals.views, 'view')} ({100 * totals.missing_share:.2g} %)"]
    parts += [_counted(count, name, plural) for count, name, plural in counts if count]
    if totals.stray_frames:
        parts.append(f"{_counted(totals.stray_frames, 'frame')} with files but not in the frame list")
    return "nothing" if len(parts) == 1 and not totals.missing_views else ", ".join(parts)


def _distortion(report: CaptureReport) -> str:
    bent = [camera for camera in report.cameras if camera.distortion is not None]
    if not bent:
        return "none"
    most = max(bent, key=lambda camera: camera.distortion_shift_px)
    return (
        f"{len(bent)} of {_counted(len(report.cameras), 'camera')}, "
        f"by up to {most.distortion_shift_px:.1f} px (camera {most.camera_id})"
    )


def _statistics(report: CaptureReport) -> str:
    if report.statistics is None:
        return "none; computed when sharded"
    red, green, blue = report.statistics.mean_colour
    return (
        f"mean colour {red:.0f} {green:.0f} {blue:.0f}, texture std {report.statistics.texture_std:.1f} (of 255), "
        f"vertex std {report.statistics.vertices_std_mm:.2f} mm"
    )


def _headset(report: CaptureReport) -> str:
    driving = report.driving
    if driving.headset != "stored":
        return driving.headset
    cameras = f"{_counted(len(driving.headset_camera_ids), 'camera')} ({', '.join(driving.headset_camera_ids)})"
    return f"{cameras}, stored; {driving.missing_headset_views:,} of {_counted(driving.headset_views, 'view')} missing"


def _cameras_table(report: CaptureReport, *, every_row: bool) -> Table:
    table = Table(title="Cameras", title_justify="left", title_style="bold")
    table.add_column("camera", no_wrap=True)
    for name in ("image", "focal length, px", "principal point, px", "distortion, px", "missing views"):
        table.add_column(name, justify="right", no_wrap=True)
    shown, others = _shortened(report.cameras, every_row=every_row)
    for camera in shown:
        table.add_row(
            escape(camera.camera_id),
            f"{camera.image_size_hw[1]}x{camera.image_size_hw[0]}",
            " ".join(f"{focal:.1f}" for focal in camera.focal_px),
            " ".join(f"{centre:.1f}" for centre in camera.principal_point_px),
            f"{camera.distortion_shift_px:.1f}" if camera.distortion is not None else "-",
            _count_or_dash(camera.missing_views),
        )
    if others:
        table.add_section()
        table.add_row(
            _others_label(shown, others),
            _span([camera.image_size_hw[1] for camera in others], "d")
            + "x"
            + _span([camera.image_size_hw[0] for camera in others], "d"),
            _span([focal for camera in others for focal in camera.focal_px], ".1f"),
            "",
            _span([camera.distortion_shift_px for camera in others], ".1f")
            if any(camera.distortion is not None for camera in others)
            else "-",
            _others_missing(others),
        )
        table.caption, table.caption_justify = "--all shows every camera", "left"
    return table


def _segments_table(report: CaptureReport, *, every_row: bool) -> Table:
    optional = {
        "missing meshes": [segment.missing_meshes for segment in report.segments],
        "missing poses": [segment.missing_poses for segment in report.segments],
        "missing textures": [segment.missing_average_textures for segment in report.segments],
        "stray frames": [segment.stray_frames for segment in report.segments],
    }
    optional = {name: counts for name, counts in optional.items() if any(counts)}
    by_segment: dict[str, list[tuple[str, int]]] = {}
    for entry in report.missing_views:
        by_segment.setdefault(entry.segment, []).append((entry.camera_id, entry.views))
    index_of = {segment.segment: index for index, segment in enumerate(report.segments)}
    table = Table(title="Segments", title_justify="left", title_style="bold")
    table.add_column("segment", no_wrap=True)
    for name in ("frames", "missing views", *optional):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("by camera")
    shown, others = _shortened(report.segments, every_row=every_row)
    for segment in shown:
        by_camera = sorted(by_segment.get(segment.segment, []), key=lambda entry: -entry[1])
        table.add_row(
            escape(segment.segment),
            f"{segment.frames:,}",
            _count_or_dash(segment.missing_views),
            *(_count_or_dash(counts[index_of[segment.segment]]) for counts in optional.values()),
            _named(
                [f"{camera_id}: {views:,}" for camera_id, views in by_camera],
                len(by_camera) if every_row else _CAMERAS_NAMED,
            ),
        )
    if others:
        table.add_section()
        table.add_row(
            _others_label(shown, others),
            f"{sum(segment.frames for segment in others):,}",
            _others_missing(others),
            *(
                _count_or_dash(sum(counts[index_of[segment.segment]] for segment in others))
                for counts in optional.values()
            ),
            "",
        )
        table.caption, table.caption_justify = "--all shows every segment and camera", "left"
    return table


def _shortened(rows: Sequence[_Row], *, every_row: bool) -> tuple[list[_Row], list[_Row]]:
    """The rows to show, in their own order, and those to sum up: a long table keeps those with most missing."""
    if every_row or len(rows) <= _ROWS_SHOWN:
        return list(rows), []
    order = sorted(range(len(rows)), key=lambda index: (-rows[index].missing_views, index))
    kept = {index for index in order[: _ROWS_SHOWN // 2] if rows[index].missing_views}
    return (
        [row for index, row in enumerate(rows) if index in kept],
        [row for index, row in enumerate(rows) if index not in kept],
    )


def _others_label(shown: Sequence[_Row], others: Sequence[_Row]) -> str:
    return f"{len(others)} others" if shown else f"all {len(others)}"


def _others_missing(rows: Sequence[CameraFacts] | Sequence[SegmentFacts]) -> str:
    counts = [row.missing_views for row in rows]
    return f"{sum(counts):,} (at most {max(counts):,} each)" if any(counts) else "-"


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}-{high}"


def _named(names: Sequence[str], most: int) -> str:
    more = len(names) - most
    return escape(", ".join(names[:most])) + (f", {more:,} more" if more > 0 else "")


def _counted(count: int, name: str, plural: str | None = None) -> str:
    return f"{count:,} {name if count == 1 else plural or name + 's'}"


def _count_or_dash(count: int) -> str:
    return f"{count:,}" if count else "-"


def _parse_frame(text: str, option: str) -> tuple[str, str]:
    segment, slash, frame = text.partition("/")
    if not (segment and slash and frame) or "/" in frame:
        raise ConfigError(f"{option} {text}: expected SEGMENT/FRAME, such as EXP_jaw_open/000012")
    return segment, frame


def _write_picture(draw: Callable[[], np.ndarray], uri: str) -> str:
    normal = storage.normalize_uri(uri)
    storage.write_bytes(normal, encode_image(draw(), "png"))
    return normal


def inspect_command(
    capture: Annotated[str, typer.Argument(metavar="CAPTURE", help="Capture: path, file:// or s3:// URI.")],
    overlay: Annotated[
        str | None, typer.Option(metavar="SEG/FRAME", help="Draw the mesh over this frame's photo; needs --camera.")
    ] = None,
    camera: Annotated[str | None, typer.Option(metavar="ID", help="Camera of the overlay.")] = None,
    out: Annotated[
        str | None, typer.Option(metavar="PNG", help="Where the overlay goes; default overlay-SEG-FRAME-ID.png.")
    ] = None,
    sheet: Annotated[
        str | None, typer.Option(metavar="PNG", help="Draw one frame from all cameras as a contact sheet.")
    ] = None,
    frame: Annotated[
        str | None,
        typer.Option(metavar="SEG/FRAME", help="Frame of the sheet; default the overlay's, or the first tracked one."),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Show every camera and segment.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what is in a capture and what it lacks; draw its mesh over its photos."""
    if (overlay is None) != (camera is None):
        raise ConfigError("--overlay SEG/FRAME and --camera ID go together: give both, or neither")
    for name, value, needed, given in (("--out", out, "--overlay", overlay), ("--frame", frame, "--sheet", sheet)):
        if value is not None and given is None:
            raise ConfigError(f"{name} {value}: needs {needed}")
    overlay_frame = _parse_frame(overlay, "--overlay") if overlay is not None else None
    sheet_frame = _parse_frame(frame, "--frame") if frame is not None else None
    opened = open_capture(capture)
    # Before the listing: a camera or frame that is not there should be known at once.
    pictures: dict[str, Any] = {"overlay": None, "sheet": None}
    if overlay_frame is not None and camera is not None:
        target = out or f"overlay-{overlay_frame[0]}-{overlay_frame[1]}-{camera}.png"
        pictures["overlay"] = _write_picture(lambda: draw_overlay(opened, *overlay_frame, camera), target)
    if sheet is not None:
        pictures["sheet"] = _write_picture(
            lambda: contact_sheet(opened, *(sheet_frame or overlay_frame or first_tracked_frame(opened))), sheet
        )
    report = inspect(opened)
    if as_json:
        command.emit(asdict(report) | pictures, as_json, "")
        return
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    print_report(report, console, every_row=all_)
    for name, uri in pictures.items():
        if uri is not None:
            console.print(f"\n{name}: {uri}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    command.run_job("cluster.inspect", "inspect_command")
