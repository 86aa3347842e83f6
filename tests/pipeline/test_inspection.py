"""The report's counts are those of the files that exist, on every storage, and cost no decoding and no memory."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lipflow.errors import CaptureError
from lipflow.types import Camera
from pipeline import storage
from pipeline.capture import Capture, SegmentListing
from pipeline.capture_errors import SingularIntrinsicsError
from pipeline.captures.opening import open_capture
from pipeline.checks.capture_report import CaptureReport
from pipeline.checks.inspection import distortion_shift_px, inspect_capture
from pipeline.dome.scene import synthesise_frame
from tests.pipeline.ava256_layout import LAYOUT_CONFIG, planned_frames, planned_headset_frames, write_ava256


@pytest.fixture(scope="module")
def report(dome: Capture) -> CaptureReport:
    return inspect_capture(dome)


def _missing_by_hand(folder: Path, kind: str, cameras: tuple[Camera, ...]) -> dict[tuple[str, str], int]:
    """(segment, camera) -> files of ``kind`` that do not exist, one look-up a file; only non-zero counts."""
    missing: dict[tuple[str, str], int] = {}
    for line in (folder / "frame_list.txt").read_text().splitlines():
        segment, stem = line.split()
        for camera in cameras:
            if not (folder / kind / segment / camera.camera_id / f"{stem}.png").exists():
                missing[segment, camera.camera_id] = missing.get((segment, camera.camera_id), 0) + 1
    return missing


def test_missing_views_are_those_whose_files_do_not_exist(report: CaptureReport, dome: Capture, dome_folder: Path):
    expected = _missing_by_hand(dome_folder, "images", dome.cameras)
    assert expected
    assert {(entry.segment, entry.camera_id): entry.views for entry in report.missing_views} == expected
    assert report.totals.missing_views == sum(expected.values())
    assert report.totals.missing_share == sum(expected.values()) / (6 * 5 * 3)
    for camera in report.cameras:
        assert camera.missing_views == sum(n for (_, name), n in expected.items() if name == camera.camera_id)
    for segment in report.segments:
        assert segment.missing_views == sum(n for (name, _), n in expected.items() if name == segment.segment)
    headset = _missing_by_hand(dome_folder, "driving/headset", dome.headset_cameras)
    assert headset
    assert report.driving.missing_headset_views == sum(headset.values())


def test_what_the_capture_holds(report: CaptureReport, dome: Capture, dome_folder: Path):
    assert (report.uri, report.layout) == (dome.uri, "multiface")
    assert {segment.segment: segment.frames for segment in report.segments} == {
        segment: len(frames) for segment, frames in dome.segments.items()
    }
    assert (report.totals.frames, report.totals.views) == (15, 90)
    assert report.image_sizes == {"36x48": 6}
    assert report.texture_size == 32
    for facts, camera in zip(report.cameras, dome.cameras, strict=True):
        assert facts.camera_id == camera.camera_id
        assert facts.image_size_hw == (48, 36)
        assert facts.focal_px == (camera.intrinsics[0, 0], camera.intrinsics[1, 1])
        assert facts.principal_point_px == (camera.intrinsics[0, 2], camera.intrinsics[1, 2])
        assert facts.distortion is None
        assert facts.distortion_shift_px == 0
    topology = dome.topology
    assert report.topology.vertices == topology.num_vertices
    assert (report.topology.faces, report.topology.uvs) == (len(topology.faces), len(topology.uvs))
    statistics, normalization = report.statistics, dome.normalization()
    assert statistics is not None
    assert normalization is not None
    np.testing.assert_allclose(statistics.mean_colour, normalization.texture_mean.mean((1, 2)), rtol=1e-5)
    assert statistics.texture_std == float((dome_folder / "tex_var.txt").read_text()) ** 0.5
    assert statistics.vertices_std_mm == float((dome_folder / "vert_var.txt").read_text()) ** 0.5
    driving = report.driving
    assert (driving.headset, driving.keypoints) == ("stored", "stored")
    assert driving.headset_camera_ids == tuple(camera.camera_id for camera in dome.headset_cameras)
    assert driving.headset_views == 15 * len(dome.headset_cameras)
    assert (driving.keypoint_frames, driving.keypoint_names) == (15, len(topology.landmarks))
    assert driving.frontal_camera_id == dome.frontal_camera_id
    assert report.headset_sequence is None
    assert report.uncalibrated_cameras == ()


def test_the_report_is_a_json_document(report: CaptureReport):
    document = json.loads(json.dumps(asdict(report)))
    assert document["totals"] == asdict(report.totals)
    assert document["cameras"][0]["camera_id"] == report.cameras[0].camera_id


def test_each_kind_of_missing_and_stray_file_is_counted_where_it_is(own_dome_folder: Path):
    before = inspect_capture(open_capture(own_dome_folder))
    first, second, third = before.segments[:3]
    mesh, texture, images = (own_dome_folder / name for name in ("tracked_mesh", "unwrapped_uv_1024", "images"))
    (mesh / first.segment / "000001.bin").unlink()
    (mesh / first.segment / "000002.bin").unlink()
    (mesh / second.segment / "000001_transform.txt").unlink()
    (texture / third.segment / "average" / "000002.png").unlink()
    # Strays: one of them in two places, which is still one frame.
    (mesh / second.segment / "000777.bin").write_bytes(b"")
    (images / second.segment / before.cameras[0].camera_id / "000777.png").write_bytes(b"")
    (images / second.segment / before.cameras[0].camera_id / "000778.png").write_bytes(b"")
    (images / first.segment / "999999").mkdir()
    (images / first.segment / "999999" / "000000.png").write_bytes(b"")
    view = texture / first.segment / before.cameras[1].camera_id
    view.mkdir()
    (view / "000000.png").write_bytes(b"")
    after = inspect_capture(open_capture(own_dome_folder))
    assert after.segments[0] == replace(first, missing_meshes=2)
    assert after.segments[1] == replace(second, missing_poses=1, stray_frames=2)
    assert after.segments[2] == replace(third, missing_average_textures=1)
    assert after.segments[3:] == before.segments[3:]
    assert after.totals == replace(
        before.totals,
        missing_meshes=2,
        missing_poses=1,
        missing_average_textures=1,
        stray_frames=2,
        view_textures=1,
        view_textures_share=1 / 90,
    )
    assert after.uncalibrated_cameras == ("999999",)
    assert after.missing_views == before.missing_views


def test_a_capture_without_driving_data_or_statistics(own_dome_folder: Path):
    (own_dome_folder / "vert_var.txt").unlink()
    landmarks = (own_dome_folder / "driving" / "landmarks.json").read_bytes()
    storage.delete_dir(own_dome_folder / "driving")
    report = inspect_capture(open_capture(own_dome_folder))
    assert report.statistics is None
    driving, unknown = report.driving, "needs driving.landmarks"
    assert (driving.headset, driving.frontal, driving.keypoints) == (unknown, unknown, unknown)
    assert driving.frontal_camera_id is None
    assert (driving.headset_views, driving.keypoint_frames) == (0, 0)
    storage.write_bytes(own_dome_folder / "driving" / "landmarks.json", landmarks)
    driving = inspect_capture(open_capture(own_dome_folder)).driving
    assert (driving.headset, driving.keypoints) == ("rendered when sharded", "rendered when sharded")
    assert driving.frontal == "chosen when sharded"


def test_no_image_is_decoded(own_dome_folder: Path, report: CaptureReport):
    for kind in ("images", "unwrapped_uv_1024", "driving/headset", "driving/keypoints"):
        for path in (path for path in (own_dome_folder / kind).rglob("*") if path.is_file()):
            path.write_bytes(path.read_bytes()[:64])  # the header, and no whole row of pixels
    found = inspect_capture(open_capture(own_dome_folder))
    assert replace(found, uri=report.uri) == report


def test_s3_gives_the_same_report(report: CaptureReport, dome_folder: Path, s3_server):
    uri = s3_server.uri("inspected", "dome")
    storage.upload_dir(dome_folder, uri)
    assert inspect_capture(open_capture(uri)) == replace(report, uri=uri)


def test_a_calibration_that_is_none_is_the_readers_own_error(own_dome_folder: Path):
    krt = own_dome_folder / "KRT"
    lines = krt.read_text().splitlines()
    lines[1] = "0 0 0"
    krt.write_text("\n".join(lines))
    with pytest.raises(SingularIntrinsicsError, match="KRT"):
        inspect_capture(open_capture(own_dome_folder))


@pytest.mark.parametrize("k1", [0.12, -0.12])
def test_the_lens_shift_is_that_of_the_farthest_corner(k1: float):
    intrinsics = np.array([[500.0, 0, 210], [0, 500, 330], [0, 0, 1]])
    camera = Camera("c", intrinsics, np.eye(3, 4), (640, 480), np.array([k1, 0, 0, 0, 0]))
    radius = np.hypot(480 - 210, 330) / 500
    assert distortion_shift_px(camera) == pytest.approx(500 * abs(k1) * radius**3, rel=1e-12)


def test_the_lens_shift_leaves_out_what_the_lens_model_cannot_image():
    # Turns back at r = sqrt(1 / (3 * 0.9)) = 0.61, where it moves points by 500 * 0.9 * 0.61**3 = 101 px; the corner
    # of the image is at r = 0.85, where the formula would say 279 px.
    intrinsics = np.array([[500.0, 0, 210], [0, 500, 330], [0, 0, 1]])
    camera = Camera("c", intrinsics, np.eye(3, 4), (640, 480), np.array([-0.9, 0, 0, 0, 0]))
    assert 97 < distortion_shift_px(camera) <= 500 * 0.9 * (1 / 2.7) ** 1.5


class _Listed:
    """A capture of which only the listings matter: ``segments`` segments of 400 frames and 8 cameras."""

    uri, layout, texture_size, headset_cameras, keypoint_names = "file:///listed", "listed", 8, (), ()
    frontal_camera_id, headset_sequence = None, None
    cameras = tuple(Camera(str(name), np.eye(3), np.eye(3, 4), (4, 4)) for name in range(8))
    topology = SimpleNamespace(num_vertices=3, faces=[0], uvs=[0], landmarks={})

    def __init__(self, segments: int, broken: str | None = None):
        stems = tuple(f"{index:06d}" for index in range(400))
        self.segments = {f"S{index}": stems for index in range(segments)}
        self.broken = broken
        self.threads: set[str] = set()

    def normalization(self) -> None:
        return None

    def notes(self) -> tuple[str, ...]:
        return ("a note",)

    def listing(self, segment: str) -> SegmentListing:
        self.threads.add(threading.current_thread().name)
        if segment == self.broken:
            raise CaptureError(f"{segment} cannot be listed")

        def stems() -> frozenset[str]:
            return frozenset(f"{index:06d}" for index in range(400))

        return SegmentListing(stems(), stems(), stems(), {camera.camera_id: stems() for camera in self.cameras})


def test_progress_is_told_once_a_segment_and_no_listing_is_kept():
    capture, told = _Listed(128), []
    tracemalloc.start()
    try:
        kept = capture.listing("S0")
        listing_bytes = tracemalloc.get_traced_memory()[1]
        del kept
        tracemalloc.reset_peak()
        capture.threads.clear()
        report = inspect_capture(capture, on_segment=lambda: told.append(threading.current_thread().name))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert told == ["MainThread"] * 128
    assert (len(report.segments), report.totals.missing_views) == (128, 0)
    assert report.notes == ("a note",)
    # Each thread holds a listing and builds unions of it. Measured: 6.8 to 7.3 listings at once.
    assert len(capture.threads - {"MainThread"}) <= 8
    assert peak_bytes < 2 * 8 * listing_bytes, (peak_bytes, listing_bytes)


def test_a_listing_that_fails_ends_the_inspection():
    capture = _Listed(200, broken="S5")
    with pytest.raises(CaptureError, match="S5 cannot be listed"):
        inspect_capture(capture)


def test_an_ava256_capture(tmp_path: Path):
    config = LAYOUT_CONFIG.model_copy(update={"missing_fraction": 0.3})
    write_ava256(tmp_path, config, distortion=(-0.1, 0.2, 0.001, -0.002))
    capture = open_capture(tmp_path)
    report = inspect_capture(capture)
    lost = {
        (frame.segment, camera.camera_id, frame.stem)
        for frame in planned_frames(config)
        for camera, missing in zip(
            capture.cameras, synthesise_frame(config, frame.segment, frame.index).missing, strict=False
        )
        if missing
    }
    assert lost
    assert report.layout == "ava256"
    assert report.image_sizes == {"83x128": 3}
    assert sum(entry.views for entry in report.missing_views) == report.totals.missing_views == len(lost)
    for entry in report.missing_views:
        assert entry.views == sum((s, c) == (entry.segment, entry.camera_id) for s, c, _ in lost)
    assert (report.totals.frames, report.totals.views) == (4, 12)
    assert (report.totals.missing_meshes, report.totals.missing_poses, report.totals.stray_frames) == (0, 0, 0)
    for facts, camera in zip(report.cameras, capture.cameras, strict=True):
        assert facts.distortion == (-0.1, 0.2, 0.001, -0.002, 0.0)
        assert facts.distortion_shift_px == distortion_shift_px(camera) > 0
    assert report.driving.headset == "needs driving.landmarks"
    sequence = report.headset_sequence
    assert sequence is not None
    frames = planned_headset_frames(config)
    assert (len(sequence.camera_ids), sequence.frames, sequence.views) == (5, len(frames), 5 * len(frames))
    unseen = sum(synthesise_frame(config, frame.segment, frame.index).missing[3:].sum() for frame in frames)
    assert sequence.missing_views == unseen


def _frames(segments: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    return ((segment, stem) for segment, stems in segments.items() for stem in stems)


def test_the_unpaired_headset_sequence_is_counted_apart(dome: Capture, monkeypatch: pytest.MonkeyPatch):
    sequence = SimpleNamespace(
        camera_ids=("left", "right"),
        segments={"A": ("000007", "000009"), "B": ("000001",)},
        assets=lambda segment, stem: iter([object()] * (1 if stem == "000009" else 2)),
    )
    monkeypatch.setattr(dome, "headset_sequence", sequence, raising=False)
    found = inspect_capture(dome).headset_sequence
    assert found is not None
    assert (found.camera_ids, found.segments, found.frames) == (
        ("left", "right"),
        2,
        len(list(_frames(sequence.segments))),
    )
    assert (found.views, found.missing_views) == (6, 1)
