"""Landmarks: the built-in ones of the Multiface topology, those of a file, and the camera that faces them."""

import io
import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lipflow.errors import CaptureError
from lipflow.render.camera import look_at
from lipflow.types import Camera, Topology
from pipeline.captures.krt import format_krt
from pipeline.captures.multiface import MultifaceCapture
from pipeline.captures.obj import ObjMesh, format_obj
from pipeline.dome.face import procedural_face
from pipeline.dome.realface import load_realface
from pipeline.dome.rig import krt_rig
from pipeline.driving.driven import DrivingConfig, with_driving
from pipeline.driving.headset import HEADSET_CAMERA_IDS, HEADSET_LANDMARKS
from pipeline.driving.landmarks import (
    LANDMARK_NAMES,
    face_axes,
    frontal_camera_id,
    multiface_landmarks,
    read_landmarks,
)

FACE = Path(__file__).resolve().parents[3] / "shared" / "assets" / "realface"
needs_face = pytest.mark.skipif(not FACE.is_dir(), reason="the real face asset (../shared/assets/realface) is not here")


@pytest.fixture(scope="module")
def real_topology() -> Topology:
    return load_realface(FACE).topology


def built_in() -> dict:
    return json.loads(resources.files("pipeline.driving").joinpath("multiface_landmarks.json").read_text())


def test_the_built_in_landmarks_are_all_named_and_lie_on_two_sides_of_the_atlas():
    entries = built_in()["landmarks"]
    assert tuple(entries) == LANDMARK_NAMES
    assert len({entry["vertex"] for entry in entries.values()}) == len(LANDMARK_NAMES)
    for name, entry in entries.items():
        if "left" in name:
            u, v = entry["uv"]
            other = entries[name.replace("left", "right")]["uv"]
            assert u > 0.5 > other[0]
            # The atlas is nearly symmetric: measured within 0.016.
            assert abs(u - 0.5 - (0.5 - other[0])) < 0.03
            assert abs(v - other[1]) < 0.03


def test_headset_and_frontal_camera_need_no_other_landmarks_than_every_face_has():
    assert set(HEADSET_LANDMARKS) <= set(LANDMARK_NAMES)


@needs_face
def test_the_built_in_landmarks_are_those_of_the_real_face(real_topology):
    assert multiface_landmarks(real_topology) == dict(real_topology.landmarks)
    for name, entry in built_in()["landmarks"].items():
        places = real_topology.uvs[real_topology.uv_faces[real_topology.faces == entry["vertex"]]]
        # Three digits: at most 0.0005 along each axis, at every corner of the vertex, so that it lies on no seam.
        assert np.abs(places - entry["uv"]).max() <= 0.00051, name


@needs_face
def test_another_topology_of_as_many_vertices_is_not_taken_for_multiface(real_topology):
    generator = np.random.default_rng(0)
    renumbered = generator.permutation(real_topology.num_vertices)
    assert multiface_landmarks(replace(real_topology, faces=renumbered[real_topology.faces])) is None
    assert multiface_landmarks(replace(real_topology, uvs=real_topology.uvs * [1, -1] + [0, 1])) is None
    assert multiface_landmarks(replace(real_topology, num_vertices=7307)) is None
    assert multiface_landmarks(replace(real_topology, uvs=real_topology.uvs + np.float32(0.0005))) is not None


def test_a_topology_whose_faces_do_not_use_the_landmarks_is_not_multifaces():
    topology = replace(procedural_face(16).topology, num_vertices=7306)
    assert multiface_landmarks(topology) is None


