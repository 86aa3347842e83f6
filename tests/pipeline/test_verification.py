"""What ``lipflow verify`` finds in a capture: exactly what is there to be found, in small tasks and flat memory."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lipflow.errors import CaptureError, StorageError
from pipeline import storage
from pipeline.capture import Asset, Capture
from pipeline.captures.multiface import MultifaceCapture
from pipeline.captures.opening import open_capture
from pipeline.checks.verification import plan_verification, verify_capture, verify_part
from pipeline.checks.verification_report import report_of
from pipeline.dome.writer import DomeConfig, plan_dome, write_dome
from tests.pipeline.ava256_layout import LAYOUT_CONFIG, write_ava256

LARGE = DomeConfig(
    cameras=12,
    image_size_hw=(24, 18),
    texture_size=32,
    segments=5,
    frames_per_segment=5,
    missing_fraction=0.01,
    headset_image_size_hw=(8, 8),
    supersampling=1,
    seed=1,
)


def named(report) -> list[tuple[str, str]]:
    """(path under the capture, fault) of the bad files."""
    return [(bad.path.removeprefix(f"{report.uri}/"), bad.fault) for bad in report.bad]


def views_without_file(folder: Path, capture: Capture) -> list[tuple[str, str]]:
    """(segment, camera) of each listed view whose file is not there, by asking for each file."""
    return [
        (segment, camera.camera_id)
        for segment, frames in capture.segments.items()
        for stem in frames
        for camera in capture.cameras
        if not (folder / "images" / segment / camera.camera_id / f"{stem}.png").exists()
    ]


def test_a_capture_with_missing_views_and_three_corrupt_files(tmp_path: Path):
    write_dome(LARGE, str(tmp_path))
    capture = open_capture(tmp_path)
    missing = views_without_file(tmp_path, capture)
    assert 0 < len(missing) < 0.03 * 12 * 25
    segments = list(plan_dome(LARGE).segments)
    image, mesh, pose = (
        next((tmp_path / "images" / segments[1]).glob("*/000003.png")),
        tmp_path / "tracked_mesh" / segments[2] / "000001.bin",
        tmp_path / "tracked_mesh" / segments[3] / "000004_transform.txt",
    )
    image.write_bytes(image.read_bytes()[:200])
    vertices = np.fromfile(mesh, "<f4")
    vertices[7] = np.inf
    mesh.write_bytes(vertices.tobytes())
    np.savetxt(pose, np.loadtxt(pose) * 2)

    report = verify_capture(str(tmp_path))
    expected = {image: "truncated-image", mesh: "vertex-not-finite", pose: "pose-not-rigid"}
    assert named(report) == sorted((str(path.relative_to(tmp_path)), fault) for path, fault in expected.items())
    assert report.missing_views == Counter(camera_id for _, camera_id in missing)
    assert report.missing_views_by_segment == Counter(segment for segment, _ in missing)
    assert report.complete
    assert not report.good


def test_every_file_of_the_dome_is_decoded(dome_folder: Path):
    report = verify_capture(str(dome_folder))
    frame_files = [
        path
        for folder in ("images", "tracked_mesh", "unwrapped_uv_1024", "driving/headset", "driving/keypoints")
        for path in (dome_folder / folder).rglob("*")
        if path.is_file() and path.suffix != ".obj"
    ]
    # Beside them: KRT, topology, headset.json, frontal.json and the statistics.
    assert report.files_checked == len(frame_files) + 5
    assert report.good
    assert report.bad == ()


def test_missing_headset_views_are_counted_apart(own_dome_folder: Path):
    before = verify_capture(str(own_dome_folder))
    present = sorted((own_dome_folder / "driving/headset/EXP_smile/cyclops").glob("*.png"))
    present[0].unlink()
    after = verify_capture(str(own_dome_folder))
    assert after.good
    assert after.missing_views == before.missing_views
    lost = {
        name: after.missing_headset_views[name] - before.missing_headset_views.get(name, 0) for name in ("cyclops",)
    }
    assert lost == {"cyclops": 1}


def test_a_listed_frame_without_files_in_a_segment_that_has_some(own_dome_folder: Path):
    with (own_dome_folder / "frame_list.txt").open("a") as stream:
        stream.write("EXP_smile 000077\n")
    report = verify_capture(str(own_dome_folder))
    stem = "tracked_mesh/EXP_smile/000077"
    assert named(report) == [(f"{stem}.bin", "missing-file"), (f"{stem}_transform.txt", "missing-file")]


def test_an_empty_segment_of_several_tasks_is_one_fault(own_dome_folder: Path):
    with (own_dome_folder / "frame_list.txt").open("a") as stream:
        stream.writelines(f"EXP_wink {index:06d}\n" for index in range(200))
    tasks = [task for task in plan_verification(open_capture(own_dome_folder)) if task.segment == "EXP_wink"]
    assert len(tasks) > 3
    report = verify_capture(str(own_dome_folder))
    assert named(report) == [("tracked_mesh/EXP_wink", "empty-segment")]
    assert "200 frames" in report.bad[0].reason
    assert report.missing_views_by_segment["EXP_wink"] == 200 * 6


def test_two_faults_in_the_calibration_and_one_beside_it(own_dome_folder: Path):
    """KRT is met by three checks and keeps the frames from being checked, but it is listed once."""
    (own_dome_folder / "KRT").write_text("400001\n1 2\n")
    (own_dome_folder / "vert_mean.bin").write_bytes(b"")
    report = verify_capture(str(own_dome_folder))
    assert named(report) == [("KRT", "unreadable"), ("vert_mean.bin", "vertex-count")]
    assert not report.complete


def test_tasks_cover_each_frame_once_and_are_small(own_dome_folder: Path):
    with (own_dome_folder / "frame_list.txt").open("a") as stream:
        stream.writelines(f"EXP_smile {index:06d}\n" for index in range(1000))
    capture = open_capture(own_dome_folder)
    tasks = plan_verification(capture)
    assert [task.part for task in tasks].count("shared") == 1
    covered = [(task.segment, stem) for task in tasks for stem in task.frames]
    assert covered == [(segment, stem) for segment, stems in capture.segments.items() for stem in stems]
    # 6 + 5 cameras and 4 other files a frame: at most 512 files
    assert max(len(task.frames) for task in tasks) == 512 // 15
    assert max(len(pickle.dumps(task)) for task in tasks) < 1000


def test_parts_can_be_done_by_anyone_in_any_order(own_dome_folder: Path):
    os.truncate(own_dome_folder / "images/EXP_eyes/400003/000002.png", 200)
    (own_dome_folder / "tracked_mesh/SEN_a_good_morrow/000000_transform.txt").unlink()
    whole = verify_capture(str(own_dome_folder))
    capture = open_capture(own_dome_folder)
    # As a worker does them: from a pickled task and a URI.
    tasks = [pickle.loads(pickle.dumps(task)) for task in reversed(plan_verification(capture))]
    parts = [pickle.loads(pickle.dumps(verify_part(capture.uri, task))) for task in tasks]
    assert report_of(capture.uri, capture.layout, parts, complete=True) == whole
    assert len(whole.bad) == 2


def test_the_report_is_the_same_on_s3(own_dome_folder: Path, s3_server):
    (own_dome_folder / "images/EXP_eyes/400003/000002.png").write_bytes(b"no image")
    uri = s3_server.uri("verify", "dome")
    storage.upload_dir(own_dome_folder, uri)
    local, remote = verify_capture(str(own_dome_folder)), verify_capture(uri)
    assert named(remote) == named(local) == [("images/EXP_eyes/400003/000002.png", "unreadable-image")]
    assert (remote.missing_views, remote.files_checked) == (local.missing_views, local.files_checked)


@pytest.mark.parametrize("what", ["an empty folder", "no folder"])
def test_no_capture_is_wrong_use_and_no_report(tmp_path: Path, what: str):
    uri = tmp_path if what == "an empty folder" else tmp_path / "nothing"
    with pytest.raises(CaptureError, match="not a capture"):
        verify_capture(str(uri))


def test_a_file_that_cannot_be_read_is_bad(own_dome_folder: Path):
    mesh = own_dome_folder / "tracked_mesh/EXP_smile/000001.bin"
    mesh.unlink()
    mesh.mkdir()
    report = verify_capture(str(own_dome_folder))
    assert named(report) == [("tracked_mesh/EXP_smile/000001.bin", "unreadable")]


def raising(error: Exception):
    def check() -> None:
        raise error

    return lambda self: iter([Asset("file:///elsewhere", check)])


def test_storage_that_is_down_ends_the_job(dome_folder: Path, monkeypatch: pytest.MonkeyPatch):
    down = StorageError("s3://bucket/x: cannot read it after several tries")
    down.__cause__ = ConnectionResetError()
    monkeypatch.setattr(MultifaceCapture, "shared_assets", raising(down))
    with pytest.raises(StorageError, match="several tries"):
        verify_capture(str(dome_folder))


def test_a_defect_of_ours_is_no_fault_of_the_file(dome_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MultifaceCapture, "shared_assets", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        verify_capture(str(dome_folder))


def test_faults_in_listing_are_put_down_to_the_capture(dome_folder: Path, monkeypatch: pytest.MonkeyPatch):
    def listing(self):
        raise CaptureError("there is something wrong with it")
        yield

    monkeypatch.setattr(MultifaceCapture, "shared_assets", listing)
    report = verify_capture(str(dome_folder))
    assert [(bad.path, bad.fault) for bad in report.bad] == [(report.uri, "unreadable")]


def test_an_empty_segment_of_zips_is_put_down_to_the_zip_of_meshes(tmp_path: Path):
    write_ava256(tmp_path, LAYOUT_CONFIG)
    with (tmp_path / "decoder/frame_list.csv").open("a") as stream:
        stream.write("EXP_wink,000999\n")
    report = verify_capture(str(tmp_path))
    assert named(report) == [("decoder/kinematic_tracking/registration_vertices.zip", "empty-segment")]
    assert report.missing_views_by_segment == {"EXP_wink": LAYOUT_CONFIG.cameras}
