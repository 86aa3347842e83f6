"""``lipflow inspect``: what it prints, what it writes, what it refuses, and that it starts no cluster."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cluster import command
from cluster.inspect import inspect_command, print_report
from pipeline import storage
from pipeline.captures.opening import open_capture
from pipeline.checks.capture_report import CaptureReport, MissingViews
from pipeline.checks.inspection import inspect_capture
from pipeline.checks.overlay import contact_sheet, draw_overlay
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.images.codecs import decode_image

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    config = DomeConfig(
        cameras=3,
        image_size_hw=(32, 24),
        texture_size=32,
        segments=3,
        frames_per_segment=2,
        headset_image_size_hw=(8, 8),
        supersampling=1,
    )
    write_dome(config, str(folder))
    capture = open_capture(folder)
    segment = list(capture.segments)[1]
    (folder / "images" / segment / capture.cameras[2].camera_id / "000001.png").unlink()
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> CaptureReport:
    return inspect_capture(open_capture(folder))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """``run(CAPTURE, "--json")``: exit code, standard output and standard error, called in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIPFLOW_DEBUG", "0")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inspect", *(str(argument) for argument in arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command.run(inspect_command)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def _printed(report: CaptureReport, *, every_row: bool = False) -> str:
    console = Console(width=200, file=io.StringIO())
    print_report(report, console, every_row=every_row)
    return console.file.getvalue()


def test_people_read_counts_first_and_then_what_is_missing(run: Run, folder: Path, report: CaptureReport):
    code, out, _ = run(folder)
    assert code == 0
    assert out == _printed(report)
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["capture", report.uri, "(multiface)"]
    assert lines[1] == ["holds", "3", "cameras,", "3", "segments,", "6", "frames,", "17", "views"]
    assert lines[2] == ["missing", "1", "of", "18", "views", "(5.6", "%)"]
    for camera in report.cameras:
        row = next(line for line in lines if line[:2] == ["│", camera.camera_id])
        assert row[-2] == (str(camera.missing_views) if camera.missing_views else "-")
        assert row[3] == "24x32"
    for segment in report.segments:
        row = " ".join(next(line for line in lines if line[:2] == ["│", segment.segment]))
        tail = f"1 │ {report.cameras[2].camera_id}: 1 │" if segment.missing_views else "- │ │"
        assert row == f"│ {segment.segment} │ 2 │ {tail}"


def test_json_is_one_document_and_nothing_else(run: Run, folder: Path, report: CaptureReport):
    code, out, _ = run(folder, "--json")
    assert code == 0
    expected = asdict(report) | {"overlay": None, "sheet": None}
    assert json.loads(out) == json.loads(json.dumps(expected))


def test_pictures_are_written_where_they_are_asked_for(run: Run, folder: Path, tmp_path: Path):
    capture = open_capture(folder)
    segment, camera_id = list(capture.segments)[1], capture.cameras[0].camera_id
    arguments = ["--overlay", f"{segment}/000001", "--camera", camera_id, "--sheet", "deep/sheet.png"]
    code, out, _ = run(folder, *arguments, "--json")
    assert code == 0
    overlay, sheet = tmp_path / f"overlay-{segment}-000001-{camera_id}.png", tmp_path / "deep" / "sheet.png"
    document = json.loads(out)
    assert (document["overlay"], document["sheet"]) == (f"file://{overlay}", f"file://{sheet}")
    with Image.open(overlay) as image:
        np.testing.assert_array_equal(np.asarray(image), draw_overlay(capture, segment, "000001", camera_id))
    with Image.open(sheet) as image:  # of the overlay's frame
        np.testing.assert_array_equal(np.asarray(image), contact_sheet(capture, segment, "000001"))
    code, out, _ = run(folder, "--sheet", "first.png", "--overlay", f"{segment}/000001", "--camera", camera_id)
    assert out.count(f"overlay: file://{overlay}\n") == out.count(f"sheet: file://{tmp_path}/first.png\n") == 1
    run(folder, "--sheet", "chosen.png", "--frame", f"{segment}/000000")
    with Image.open(tmp_path / "chosen.png") as image:
        np.testing.assert_array_equal(np.asarray(image), contact_sheet(capture, segment, "000000"))


def test_a_capture_on_s3_with_its_pictures_written_there(run: Run, folder: Path, report: CaptureReport, s3_server):
    uri = s3_server.uri("inspect-command", "capture")
    storage.upload_dir(folder, uri)
    capture = open_capture(folder)
    segment, camera_id = next(iter(capture.segments)), capture.cameras[0].camera_id
    out_uri, sheet_uri = s3_server.uri("inspect-command", "o.png"), s3_server.uri("inspect-command", "s.png")
    pictures = ["--overlay", f"{segment}/000000", "--camera", camera_id, "--out", out_uri, "--sheet", sheet_uri]
    code, out, _ = run(uri, *pictures, "--json")
    assert code == 0
    expected = asdict(replace(report, uri=uri)) | {"overlay": out_uri, "sheet": sheet_uri}
    assert json.loads(out) == json.loads(json.dumps(expected))
    drawn = decode_image(storage.read_bytes(out_uri), "o.png")
    np.testing.assert_array_equal(drawn, draw_overlay(capture, segment, "000000", camera_id))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--overlay", "A/0"], "--overlay SEG/FRAME and --camera ID go together"),
        (["--camera", "1"], "--overlay SEG/FRAME and --camera ID go together"),
        (["--out", "a.png"], "--out a.png: needs --overlay"),
        (["--frame", "A/0"], "--frame A/0: needs --sheet"),
        (["--overlay", "A", "--camera", "1"], "--overlay A: expected SEGMENT/FRAME"),
        (["--sheet", "a.png", "--frame", "A/B/C"], "--frame A/B/C: expected SEGMENT/FRAME"),
        (["--sheet", "a.png", "--frame", "A/B"], "A/B is not in frame_list.txt"),
        (["--overlay", "A/B", "--camera", "77"], "camera 77 is not calibrated"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    run: Run, folder: Path, tmp_path: Path, arguments: list[str], expected: str
):
    code, out, err = run(folder, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("lipflow: error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_the_overlay_of_a_missing_view_is_refused(run: Run, folder: Path):
    capture = open_capture(folder)
    segment, camera_id = list(capture.segments)[1], capture.cameras[2].camera_id
    code, _, err = run(folder, "--overlay", f"{segment}/000001", "--camera", camera_id)
    assert code == 2
    assert f"camera {camera_id} has no image of frame {segment}/000001" in err


def test_a_folder_that_is_no_capture(run: Run, tmp_path: Path):
    code, out, err = run(tmp_path)
    assert (code, out) == (2, "")
    assert str(tmp_path) in err


def _large(report: CaptureReport, cameras: int, segments: int) -> CaptureReport:
    """The same report with many cameras and segments, of which a few and then more lack views."""
    missing = tuple(
        MissingViews(f"SEG_{s:03d}", f"5{c:05d}", 1 + (c + s) % 3)
        for s in range(segments)
        for c in range(cameras)
        if s % 2 == 0 and c % 4 == 0
    )
    by_camera = [sum(m.views for m in missing if m.camera_id == f"5{c:05d}") for c in range(cameras)]
    by_segment = [sum(m.views for m in missing if m.segment == f"SEG_{s:03d}") for s in range(segments)]
    return replace(
        report,
        cameras=tuple(
            replace(report.cameras[0], camera_id=f"5{c:05d}", missing_views=n) for c, n in enumerate(by_camera)
        ),
        segments=tuple(
            replace(report.segments[0], segment=f"SEG_{s:03d}", missing_views=n) for s, n in enumerate(by_segment)
        ),
        missing_views=missing,
        totals=replace(report.totals, missing_views=len(missing)),
    )


def test_a_large_capture_is_summed_up_unless_every_row_is_asked_for(report: CaptureReport):
    large = _large(report, cameras=160, segments=65)
    short, long = _printed(large), _printed(large, every_row=True)
    assert len(short.splitlines()) < 60
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in short.splitlines() if line.startswith("│")]
    cameras, segments = [row for row in rows if len(row) == 6], [row for row in rows if len(row) == 4]
    for table, facts, column in ((cameras, large.cameras, 5), (segments, large.segments, 2)):
        shown = [int(row[column]) for row in table[:-1]]
        counts = sorted((entry.missing_views for entry in facts), reverse=True)
        assert sorted(shown, reverse=True) == counts[:10]
        assert table[-1][0] == f"{len(facts) - 10} others"
        assert table[-1][column] == f"{sum(counts[10:]):,} (at most {counts[10]:,} each)"
    assert all(f"5{c:05d}" in long for c in range(160))
    assert all(f"│ SEG_{s:03d} " in long for s in range(65))
    assert "others" not in long
    entries = sum(line.count(": ") for line in long.splitlines() if "SEG_" in line or line.startswith("│       "))
    assert entries == len(large.missing_views)


def test_it_needs_neither_ray_nor_mlflow():
    check = "import sys, cluster.inspect; sys.exit(any(name in sys.modules for name in ('ray', 'mlflow')))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