def test_the_frontal_camera_is_the_one_along_the_normal_however_the_head_turns():
    head = procedural_face(16)
    landmarks = head.topology.landmarks
    out = face_axes({name: head.neutral[vertex] for name, vertex in landmarks.items()})[:, 2]
    middle = head.neutral[landmarks["nose_bridge"]].astype(np.float64)
    generator = np.random.default_rng(0)
    turn = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    world_from_head = np.concatenate([turn, [[100.0], [-50.0], [900.0]]], axis=1)
    cameras = []
    for degrees in (70.0, 40.0, 8.0, -25.0, 180.0):
        side = np.array([np.sin(np.radians(degrees)), 0.0, 0.0])
        centre = middle + 1000 * (out * np.cos(np.radians(degrees)) + side)
        pose = look_at(world_from_head @ [*centre, 1.0], world_from_head @ [*middle, 1.0], (0.0, 1.0, 0.0))
        cameras.append(Camera(str(degrees), np.diag([100.0, 100.0, 1.0]), pose, (64, 48)))
    assert frontal_camera_id(cameras, landmarks, head.neutral, world_from_head) == "8.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nose_tip": 10**6}, "nose_tip is 1000000; expected the index of a vertex that the faces use"),
        ({"nose_tip": -1}, "nose_tip is -1; expected"),
        ({"nose_tip": True}, "nose_tip is True; expected"),
        ({"nose_tip": "3"}, "nose_tip is '3'; expected"),
        ({"chin": None}, "chin missing; expected at least brow_left_inner"),
        ("{", "not JSON"),
        ("[]", "found list"),
        (None, "no such file; expected a JSON of landmark names"),
    ],
)
def test_landmarks_of_a_file_that_are_wrong_are_refused_with_file_and_entry(tmp_path, change, message):
    topology = procedural_face(16).topology
    path = tmp_path / "mine.json"
    if isinstance(change, dict):
        changed = {**topology.landmarks, **change}
        path.write_text(json.dumps({name: vertex for name, vertex in changed.items() if vertex is not None}))
    elif change is not None:
        path.write_text(change)
    with pytest.raises(CaptureError, match=re.escape(message)) as caught:
        read_landmarks(str(path), topology, HEADSET_LANDMARKS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def real_capture(tmp_path_factory: pytest.TempPathFactory) -> MultifaceCapture:
    """The real face, as a Multiface capture has it: no driving folder, one frame."""
    face = load_realface(FACE)
    folder = tmp_path_factory.mktemp("real")
    cameras, pose = krt_rig(FACE / "KRT", (64, 48))
    mesh = folder / "tracked_mesh/EXP_neutral"
    mesh.mkdir(parents=True)
    (folder / "KRT").write_text(format_krt(cameras))
    (folder / "frame_list.txt").write_text("EXP_neutral 000001\n")
    (mesh / "000001.bin").write_bytes(face.neutral.astype("<f4").tobytes())
    topology = face.topology
    text = format_obj(ObjMesh(face.neutral, topology.uvs, topology.faces, topology.uv_faces))
    (mesh / "000001.obj").write_text(text)
    (mesh / "000001_transform.txt").write_text("\n".join(" ".join(map(str, row)) for row in pose))
    for name, size in (("images/EXP_neutral/400029", (48, 64)), ("unwrapped_uv_1024/EXP_neutral/average", None)):
        (folder / name).mkdir(parents=True)
        image = Image.new("RGB", size) if size else Image.fromarray(face.texture[::-1])
        image.save(folder / name / "000001.png")
    return MultifaceCapture(str(folder))


@needs_face
def test_a_real_multiface_topology_brings_its_landmarks(real_capture):
    assert not real_capture.topology.landmarks
    capture = with_driving(real_capture, DrivingConfig(headset_noise_std=0.0))
    assert dict(capture.topology.landmarks) == dict(load_realface(FACE).topology.landmarks)
    assert capture.frontal_camera_id == "400030"
    frame = capture.frame("EXP_neutral", "000001")
    points = frame.keypoints()
    # All 27 landmarks of the neutral face are seen from the front; the least, an eye's corner, at 0.33.
    assert (points[:, 2] > 0.3).all()
    for name in HEADSET_CAMERA_IDS:
        with Image.open(io.BytesIO(frame.headset_file(name))) as picture:
            assert (picture.mode, picture.size) == ("L", (128, 96))
            image = np.asarray(picture)
        assert (image > 60).mean() > 0.2
        assert image.std() > 10
    assert capture.notes()[-1] == "keypoints: 27 landmarks of the Multiface topology, projected into camera 400030"
