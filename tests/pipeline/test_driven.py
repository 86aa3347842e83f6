"""Driving signals made for captures that have none."""

import io
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lipflow.errors import CaptureError
from pipeline.capture import Capture, CaptureFrame
from pipeline.captures.krt import format_krt
from pipeline.captures.opening import open_capture
from pipeline.captures.view import CaptureView
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.driving.driven import DrivenCapture, DrivingConfig, with_driving
from pipeline.driving.headset import HEADSET_CAMERA_IDS
from pipeline.driving.landmarks import project_landmarks

HEADSET_HW = (48, 64)
QUIET = DrivingConfig(headset_image_size_hw=HEADSET_HW, headset_noise_std=0.0)
NOISY = DrivingConfig(headset_image_size_hw=HEADSET_HW, keypoint_noise_px=0.5)


@pytest.fixture(scope="module")
def rich_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dome with its own headset views; its textures are fine enough for them."""
    folder = tmp_path_factory.mktemp("rich")
    config = DomeConfig(
        cameras=6,
        image_size_hw=(64, 48),
        texture_size=256,
        segments=3,
        frames_per_segment=2,
        headset_image_size_hw=HEADSET_HW,
        headset_noise_std=0.0,
        keypoint_noise_px=0.0,
    )
    write_dome(config, str(folder))
    return folder


@pytest.fixture(scope="module")
def bare_folder(rich_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without any driving signals; the procedural head's landmarks are beside it."""
    folder = tmp_path_factory.mktemp("bare") / "capture"
    shutil.copytree(rich_folder, folder)
    shutil.move(folder / "driving/landmarks.json", folder.parent / "landmarks.json")
    shutil.rmtree(folder / "driving")
    return folder


