"""The Multiface reader on captures that are broken in one way each, and the files it is made of."""

import io
import json
import re
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lipflow.errors import CaptureError
from lipflow.types import Camera
from pipeline.capture import SegmentListing, require_pinhole
from pipeline.captures.krt import format_krt, parse_krt
from pipeline.captures.multiface_frame import check_wav
from pipeline.captures.obj import ObjMesh, format_obj, parse_obj
from pipeline.captures.opening import open_capture
from pipeline.images.codecs import CodecError

BLOCK = "{}\n100 0 8\n0 100 12\n0 0 1\n0 0 0 0 0\n1 0 0 0\n0 1 0 0\n0 0 1 900\n\n"
MESH = ObjMesh(
    vertices=np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0.1, 1 / 3, 1e-7]], np.float32),
    uvs=np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32),
    faces=np.array([[0, 1, 2], [1, 3, 2]]),
    uv_faces=np.array([[0, 1, 2], [1, 3, 2]]),
)


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, body in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body.encode() if isinstance(body, str) else body)


def use_capture(folder: Path, what: str) -> None:
    """Open the capture and read one of its attributes, or one of its frame's."""
    capture = open_capture(folder)
    if hasattr(type(capture), what):
        getattr(capture, what)
    elif what != "open":
        getattr(capture.frame("S1", "000010"), what)()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The smallest capture: two cameras, one frame, no driving signals, no statistics."""
    files: dict[str, str | bytes] = {
        "KRT": BLOCK.format("400001") + BLOCK.format("400002"),
        "frame_list.txt": "S1 000010\nS1 000002\n",
        "tracked_mesh/S1/000010.bin": MESH.vertices.tobytes(),
        "tracked_mesh/S1/000010.obj": format_obj(MESH),
        "tracked_mesh/S1/000010_transform.txt": "1 0 0 1\n0 1 0 2\n0 0 1 3\n",
    }
    write(tmp_path, files)
    for name, size in (
        ("images/S1/400002/000010.png", (16, 24)),
        ("unwrapped_uv_1024/S1/average/000002.png", (8, 8)),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (1, 2, 3)).save(tmp_path / name)
    return tmp_path


def test_plain_capture_without_extras_is_read(folder):
    capture = open_capture(folder)
    assert capture.uri == f"file://{folder}"
    assert capture.segments == {"S1": ("000002", "000010")}
    assert [camera.camera_id for camera in capture.cameras] == ["400001", "400002"]
    assert capture.cameras[0].image_size_hw == (24, 16)
    np.testing.assert_array_equal(capture.cameras[0].intrinsics[:2, 2], [8.5, 12.5])
    assert capture.texture_size == 8
    assert capture.headset_cameras == ()
    assert capture.frontal_camera_id is None
    assert capture.keypoint_names == ()
    assert capture.normalization() is None
    np.testing.assert_array_equal(capture.topology.weight_mask, np.ones((1, 1)))
    frame = capture.frame("S1", "000010")
    assert frame.image_file("400001") is None
    assert frame.image_file("400002") is not None
    assert frame.average_texture_file() is None
    assert frame.headset_file("left-eye") is None
    assert frame.keypoints() is None
    np.testing.assert_array_equal(frame.world_from_head()[:, 3], [1, 2, 3])
    np.testing.assert_array_equal(frame.vertices(), MESH.vertices)


@pytest.mark.parametrize(
    ("change", "use", "message"),
    [
        ({"KRT": None, "frame_list.txt": None}, "open", "not a capture: it has neither KRT and frame_list.txt"),
        ({"frame_list.txt": None}, "open", "frame_list.txt: the file is missing"),
        ({"KRT": None}, "open", "KRT: the file is missing"),
        ({"frame_list.txt": "S1 1 2\n"}, "open", "frame_list.txt:1: expected 'SEGMENT FRAME', found 'S1 1 2'"),
        ({"frame_list.txt": "S1 1\nE2\n"}, "open", "frame_list.txt:2: E2 is listed without a frame"),
        ({"frame_list.txt": "../up 1\n"}, "open", "frame_list.txt:1: expected 'SEGMENT FRAME'"),
        ({"frame_list.txt": "\n"}, "open", "no frame is listed"),
        ({"KRT": "400001\n1 0\n"}, "cameras", "KRT:2: expected 3 numbers of camera 400001, found '1 0'"),
        ({"KRT": BLOCK.format("a b")}, "cameras", "KRT:1: expected a camera id alone on its line, found 2 words"),
        ({"KRT": BLOCK.format("7") * 2}, "cameras", "KRT:10: camera 7 is calibrated twice"),
        ({"KRT": BLOCK.format("7")[:24]}, "cameras", "the file ends inside the calibration of camera 7"),
        ({"KRT": BLOCK.format("7").replace("0 1 0 0", "0 2 0 0")}, "cameras", "R of camera 7 is not a rotation"),
        ({"KRT": BLOCK.format("7").replace("100 0 8", "0 0 8")}, "cameras", "KRT:1: K of camera 7 is singular"),
        ({"KRT": BLOCK.format("7").replace("0 0 1\n0 0 0", "0 0 0\n0 0 0")}, "cameras", "K of camera 7 is singular"),
        ({"KRT": BLOCK.format("7").replace("100 0 8", "nan 0 8")}, "cameras", "KRT:2: expected 3 numbers"),
        ({"KRT": ""}, "cameras", "no camera in it"),
        ({"images/S1/400002/000010.png": None}, "cameras", "no image tells the cameras' resolution"),
        ({"images/S1/400002/000010.png": b"x"}, "cameras", "000010.png: not a readable image"),
        ({"tracked_mesh/S1/000010.obj": None}, "topology", "no topology; expected at least one tracked_mesh"),
        ({"tracked_mesh/S1/000010.obj": "v 1 2\nf a\n"}, "topology", "000010.obj:1: expected v x y z"),
        (
            {"tracked_mesh/S1/000010.bin": b"\0" * 36},
            "vertices",
            "3 vertices (float32 x 3), but the capture's topo",
        ),
        ({"tracked_mesh/S1/000010.bin": b"\xff" * 48}, "vertices", "4 of 4 vertices are not finite"),
        (
            {"tracked_mesh/S1/000010.bin": None},
            "vertices",
            "000010.bin: the file is missing, but frame_list.txt lists",
        ),
        ({"tracked_mesh/S1/000010_transform.txt": "2 0 0 1 0 2 0 2 0 0 2 3"}, "world_from_head", "is not rigid"),
        ({"tracked_mesh/S1/000010_transform.txt": "-1 0 0 1 0 1 0 2 0 0 1 3"}, "world_from_head", "is not rigid"),
        (
            {"tracked_mesh/S1/000010_transform.txt": "1 2 3"},
            "world_from_head",
            "expected 12 finite numbers (3 x 4)",
        ),
        ({"tracked_mesh/S1/000010_transform.txt": "1 x"}, "world_from_head", "expected 12 numbers, found text"),
        ({"driving/frontal.json": '{"camera_id": "9"}'}, "frontal_camera_id", "camera '9' is not one of KRT"),
        ({"driving/frontal.json": "{"}, "frontal_camera_id", "frontal.json: not JSON"),
        ({"driving/landmarks.json": '{"nose": 4}'}, "topology", "nose is no index of the 4 vertices"),
        ({"driving/headset.json": '[{"camera_id": "e"}]'}, "headset_cameras", "headset.json: expected camera_id"),
        ({"driving/keypoints/S1/000010.npy": b"x"}, "keypoints", "000010.npy: not a whole npy array"),
    ],
)
def test_broken_capture_is_refused_in_one_line(folder, change, use, message):
    for name, body in change.items():
        if body is None:
            (folder / name).unlink()
        else:
            write(folder, {name: body})
    with pytest.raises((CaptureError, CodecError), match=re.escape(message)) as caught:
        use_capture(folder, use)
    assert "\n" not in str(caught.value)


def test_one_broken_or_odd_image_does_not_decide_the_resolution(folder):
    for number, size in enumerate([(5, 5), (16, 24), (16, 24)]):
        path = folder / f"images/S1/40000{number}/000002.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
    write(folder, {"images/S1/400000/000001.png": b"no image", "images/S1/400003/000002.png": b"no image"})
    assert open_capture(folder).cameras[0].image_size_hw == (24, 16)


def test_listing_names_what_lies_there(folder):
    write(
        folder,
        {
            "audio/S1.wav": b"",
            "images/S1/400001/000002.png": b"",
            "unwrapped_uv_1024/S1/400002/000010.png": b"",
            "driving/headset/S1/left-eye/000010.png": b"",
            "driving/keypoints/S1/000002.npy": b"",
        },
    )
    capture = open_capture(folder)
    assert capture.listing("S1") == SegmentListing(
        vertices=frozenset({"000010"}),
        poses=frozenset({"000010"}),
        average_textures=frozenset({"000002"}),
        images={"400001": frozenset({"000002"}), "400002": frozenset({"000010"})},
        view_textures={"400002": frozenset({"000010"})},
        headset={"left-eye": frozenset({"000010"})},
        keypoints=frozenset({"000002"}),
    )
    assert capture.notes() == ("audio of 1 of 1 segments",)
    assert capture.audio_file("S1") == b""
    assert capture.audio_file("S2") is None


@pytest.mark.parametrize("body", [b"RIFF", b"", b"RIFF\x24\0\0\0WAVEfmt "])
def test_broken_audio_is_refused(body):
    with pytest.raises(CaptureError, match=r"a\.wav: not a readable WAV"):
        check_wav(body, "a.wav")


def test_audio_that_is_cut_off_is_refused():
    stream = io.BytesIO()
    with wave.open(stream, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(400))
    check_wav(stream.getvalue(), "a.wav")
    with pytest.raises(CaptureError, match="300 bytes of sound, but its header says 400"):
        check_wav(stream.getvalue()[:-100], "a.wav")


def test_frame_that_is_not_listed_is_refused(folder):
    with pytest.raises(CaptureError, match=r"S1/000003 is not in frame_list\.txt"):
        open_capture(folder).frame("S1", "000003")


def test_keypoints_of_another_length_are_refused(folder):
    write(folder, {"driving/landmarks.json": json.dumps({"a": 0, "b": 1})})
    (folder / "driving/keypoints/S1").mkdir(parents=True)
    np.save(folder / "driving/keypoints/S1/000010.npy", np.zeros((3, 3), np.float32))
    with pytest.raises(CaptureError, match=r"expected \(2, 3\) finite numbers, found shape \(3, 3\)"):
        open_capture(folder).frame("S1", "000010").keypoints()


def test_pickled_keypoints_are_refused(folder):
    (folder / "driving/keypoints/S1").mkdir(parents=True)
    np.save(folder / "driving/keypoints/S1/000010.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CaptureError, match="not a whole npy array of numbers"):
        open_capture(folder).frame("S1", "000010").keypoints()


def test_distortion_is_kept_and_refused_where_it_cannot_be_modelled():
    text = BLOCK.format("7").replace("0 0 0 0 0", "0.1 0 0 0 0.2")
    (camera,) = parse_krt(text, (24, 16), "KRT")
    np.testing.assert_array_equal(camera.distortion, [0.1, 0, 0, 0, 0.2])
    with pytest.raises(CaptureError, match="KRT: camera 7 has distortion"):
        require_pinhole([camera], "KRT")
    require_pinhole(parse_krt(BLOCK.format("7"), (24, 16), "KRT"), "KRT")


def test_calibration_survives_writing_and_reading():
    generator = np.random.default_rng(3)
    rotation = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    pose = np.concatenate([rotation, generator.normal(size=(3, 1)) * 900], axis=1)
    k = np.array([[7724.681, 0.3, 797.0469], [0, 7724.834, 924.32745], [0, 0, 1]])
    camera = Camera("400069", k, pose, (2048, 1334), generator.normal(size=5))
    (read,) = parse_krt(format_krt([camera]), (2048, 1334), "KRT")
    np.testing.assert_allclose(read.intrinsics, k, rtol=1e-15)
    np.testing.assert_array_equal(read.cam_from_world, pose)
    np.testing.assert_array_equal(read.distortion, camera.distortion)


def test_mesh_survives_writing_and_reading():
    read = parse_obj(format_obj(MESH), "mesh.obj")
    for name in ("vertices", "uvs", "faces", "uv_faces"):
        np.testing.assert_array_equal(getattr(read, name), getattr(MESH, name))


def test_quads_become_two_triangles_and_negative_indices_count_from_the_end():
    text = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 1\nf 1/1/9 2/2/9 3/1/9 -1/-1/9\n"
    mesh = parse_obj(text, "quad.obj")
    np.testing.assert_array_equal(mesh.faces, [[0, 1, 2], [0, 2, 3]])
    np.testing.assert_array_equal(mesh.uv_faces, [[0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v 0 0 0\nvt 0 0\n", "expected v, vt and f lines"),
        ("v 0 0 0\nvt 0 0\nf 1/1 1/1 2/1\n", "a face refers to element 2 of 1"),
        ("v 0 0 0\nvt 0 0\nf 1 1 1\n", "expected v x y z, vt u v or f v/vt v/vt v/vt, found 'f 1 1 1'"),
        ("v 0 0\nvt 0 0\nf 1/1 1/1 1/1\n", "mesh.obj:1: expected v x y z"),
    ],
)
def test_mesh_that_cannot_be_used_is_refused(text, message):
    with pytest.raises(CaptureError, match=message):
        parse_obj(text, "mesh.obj")
