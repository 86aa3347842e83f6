"""The parsers of the Ava-256 layout's single files: what is published reads, and each fault has its name."""

import io
import json
import re

import numpy as np
import pytest

from lipflow.errors import CaptureError
from pipeline.capture_errors import (
    DuplicateCameraError,
    EmptySegmentError,
    ImageSizeError,
    SingularIntrinsicsError,
    VertexCountError,
)
from pipeline.captures.ava256_calibration import parse_calibration
from pipeline.captures.ava256_files import parse_frame_list, parse_keypoints_3d, parse_ply_vertices
from pipeline.captures.tracked import parse_npy
from tests.pipeline import ava256_layout as layout


def calibration(**changes) -> str:
    """Two cameras, the second of which is changed."""
    good = {
        "cameraId": "400001",
        "projectionModel": "Pinhole",
        "distortionModel": "RadialAndTangential",
        "K": [[9000.0, 0, 0], [0, 9000.0, 0], [1300.0, 2000.0, 1]],
        "distortion": [0, 0, 0, 0],
        "T": np.eye(4).tolist(),
    }
    return json.dumps({"KRT": [good, {**good, "cameraId": "400002", **changes}]})


def test_published_calibration_reads_at_the_published_size():
    """The first camera of the public repository's own example, at 1024 x 667: K over 4, as its loader has it."""
    entry = {
        "cameraId": "400940",
        "projectionModel": "Pinhole",
        "distortionModel": "RadialAndTangential",
        "K": [[10355.088822966874, 0, 0], [0, 10348.63046928018, 0], [1413.0678767818574, 1783.6004577007388, 1]],
        "distortion": [-0.07339013471001112, 0.0438590024313828, -0.0033712694471925327, 0.002999176425272759],
        "T": [
            [0.5037485117233746, 0.7170982473738078, -0.481671610695397, 0],
            [0.18226948789800734, 0.4568011355630681, 0.8706954440731212, 0],
            [0.8444023156753439, -0.526405571932616, 0.09940776187206057, 0],
            [-854.7404175868919, 576.3864655587835, 988.4146443065116, 1],
        ],
    }
    (camera,) = parse_calibration(json.dumps({"KRT": [entry]}), (1024, 667), "camera_calibration.json")
    expected = np.array(entry["K"]).T / [[4], [4], [1]]
    np.testing.assert_allclose(camera.intrinsics, expected, rtol=1e-15)
    np.testing.assert_array_equal(camera.cam_from_world[:, 3], entry["T"][3][:3])
    assert camera.distortion.shape == (5,)


@pytest.mark.parametrize("size", [(4096, 2668), (2048, 1334), (1024, 667), (512, 333), (512, 334), (128, 83), (96, 63)])
def test_image_sizes_of_the_sensors_aspect_are_scaled(size):
    full = parse_calibration(calibration(), (4096, 2668), "k")[0].intrinsics
    scaled = parse_calibration(calibration(), size, "k")[0].intrinsics
    np.testing.assert_allclose(scaled[:2], full[:2] * [[size[1] / 2668], [size[0] / 4096]], rtol=1e-15)


@pytest.mark.parametrize("size", [(667, 1024), (1024, 669), (1024, 665), (1024, 1024), (2048, 1024)])
def test_image_sizes_of_another_aspect_are_refused(size):
    with pytest.raises(ImageSizeError, match=rf"stored images are {size[1]}x{size[0]}, of another aspect"):
        parse_calibration(calibration(), size, "k")


@pytest.mark.parametrize(
    ("text", "fault", "message"),
    [
        (calibration(cameraId="400001"), DuplicateCameraError, "k: camera 400001 is calibrated twice"),
        (
            calibration(K=[[0, 0, 0], [0, 0, 0], [0, 0, 1]]),
            SingularIntrinsicsError,
            "K of camera 400002 is singular",
        ),
        (
            calibration(K=[[9000.0, 0, 1300.0], [0, 9000.0, 2000.0], [0, 0, 1]]),
            SingularIntrinsicsError,
            "K of camera 400002 is singular or no pinhole's",
        ),
        (calibration(K=[[1, 0], [0, 1]]), CaptureError, "K of camera 400002 is not 3 x 3 finite numbers"),
        (calibration(T=[[float("nan")] * 4] * 4), CaptureError, "T of camera 400002 is not 4 x 4 finite numbers"),
        (calibration(T=(2 * np.eye(4)).tolist()), CaptureError, "T of camera 400002 ends in [0.0, 0.0, 0.0, 2.0]"),
        (
            calibration(T=[[1, 0, 0, 5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
            CaptureError,
            "ends in [5.0, 0.0, 0.0, 1.0] once transposed",
        ),
        (calibration(T=np.diag([2, 2, 2, 1]).tolist()), CaptureError, "R of camera 400002 is not a rotation"),
        (calibration(distortion=[0, 0]), CaptureError, "distortion of camera 400002 is not 4 finite numbers"),
        (
            calibration(distortionModel="Fisheye62"),
            CaptureError,
            "distortionModel of camera 400002 is 'Fisheye62', only 'RadialAndTangential' is read",
        ),
        (calibration(projectionModel="Ortho"), CaptureError, "projectionModel of camera 400002 is 'Ortho'"),
        (calibration(cameraId=""), CaptureError, "entry 1 of KRT has no usable cameraId"),
        ('{"KRT": []}', CaptureError, "no camera in it"),
        ("[]", CaptureError, "no camera in it"),
        ("{", CaptureError, "not JSON"),
    ],
)
def test_faulty_calibration_is_refused(text, fault, message):
    with pytest.raises(fault, match=re.escape(message)) as caught:
        parse_calibration(text, (1024, 667), "k")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "fault", "message"),
    [
        ("seg_id,frame_id\nA,1\nB,\n", EmptySegmentError, "f:3: segment B is listed without a frame"),
        ("seg_id,frame_id\nA,1\nB\n", CaptureError, "f:3: 1 values, expected 2 (seg_id,frame_id)"),
        ("seg_id,frame_id\nA,1\nB,1,2\n", CaptureError, "f:3: 3 values, expected 2"),
        ("seg_id,frame_id\nA,one\n", CaptureError, "f:2: expected a frame number, found 'one'"),
        ("seg_id,frame_id\nA,-1\n", CaptureError, "f:2: expected a frame number, found '-1'"),
        ("seg_id,frame_id\n../up,1\n", CaptureError, "f:2: expected the name of a segment, found '../up'"),
        ("seg_id,frame_id\nA,7\nB,8\nB,007\n", CaptureError, "f:4: frame 7 is listed already in line 2"),
        ("seg_id,frame_id\n", CaptureError, "f: no frame is listed"),
        ("A,1\n", CaptureError, "f:1: expected the columns seg_id,frame_id, found 'A,1'"),
        ("", CaptureError, "f:1: expected the columns"),
        ('seg_id,frame_id\n"A"x,1\n', CaptureError, "f:2: not CSV"),
    ],
)
def test_faulty_frame_list_is_refused_by_line(text, fault, message):
    with pytest.raises(fault, match=re.escape(message)):
        parse_frame_list(text, "f")


def test_frame_list_takes_quotes_other_columns_and_line_ends():
    text = '\ufeffframe_id,seg_id,note\r\n12,"A, b",x\r\n1234567,A,\r\n\r\n000003,A,y\r\n'
    assert parse_frame_list(text, "f") == {"A": ("000003", "1234567"), "A, b": ("000012",)}


VERTICES = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)


