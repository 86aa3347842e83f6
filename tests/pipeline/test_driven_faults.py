"""Driving signals for captures that lack some of what they are made of, or whose landmarks are not known."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lipflow.errors import CaptureError
from pipeline.capture import Capture
from pipeline.captures.opening import open_capture
from pipeline.driving.driven import DrivingConfig, with_driving
from pipeline.driving.headset import HEADSET_LANDMARKS
from pipeline.images.codecs import decode_any_image, encode_image

QUIET = DrivingConfig(headset_image_size_hw=(24, 32), headset_noise_std=0.0)


@pytest.fixture
def bare_folder(own_dome_folder: Path) -> Path:
    """A small dome without driving signals; its landmarks are beside it."""
    shutil.move(own_dome_folder / "driving/landmarks.json", own_dome_folder.parent / "landmarks.json")
    shutil.rmtree(own_dome_folder / "driving")
    return own_dome_folder


def landmarks_of(folder: Path) -> str:
    return str(folder.parent / "landmarks.json")


def driven(folder: Path) -> Capture:
    return with_driving(open_capture(folder), QUIET.model_copy(update={"landmarks": landmarks_of(folder)}))


def keys(capture: Capture) -> list[tuple[str, str]]:
    return [(segment, stem) for segment, stems in capture.segments.items() for stem in stems]


def test_a_frame_without_texture_or_mesh_has_no_views(bare_folder):
    (segment, stem), (_, other), (_, third) = keys(open_capture(bare_folder))[:3]
    (bare_folder / f"unwrapped_uv_1024/{segment}/average/{stem}.png").unlink()
    (bare_folder / f"tracked_mesh/{segment}/{other}.bin").unlink()
    capture = driven(bare_folder)
    no_texture, no_mesh = capture.frame(segment, stem), capture.frame(segment, other)
    assert no_texture.headset_file("cyclops") is None
    assert no_texture.keypoints() is not None
    assert no_mesh.headset_file("cyclops") is None
    assert no_mesh.keypoints() is None
    listing = capture.listing(segment)
    assert listing.headset["cyclops"] == {third}
    assert listing.keypoints == {stem, third}


def test_first_frames_without_mesh_or_pose_are_skipped(bare_folder):
    plain = open_capture(bare_folder)
    first, second = list(plain.segments)[:2]
    stem, whole = plain.segments[first][0], driven(bare_folder)
    (bare_folder / f"tracked_mesh/{first}/{stem}.bin").unlink()
    (bare_folder / f"tracked_mesh/{second}/{stem}_transform.txt").write_text("2 0 0 0 0 2 0 0 0 0 2 0")
    capture = driven(bare_folder)
    assert capture.frontal_camera_id == whole.frontal_camera_id
    for camera, other in zip(capture.headset_cameras, whole.headset_cameras, strict=True):
        assert 0 < np.abs(camera.cam_from_world - other.cam_from_world)[:, 3].max() < 5
    for path in (bare_folder / "tracked_mesh").rglob("*.bin"):
        path.unlink()
    with pytest.raises(CaptureError, match=r"no first frame of a segment has a tracked mesh and a head pose"):
        driven(bare_folder)


def test_a_capture_without_average_textures_is_told_to_unwrap(bare_folder):
    shutil.rmtree(bare_folder / "unwrapped_uv_1024")
    message = f"run `lipflow unwrap file://{bare_folder}` first, or set driving.render=never"
    with pytest.raises(CaptureError, match=re.escape(message)):
        driven(bare_folder)


def test_textures_that_cannot_be_used_are_named(bare_folder):
    for path in (bare_folder / "unwrapped_uv_1024").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CaptureError, match=r"has one that can be used \(.*\.png: a PNG without its end"):
        driven(bare_folder)


def test_a_texture_that_is_not_square_is_refused(bare_folder):
    capture = open_capture(bare_folder)
    key = keys(capture)[1]
    Image.new("RGB", (8, 4)).save(bare_folder / f"unwrapped_uv_1024/{key[0]}/average/{key[1]}.png")
    with pytest.raises(CaptureError, match=r"average/000001\.png: a texture has to be square, found 8 x 4"):
        driven(bare_folder).frame(*key).headset_file("cyclops")


def test_landmarks_that_are_wrong_are_refused(bare_folder, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"nose_tip": 3}')
    with pytest.raises(CaptureError, match=r"mine\.json: brow_left_inner, .* missing; expected at least"):
        with_driving(open_capture(bare_folder), QUIET.model_copy(update={"landmarks": str(path)}))


def test_an_average_texture_may_be_avif(bare_folder):
    """Captures keep their files' names and formats apart: the bytes tell."""
    key = keys(open_capture(bare_folder))[0]
    path = bare_folder / f"unwrapped_uv_1024/{key[0]}/average/{key[1]}.png"
    of_png = driven(bare_folder).frame(*key).headset_file("left-eye")
    path.write_bytes(encode_image(decode_any_image(path.read_bytes(), path.name), "avif", quality=95))
    of_avif = driven(bare_folder).frame(*key).headset_file("left-eye")
    images = [decode_any_image(body, "view", "L").astype(float) for body in (of_png, of_avif)]
    # Measured: 0.38 grey levels.
    assert 0 < np.abs(images[0] - images[1]).mean() < 1


def test_extra_landmarks_become_keypoints(bare_folder, tmp_path):
    document = json.loads(Path(landmarks_of(bare_folder)).read_text())
    few = {name: document[name] for name in HEADSET_LANDMARKS} | {"mole": document["nose_tip"]}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(few))
    capture = with_driving(open_capture(bare_folder), QUIET.model_copy(update={"landmarks": str(path)}))
    assert capture.keypoint_names == (*HEADSET_LANDMARKS, "mole")
    assert capture.frame(*keys(capture)[0]).keypoints().shape == (len(few), 3)


def test_an_unknown_topology_stays_without_signals_and_says_so(bare_folder):
    plain = open_capture(bare_folder)
    capture = with_driving(plain, QUIET)
    assert capture.headset_cameras == ()
    assert capture.frontal_camera_id is None
    assert capture.keypoint_names == ()
    frame = capture.frame(*keys(plain)[0])
    assert frame.headset_file("left-eye") is None
    assert frame.keypoints() is None
    (note,) = capture.notes()
    assert note == (
        f"no headset views, frontal camera, keypoints: the topology of {plain.topology.num_vertices} vertices has no "
        "landmarks and is not Multiface's; give driving.landmarks=FILE.json"
    )
    chosen = plain.cameras[0].camera_id
    named = with_driving(plain, QUIET.model_copy(update={"frontal_camera": chosen}))
    assert named.frontal_camera_id == chosen
    assert named.notes()[0].startswith("no headset views, keypoints: ")


def test_own_landmarks_that_cannot_place_a_headset_still_give_keypoints(bare_folder):
    document = json.loads(Path(landmarks_of(bare_folder)).read_text())
    (bare_folder / "driving").mkdir()
    (bare_folder / "driving/landmarks.json").write_text(json.dumps({"nose_tip": document["nose_tip"]}))
    plain = open_capture(bare_folder)
    camera_id = plain.cameras[0].camera_id
    capture = with_driving(plain, QUIET.model_copy(update={"frontal_camera": camera_id}))
    assert capture.keypoint_names == ("nose_tip",)
    assert capture.frame(*keys(plain)[0]).keypoints().shape == (1, 3)
    assert capture.headset_cameras == ()
    assert capture.notes()[0].startswith("no headset views: the topology of")
    assert "lacks the landmarks brow_left_inner" in capture.notes()[0]
