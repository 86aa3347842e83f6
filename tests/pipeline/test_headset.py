"""Headset cameras and keypoints: what the impoverished signals show."""

from dataclasses import replace

import numpy as np
import pytest

from lipflow.render.camera import compose
from lipflow.types import Camera
from pipeline.captures.face import FaceAsset, procedural_face
from pipeline.captures.headset import headset_cameras, headset_exposure, headset_gains
from pipeline.captures.landmarks import noisy_keypoints, project_landmarks
from pipeline.captures.rig import look_at
from pipeline.captures.scene import DomeConfig, dome_scene, synthesise_frame


@pytest.fixture(scope="module")
def head() -> FaceAsset:
    return procedural_face(texture_size=16)


def test_five_named_cameras_sit_close_to_the_face(head):
    cameras = headset_cameras(head, (48, 64), seed=0)
    assert [camera.camera_id for camera in cameras] == [
        "left-eye",
        "right-eye",
        "left-mouth",
        "right-mouth",
        "cyclops",
    ]
    for camera in cameras:
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
def test_each_headset_view_is_partial(head, camera_id, seen, unseen):
    camera = next(c for c in headset_cameras(head, (48, 64), seed=0) if c.camera_id == camera_id)
    pixels, visible = project_landmarks(head.topology, head.neutral, camera, np.eye(3, 4))
    confidence = dict(zip(head.topology.landmarks, visible, strict=True))
    assert confidence[seen] > 0
    assert confidence[unseen] == 0
    assert np.isfinite(pixels).all()


def test_headset_images_are_monochrome_show_skin_and_differ_in_gain():
    config = DomeConfig(cameras=1, image_size_hw=(16, 12), texture_size=32, segments=1, frames_per_segment=1)
    frame = synthesise_frame(config, "EXP_jaw_open", 0)
    assert frame.headset_images.shape == (5, 48, 64)
    assert frame.headset_images.dtype == np.uint8
    for image in frame.headset_images:
        assert (image > 40).mean() > 0.3
        assert image.std() > 10
    gains = headset_gains(5, seed=0)
    assert len(set(gains.tolist())) == 5
    assert np.abs(gains - 1).max() <= 0.15


def test_exposure_darkens_the_corners_and_adds_noise_of_the_stated_size():
    images = np.full((1, 48, 64, 3), 100.0, np.float32)
    clean = headset_exposure(images, np.ones(1), 0.0, np.random.default_rng(0))
    assert clean[0, 24, 32] == 100
    assert clean[0, 0, 0] < 75
    noisy = headset_exposure(images, np.ones(1), 3.0, np.random.default_rng(0)).astype(float)
    assert (noisy - clean).std() == pytest.approx(3.0, rel=0.05)


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