@pytest.mark.parametrize("text", [False, True])
def test_ply_reads_exactly(text):
    body = layout.ply_bytes(VERTICES, text=text)
    if text:
        np.testing.assert_allclose(parse_ply_vertices(body, 9, "p"), VERTICES, rtol=1e-6)
    else:
        np.testing.assert_array_equal(parse_ply_vertices(body, 9, "p"), VERTICES)


@pytest.mark.parametrize(
    ("body", "fault", "message"),
    [
        (b"", CaptureError, "not a PLY mesh with a whole header"),
        (layout.ply_bytes(VERTICES)[:-1], CaptureError, "not a whole PLY mesh"),
        (layout.ply_bytes(VERTICES).replace(b"float y", b"float q"), CaptureError, "not a whole PLY mesh with x, y, z"),
        (layout.ply_bytes(VERTICES, text=True).replace(b"vertex 9", b"vertex 8"), VertexCountError, "8 vertices, but"),
        (
            layout.ply_bytes(VERTICES, text=True).replace(b"vertex 9", b"vertex 99999999999999999999"),
            VertexCountError,
            "999999999999 vertices, but the capture's topology has 9",
        ),
        (
            layout.ply_bytes(VERTICES, text=True).replace(b"end_header", b"element face 999999999\nend_header"),
            CaptureError,
            "declares more than 1000000 elements",
        ),
        (b"\0" * (64 * 2**20 + 1), CaptureError, "bytes of PLY, at most"),
    ],
    # pytest would write the bodies themselves into the tests' names, the last with 256 MB.
    ids=["empty", "cut", "another field", "another count", "absurd count", "many elements", "too large"],
)
def test_faulty_ply_is_refused_before_anything_is_allocated(body, fault, message):
    with pytest.raises(fault, match=re.escape(message)):
        parse_ply_vertices(body, 9, "p")


ROWS = np.column_stack([np.arange(0, 274, 3), np.random.default_rng(1).normal(size=(92, 5))])


def test_keypoints_may_be_flat_and_of_any_float():
    for stored in (ROWS, ROWS.ravel(), np.asfortranarray(ROWS), np.zeros((0, 6))):
        np.testing.assert_array_equal(parse_keypoints_3d(layout.npy_bytes(stored), "n"), stored.reshape(-1, 6))
    read = parse_keypoints_3d(layout.npy_bytes(ROWS.astype(np.float32)), "n")
    np.testing.assert_allclose(read, ROWS, rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:, :5], "expected rows of 6 numbers, found shape (92, 5)"),
        (ROWS.ravel()[:-1], "expected rows of 6 numbers"),
        (np.concatenate([ROWS, ROWS[:1]]), "a keypoint's id comes twice"),
        (np.add(ROWS, [1.5, 0, 0, 0, 0, 0]), "id is not a whole number in 0..273"),
        (np.add(ROWS, [4, 0, 0, 0, 0, 0]), "id is not a whole number in 0..273"),
        (ROWS * [1, np.nan, 1, 1, 1, 1], "not a finite number"),
    ],
)
def test_faulty_keypoints_are_refused(rows, message):
    with pytest.raises(CaptureError, match=re.escape(message)):
        parse_keypoints_3d(layout.npy_bytes(rows), "n")


def test_arrays_of_objects_and_huge_headers_are_refused():
    stream = io.BytesIO()
    np.save(stream, np.array([{}], dtype=object), allow_pickle=True)
    good, text = layout.npy_bytes(ROWS), layout.npy_bytes(np.array(["a"]))
    claimed = good.replace(b"(92, 6), }" + b" " * 9, b"(99999999999, 6), }")
    unreadable = good.replace(b"(92, 6)", b"((92, 6")
    assert len(claimed) == len(unreadable) == len(good)
    assert claimed != good != unreadable
    for body in (stream.getvalue(), claimed, unreadable, good[:-8], good + b"\0", b"", text):
        with pytest.raises(CaptureError, match="n: not a whole npy array of numbers"):
            parse_npy(body, "n")
