"""Headset cameras and keypoints: what the impoverished signals show."""

from dataclasses import replace

import numpy as np
import pytest

from lipflow.render.camera import compose, look_at
from lipflow.types import Camera
from pipeline.dome.face import FaceAsset, procedural_face
from pipeline.dome.scene import DomeConfig, dome_scene, synthesise_frame
from pipeline.driving.headset import HEADSET_CAMERA_IDS, HeadsetRig, headset_exposure, headset_rig
from pipeline.driving.landmarks import face_axes, noisy_keypoints, project_landmarks


@pytest.fixture(scope="module")
def head() -> FaceAsset:
    return procedural_face(texture_size=16)


@pytest.fixture(scope="module")
def rig(head: FaceAsset) -> HeadsetRig:
    return headset_rig(spots(head), (48, 64), seed=0)


def spots(head: FaceAsset) -> dict[str, np.ndarray]:
    return {name: head.neutral[vertex] for name, vertex in head.topology.landmarks.items()}


def plain(image_size_hw: tuple[int, int], transmission: float) -> HeadsetRig:
    """One camera of gain 1 behind an even housing."""
    return HeadsetRig((), np.ones(1), np.full((1, *image_size_hw), transmission, np.float32))


def test_five_named_cameras_sit_close_to_the_face(head, rig):
    assert [camera.camera_id for camera in rig.cameras] == [
        "left-eye",
        "right-eye",
        "left-mouth",
        "right-mouth",
        "cyclops",
    ]
    for camera in rig.cameras:
        rotation, translation = camera.cam_from_world[:, :3], camera.cam_from_world[:, 3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        centre = -rotation.T @ translation
        nearest = np.linalg.norm(head.neutral - centre, axis=1).min()
        assert 25 < nearest < 90, camera.camera_id
        assert camera.image_size_hw == (48, 64)


@pytest.mark.parametrize(
    ("camera_id", "seen", "unseen"),
    [
        ("left-eye", "eye_left_lower", "lip_corner_right"),
        ("right-eye", "eye_right_lower", "lip_corner_left"),
        ("left-mouth", "lip_corner_left", "brow_right_outer"),
        ("right-mouth", "lip_corner_right", "brow_left_outer"),
        ("cyclops", "nose_bridge", "chin"),
    ],
)
def test_each_headset_view_is_partial(head, rig, camera_id, seen, unseen):
    index = HEADSET_CAMERA_IDS.index(camera_id)
    pixels, visible = project_landmarks(head.topology, head.neutral, rig.cameras[index], np.eye(3, 4))
    confidence = dict(zip(head.topology.landmarks, visible, strict=True))
    assert confidence[seen] > 0
    assert confidence[unseen] == 0
    assert np.isfinite(pixels).all()
    x, y = dict(zip(head.topology.landmarks, pixels, strict=True))[seen].astype(int)
    assert rig.housing[index, y, x] > 0.9


def test_a_rig_turns_with_the_head_frame(head, rig):
    """Captures choose their own head axes: the same head in another frame is seen alike."""
    turn = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    moved = {name: turn @ spot.astype(np.float64) + [10.0, -300.0, 70.0] for name, spot in spots(head).items()}
    here = face_axes(spots(head))
    np.testing.assert_allclose(face_axes(moved), turn @ here, atol=1e-6)
    np.testing.assert_allclose(here.T @ here, np.eye(3), atol=1e-12)
    assert np.linalg.det(here) == pytest.approx(1.0)
    for camera, other in zip(rig.cameras, headset_rig(moved, (48, 64), seed=0).cameras, strict=True):
        for spot in (spots(head)["nose_tip"], spots(head)["eye_left_outer"]):
            a = camera.cam_from_world @ [*spot, 1.0]
            b = other.cam_from_world @ [*(turn @ spot + [10.0, -300.0, 70.0]), 1.0]
            np.testing.assert_allclose(a, b, atol=1e-9)


def test_housing_hides_a_soft_edged_part_of_every_view(rig):
    assert rig.housing.shape == (5, 48, 64)
    assert rig.housing.dtype == np.float32
    for name, part in zip(HEADSET_CAMERA_IDS, rig.housing, strict=True):
        assert part.min() >= 0, name
        assert part.max() == 1, name
        # Measured: from 0.79 (cyclops) to 0.90 of the light passes.
        assert 0.7 < part.mean() < 0.95, name
        edge = (part > 0.05) & (part < 0.95)
        assert edge.mean() > 0.02, name
        assert np.abs(np.diff(part, axis=0)).max() < 0.7, name
    left, right, _, _, cyclops = rig.housing
    assert left[:12, :32].mean() < 0.5 < left[:12, 32:].mean()  # the nose is on the left of the left eye's image
    assert right[:12, 32:].mean() < 0.5 < right[:12, :32].mean()
    assert left[24:].min() == right[24:].min() == 1
    assert cyclops[:24].min() > 0.95
    assert cyclops[36:, :16].mean() < 0.3
    assert cyclops[36:, 48:].mean() < 0.3
    assert cyclops[36:, 28:36].mean() > 0.6


def test_housing_gains_and_mounts_are_a_function_of_the_seed(head, rig):
    again, other = headset_rig(spots(head), (48, 64), seed=0), headset_rig(spots(head), (48, 64), seed=1)
    np.testing.assert_array_equal(rig.housing, again.housing)
    np.testing.assert_array_equal(rig.gains, again.gains)
    for camera, same, moved in zip(rig.cameras, again.cameras, other.cameras, strict=True):
        np.testing.assert_array_equal(camera.cam_from_world, same.cam_from_world)
        assert np.abs(camera.cam_from_world - moved.cam_from_world).max() > 0.01
    assert all(np.abs(a - b).max() > 0.02 for a, b in zip(rig.housing, other.housing, strict=True))
    assert len(set(rig.gains.tolist())) == 5
    assert np.abs(rig.gains - 1).max() <= 0.15
    assert np.abs(rig.gains - other.gains).max() > 0.01


def test_headset_images_are_monochrome_show_skin_and_the_dark_housing(rig):
    config = DomeConfig(cameras=1, image_size_hw=(16, 12), texture_size=32, segments=1, frames_per_segment=1)
    frame = synthesise_frame(config, "EXP_jaw_open", 0)
    assert frame.headset_images.shape == (5, 48, 64)
    assert frame.headset_images.dtype == np.uint8
    for image, part in zip(frame.headset_images, rig.housing, strict=True):
        assert (image > 40).mean() > 0.3
        assert image.std() > 10
        hidden = image[part == 0]
        assert 1 < hidden.mean() < 12
        assert hidden.max() < 30


def test_exposure_darkens_the_corners_and_adds_noise_of_the_stated_size():
    images = np.full((1, 48, 64, 3), 100.0, np.float32)
    free = plain((48, 64), 1.0)
    clean = headset_exposure(images, free, 0.0, np.random.default_rng(0))
    assert clean[0, 24, 32] == 100
    assert clean[0, 0, 0] < 75
    noisy = headset_exposure(images, free, 3.0, np.random.default_rng(0)).astype(float)
    assert (noisy - clean).std() == pytest.approx(3.0, rel=0.05)


def test_behind_the_housing_nothing_of_the_face_is_left():
    generator = np.random.default_rng(0)
    faces = generator.uniform(0, 255, (2, 1, 24, 32, 3)).astype(np.float32)
    hidden = [headset_exposure(face, plain((24, 32), 0.0), 0.0, generator) for face in faces]
    np.testing.assert_array_equal(hidden[0], hidden[1])
    assert 0 < hidden[0].min() <= hidden[0].max() < 10
    half = headset_exposure(np.full((1, 24, 32, 3), 100.0, np.float32), plain((24, 32), 0.5), 0.0, generator)
    assert 50 < half[0, 12, 16] < 60


def test_landmarks_project_where_the_camera_sees_them(head):
    k = np.array([[800.0, 0, 240], [0, 800.0, 320], [0, 0, 1]])
    front = Camera("f", k, look_at(np.array([0.0, 0, 1000]), np.zeros(3), (0.0, 1.0, 0.0)), (640, 480))
    pixels, visible = project_landmarks(head.topology, head.neutral, front, np.eye(3, 4))
    spots = dict(zip(head.topology.landmarks, pixels, strict=True))
    assert spots["eye_left_outer"][0] > spots["eye_right_outer"][0]  # the subject's left is on the image's right
    assert spots["chin"][1] > spots["nose_tip"][1] > spots["brow_left_inner"][1]
    assert (visible > 0).all()
    behind = replace(front, cam_from_world=look_at(np.array([0.0, 0, -1000]), np.zeros(3), (0.0, 1.0, 0.0)))
    _, hidden = project_landmarks(head.topology, head.neutral, behind, np.eye(3, 4))
    assert (hidden == 0).all()
    profile = replace(front, cam_from_world=look_at(np.array([1000.0, 0, 0]), np.zeros(3), (0.0, 1.0, 0.0)))
    _, seen = project_landmarks(head.topology, head.neutral, profile, np.eye(3, 4))
    confidence = dict(zip(head.topology.landmarks, seen, strict=True))
    assert confidence["eye_left_outer"] > 0
    assert confidence["eye_right_outer"] == confidence["lip_corner_right"] == 0


def test_keypoints_have_the_stated_noise_and_are_zero_where_unseen():
    pixels = np.zeros((2000, 2)) + 50
    visibility = np.repeat([0.0, 0.7], 1000)
    keypoints = noisy_keypoints(pixels, visibility, 0.3, np.random.default_rng(0))
    assert keypoints.dtype == np.float32
    np.testing.assert_array_equal(keypoints[:1000], 0)
    assert (keypoints[1000:, :2] - 50).std() == pytest.approx(0.3, rel=0.05)
    np.testing.assert_allclose(keypoints[1000:, 2], 0.7, rtol=1e-6)


def test_frontal_camera_looks_along_the_face():
    scene = dome_scene(DomeConfig(cameras=40, image_size_hw=(64, 48), texture_size=16))
    camera = next(c for c in scene.cameras if c.camera_id == scene.frontal_camera_id)
    cam_from_head = compose(camera.cam_from_world, scene.world_from_head)
    centre = -cam_from_head[:, :3].T @ cam_from_head[:, 3]
    assert centre[2] / np.linalg.norm(centre) > np.cos(np.radians(20))
    _, visible = project_landmarks(scene.face.topology, scene.face.neutral, camera, scene.world_from_head)
    assert (visible > 0).mean() > 0.9