@pytest.fixture
def own_bare_folder(bare_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage, with the landmarks beside it."""
    shutil.copy(landmarks_of(bare_folder), tmp_path)
    return Path(shutil.copytree(bare_folder, tmp_path / "bare"))


def landmarks_of(folder: Path) -> str:
    return str(folder.parent / "landmarks.json")


def driven(folder: Path, config: DrivingConfig = QUIET) -> Capture:
    return with_driving(open_capture(folder), config.model_copy(update={"landmarks": landmarks_of(folder)}))


def pixels(body: bytes | None) -> np.ndarray:
    assert body is not None
    with Image.open(io.BytesIO(body)) as image:
        assert image.mode == "L"
        return np.asarray(image).astype(np.float64)


def all_signals(capture: Capture, order: list[tuple[str, str]]) -> dict[tuple[str, ...], bytes]:
    found: dict[tuple[str, ...], bytes] = {}
    for segment, stem in order:
        frame = capture.frame(segment, stem)
        points = frame.keypoints()
        assert points is not None
        found[segment, stem] = points.tobytes()
        for camera in capture.headset_cameras:
            body = frame.headset_file(camera.camera_id)
            assert body is not None
            found[segment, stem, camera.camera_id] = body
    return found


def keys(capture: Capture) -> list[tuple[str, str]]:
    return [(segment, stem) for segment, stems in capture.segments.items() for stem in stems]


def test_a_capture_that_lacks_nothing_is_returned_itself(rich_folder):
    capture = open_capture(rich_folder)
    assert with_driving(capture, QUIET) is capture
    declared = DrivingConfig(frontal_camera=capture.frontal_camera_id)
    assert with_driving(capture, declared) is capture


def test_never_leaves_a_capture_without_signals(bare_folder):
    capture = open_capture(bare_folder)
    assert with_driving(capture, DrivingConfig(render="never", landmarks="nowhere.json")) is capture


def test_the_wrapper_is_a_capture_and_passes_everything_else_through(bare_folder):
    plain, capture = open_capture(bare_folder), driven(bare_folder)
    assert isinstance(capture, DrivenCapture)
    assert isinstance(capture, Capture)
    assert (capture.layout, capture.uri, capture.segments) == (plain.layout, plain.uri, plain.segments)
    segment, stem = keys(plain)[0]
    frame, source = capture.frame(segment, stem), plain.frame(segment, stem)
    assert isinstance(frame, CaptureFrame)
    assert (frame.segment, frame.frame) == (segment, stem)
    np.testing.assert_array_equal(frame.vertices(), source.vertices())
    np.testing.assert_array_equal(frame.world_from_head(), source.world_from_head())
    camera_id = plain.cameras[0].camera_id
    assert frame.image_file(camera_id) == source.image_file(camera_id)
    assert frame.average_texture_file() == source.average_texture_file()
    assert frame.view_texture_file(camera_id) is None
    assert [asset.source for asset in frame.assets()] == [asset.source for asset in source.assets()]
    assert frame.source_of("image", camera_id) == source.source_of("image", camera_id)
    assert frame.source_of("headset", "left-eye") == f"{source.source_of('vertices')} (rendered for left-eye)"


def test_listing_and_assets_tell_what_is_made(bare_folder):
    capture = driven(bare_folder)
    for segment, stems in capture.segments.items():
        listing = capture.listing(segment)
        assert listing.headset == dict.fromkeys(HEADSET_CAMERA_IDS, frozenset(stems))
        assert listing.keypoints == frozenset(stems)
    plain = {asset.source for asset in open_capture(bare_folder).shared_assets()}
    (added,) = [asset for asset in capture.shared_assets() if asset.source not in plain]
    assert added.source == f"file://{landmarks_of(bare_folder)}"
    added.check()


def test_bytes_do_not_depend_on_the_order_of_calls(bare_folder):
    capture = driven(bare_folder, NOISY)
    order = keys(capture)
    forward = all_signals(capture, order)
    assert all_signals(driven(bare_folder, NOISY), order[::-1]) == forward
    frame = capture.frame(*order[0])
    backward = [frame.headset_file(name) for name in reversed(HEADSET_CAMERA_IDS)]
    assert backward == [forward[(*order[0], name)] for name in reversed(HEADSET_CAMERA_IDS)]
    assert len(set(forward.values())) == len(forward)


def test_bytes_do_not_depend_on_the_process(bare_folder):
    program = (
        "import sys, zlib\n"
        "from pipeline.captures.opening import open_capture\n"
        "from pipeline.driving.driven import DrivingConfig, with_driving\n"
        "config = DrivingConfig.model_validate_json(sys.argv[2])\n"
        "capture = with_driving(open_capture(sys.argv[1]), config)\n"
        "frame = capture.frame(sys.argv[3], sys.argv[4])\n"
        "files = [frame.headset_file(camera.camera_id) for camera in capture.headset_cameras]\n"
        "print(zlib.crc32(b''.join(files) + frame.keypoints().tobytes()))\n"
    )
    config = NOISY.model_copy(update={"landmarks": landmarks_of(bare_folder)})
    capture = with_driving(open_capture(bare_folder), config)
    key = keys(capture)[-1]
    arguments = [str(bare_folder), config.model_dump_json(), *key]
    answer = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    signals = all_signals(capture, [key])
    body = b"".join(signals[(*key, name)] for name in HEADSET_CAMERA_IDS) + signals[key]
    assert int(answer.stdout) == zlib.crc32(body)


def test_another_seed_moves_cameras_gains_housing_and_noise(bare_folder):
    first, second = driven(bare_folder, NOISY), driven(bare_folder, NOISY.model_copy(update={"seed": 1}))
    for a, b in zip(first.headset_cameras, second.headset_cameras, strict=True):
        moved = np.abs(a.cam_from_world - b.cam_from_world)[:, 3].max()
        assert 0.05 < moved < 12.0
    key = keys(first)[0]
    one, other = all_signals(first, [key]), all_signals(second, [key])
    assert all(one[name] != other[name] for name in one)


def test_rendered_views_agree_with_the_domes_own(rich_folder, bare_folder):
    own, capture = open_capture(rich_folder), driven(bare_folder)
    psnr, correlation = [], []
    # The dome's rig sits on the neutral head, this one on the mean of the first frames: its views are rendered anew
    # through the dome's cameras, so that pixels can be compared.
    assert isinstance(capture, DrivenCapture)
    assert capture.plan.rig is not None
    same = replace(capture.plan, rig=replace(capture.plan.rig, cameras=own.headset_cameras))
    capture = DrivenCapture(capture.inner, same, ())
    for key in keys(own):
        for name in HEADSET_CAMERA_IDS:
            stored = pixels(own.frame(*key).headset_file(name))
            made = pixels(capture.frame(*key).headset_file(name))
            psnr.append(10 * np.log10(255**2 / ((stored - made) ** 2).mean()))
            correlation.append(np.corrcoef(stored.ravel(), made.ravel())[0, 1])
    # The average texture lacks the shine of each view. Measured: 41.2 dB in the mean, 35.5 dB and 0.9978 at worst.
    assert np.mean(psnr) > 40
    assert min(psnr) > 34
    assert min(correlation) > 0.995


def test_the_rig_on_the_mean_head_is_near_the_one_on_the_neutral_head(rich_folder, bare_folder):
    own, capture = open_capture(rich_folder), driven(bare_folder)
    offsets = []
    for a, b in zip(own.headset_cameras, capture.headset_cameras, strict=True):
        assert a.camera_id == b.camera_id
        centres = [-c.cam_from_world[:, :3].T @ c.cam_from_world[:, 3] for c in (a, b)]
        offsets.append(np.linalg.norm(centres[0] - centres[1]))
    # Measured: at most 3.4 mm, at the mouth, which is open in some first frames.
    assert max(offsets) < 5


def test_a_mesh_that_moves_moves_the_picture_and_not_the_housing(bare_folder, own_bare_folder):
    key = keys(open_capture(bare_folder))[1]
    path = own_bare_folder / "tracked_mesh" / key[0] / f"{key[1]}.bin"
    mesh = np.frombuffer(path.read_bytes(), "<f4").reshape(-1, 3)
    path.write_bytes((mesh + np.array([3.0, 0, 0], np.float32)).astype("<f4").tobytes())
    before, after = driven(bare_folder), driven(own_bare_folder)
    assert isinstance(before, DrivenCapture)
    assert before.plan.rig is not None
    for name, housing in zip(HEADSET_CAMERA_IDS, before.plan.rig.housing, strict=True):
        pair = [pixels(capture.frame(*key).headset_file(name)) for capture in (before, after)]
        assert (pair[0] != pair[1]).mean() > 0.1
        hidden = housing == 0
        assert hidden.mean() > 0.01
        np.testing.assert_array_equal(pair[0][hidden], pair[1][hidden])
        assert pair[0][hidden].min() > 0


def test_frontal_camera_is_the_one_that_the_dome_declares(rich_folder, bare_folder):
    capture = driven(bare_folder)
    assert capture.frontal_camera_id == open_capture(rich_folder).frontal_camera_id
    assert f"frontal camera {capture.frontal_camera_id}: the nearest to the face's normal" in capture.notes()


def test_frontal_camera_can_be_named(rich_folder, bare_folder):
    chosen = open_capture(bare_folder).cameras[3].camera_id
    named = QUIET.model_copy(update={"frontal_camera": chosen})
    for capture in (driven(bare_folder, named), with_driving(open_capture(rich_folder), named)):
        assert capture.frontal_camera_id == chosen
        key = keys(capture)[2]
        frame = capture.frame(*key)
        expected, seen = project_landmarks(
            capture.topology, frame.vertices(), capture.cameras[3], frame.world_from_head()
        )
        points = frame.keypoints()
        np.testing.assert_allclose(points[seen > 0, :2], expected[seen > 0], atol=1e-4)
    with pytest.raises(CaptureError, match=r"driving\.frontal_camera is 'x', which is none of its cameras"):
        driven(bare_folder, QUIET.model_copy(update={"frontal_camera": "x"}))


def test_frontal_camera_is_chosen_among_the_cameras_that_may_drive(bare_folder):
    plain = open_capture(bare_folder)
    ids = [camera.camera_id for camera in plain.cameras]
    config = QUIET.model_copy(update={"landmarks": landmarks_of(bare_folder)})
    nearest = with_driving(plain, config).frontal_camera_id
    others = [camera_id for camera_id in ids if camera_id != nearest]
    second = with_driving(plain, config, frontal_among=others).frontal_camera_id
    assert second in others
    assert with_driving(plain, config, frontal_among=[second, ids[-1]]).frontal_camera_id == second


def test_keypoints_are_the_projected_landmarks_and_equal_the_domes_own(rich_folder, bare_folder):
    own, capture = open_capture(rich_folder), driven(bare_folder)
    assert capture.keypoint_names == own.keypoint_names
    frontal = next(camera for camera in capture.cameras if camera.camera_id == capture.frontal_camera_id)
    for key in keys(own):
        frame = capture.frame(*key)
        points, stored = frame.keypoints(), own.frame(*key).keypoints()
        spots, seen = project_landmarks(capture.topology, frame.vertices(), frontal, frame.world_from_head())
        np.testing.assert_array_equal(points[:, 2], seen.astype(np.float32))
        np.testing.assert_array_equal(points[seen > 0, :2], spots[seen > 0].astype(np.float32))
        assert (points[seen == 0] == 0).all()
        np.testing.assert_array_equal(points, stored)


def test_keypoints_of_a_distorted_frontal_camera_are_the_pinholes(bare_folder, own_bare_folder):
    plain = open_capture(bare_folder)
    bent = [replace(camera, distortion=np.array([-0.2, 0.1, 0, 0, 0])) for camera in plain.cameras]
    (own_bare_folder / "KRT").write_text(format_krt(bent))
    capture = driven(own_bare_folder)
    key = keys(plain)[0]
    expected = driven(bare_folder).frame(*key).keypoints()
    np.testing.assert_array_equal(capture.frame(*key).keypoints(), expected)
    assert capture.notes()[-1].endswith(
        f"projected into camera {capture.frontal_camera_id} without its lens distortion"
    )


class _WithoutKeypoints(CaptureView):
    """The rich dome, whose frames lost their keypoints."""

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        return ()


def test_stored_headset_views_are_kept_where_only_keypoints_are_missing(rich_folder):
    own = open_capture(rich_folder)
    capture = with_driving(_WithoutKeypoints(own), QUIET)
    assert capture.headset_cameras == own.headset_cameras
    assert capture.frontal_camera_id == own.frontal_camera_id
    key = keys(own)[0]
    assert capture.frame(*key).headset_file("left-eye") == own.frame(*key).headset_file("left-eye")
    np.testing.assert_array_equal(capture.frame(*key).keypoints(), own.frame(*key).keypoints())
    assert len(capture.notes()) == 1


def test_unknown_keys_and_values_are_refused():
    for wrong in ({"headset_noise_std": -1}, {"supersampling": 9}, {"render": "always"}, {"headset": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DrivingConfig.model_validate(wrong)
