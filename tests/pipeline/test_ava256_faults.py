"""The Ava-256 reader on captures that lack something, or are broken in one way each."""

import re
import shutil

import numpy as np
import pytest

from lipflow.errors import CaptureError
from pipeline import zip_index
from pipeline.capture_errors import (
    ArchiveBombError,
    DamagedArchiveError,
    ImageSizeError,
    MissingFileError,
    PoseNotRigidError,
    VertexCountError,
    VertexNotFiniteError,
)
from pipeline.captures.ava256 import Ava256Capture
from pipeline.dome.scene import synthesise_frame
from pipeline.images.codecs import CodecError
from tests.pipeline import ava256_layout as layout
from tests.pipeline.ava256_capture import CAMERA, CONFIG, change_member, faults, first_frame


@pytest.mark.parametrize("name", ["camera_calibration.json", "frame_list.csv"])
def test_incomplete_capture_names_what_is_missing(own_ava256_folder, name):
    (own_ava256_folder / "decoder" / name).unlink()
    assert Ava256Capture.is_at(str(own_ava256_folder))
    with pytest.raises(CaptureError, match=rf"decoder/{re.escape(name)}: the file is missing"):
        Ava256Capture(str(own_ava256_folder))


def test_capture_of_images_alone_opens(own_ava256_folder):
    """Zips that were never fetched are facts, but for meshes and poses."""
    for name in ("segmentation_parts", "keypoints_3d", "uv_image", f"image/cam{CAMERA}.zip", "../encoder"):
        path = own_ava256_folder / "decoder" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    capture = Ava256Capture(str(own_ava256_folder))
    frame = capture.frame(*first_frame(capture))
    assert frame.image_file(CAMERA) is frame.average_texture_file() is frame.keypoints_3d() is None
    assert capture.headset_sequence is None
    assert capture.normalization() is None
    assert capture.notes() == ()
    assert capture.listing(frame.segment).images[CAMERA] == frozenset()
    assert len(capture.cameras) == 3
    with pytest.raises(CaptureError, match="no texture tells its size"):
        _ = capture.texture_size
    with pytest.raises(CaptureError, match=r"S1/000001 is not in frame_list\.csv"):
        capture.frame("S1", "000001")


FAULTY_MEMBERS = [
    ("head_pose/head_pose.zip", "000120.txt", b"2 0 0 1 0 2 0 2 0 0 2 3", PoseNotRigidError, "is not rigid"),
    ("head_pose/head_pose.zip", "000120.txt", b"1 2 3", CaptureError, "expected 12 finite numbers"),
    ("head_pose/head_pose.zip", "000120.txt", None, MissingFileError, "missing, but frame_list.csv lists its frame"),
    ("kinematic_tracking/registration_vertices.zip", "000120.ply", None, MissingFileError, "frame_list.csv lists"),
    (
        "kinematic_tracking/registration_vertices.zip",
        "000120.ply",
        layout.ply_bytes(np.zeros((5, 3), np.float32)),
        VertexCountError,
        "5 vertices, but the capture's topology has",
    ),
    ("uv_image/color.zip", "color/000120.avif", b"no image", CodecError, "the bytes are no"),
    (
        "uv_image/color.zip",
        "color/000120.avif",
        layout.avif_bytes(np.zeros((16, 16, 3), np.uint8)),
        ImageSizeError,
        "a texture of 16x16, but the capture's are 32x32",
    ),
    ("keypoints_3d/keypoints_3d.zip", "000120.npy", b"\x93NUMPY", CaptureError, "not a whole npy array"),
    (
        "segmentation_parts/cam400001.zip",
        "cam400001/000120.png",
        layout.png_bytes(np.zeros((64, 41), np.uint8)),
        ImageSizeError,
        "41x64 pixels (W x H), but camera 400001 is calibrated for 83x128",
    ),
    (
        "segmentation_parts/cam400001.zip",
        "cam400001/000120.png",
        layout.png_bytes(np.zeros((128, 83), np.uint8))[:60],
        CodecError,
        "truncated",
    ),
    (
        "image/cam400001.zip",
        "cam400001/000120.avif",
        layout.avif_bytes(np.zeros((64, 41, 3), np.uint8)),
        ImageSizeError,
        "41x64 pixels (W x H), but camera 400001 is calibrated for 83x128",
    ),
]


@pytest.mark.parametrize(
    ("archive", "member", "body", "fault", "message"),
    FAULTY_MEMBERS,
    ids=[f"{archive}-{message}" for archive, _, _, _, message in FAULTY_MEMBERS],
)
def test_faulty_member_is_named_and_nothing_else(own_ava256_folder, archive, member, body, fault, message):
    change_member(own_ava256_folder / "decoder" / archive, member, body)
    found = faults(Ava256Capture(str(own_ava256_folder)))
    assert set(found) == {f"decoder/{archive}!{member}"}
    (error,) = found.values()
    assert isinstance(error, fault)
    assert message in str(error)
    assert "\n" not in str(error)


def test_vertex_that_is_not_a_number_is_refused(own_ava256_folder):
    path = own_ava256_folder / "decoder/kinematic_tracking/registration_vertices.zip"
    frame = layout.planned_frames(CONFIG)[0]
    vertices = synthesise_frame(CONFIG, frame.segment, frame.index).vertices.copy()
    vertices[7, 1] = np.nan
    change_member(path, "000120.ply", layout.ply_bytes(vertices))
    capture = Ava256Capture(str(own_ava256_folder))
    with pytest.raises(VertexNotFiniteError, match=r"000120\.ply: 1 of \d+ vertices are not finite numbers"):
        capture.frame(*first_frame(capture)).vertices()


def test_damaged_zip_is_one_fault_and_loses_no_view_in_silence(own_ava256_folder):
    path = own_ava256_folder / f"decoder/image/cam{CAMERA}.zip"
    path.write_bytes(path.read_bytes()[:-30])
    capture = Ava256Capture(str(own_ava256_folder))
    segment, stem = first_frame(capture)
    assert capture.listing(segment).images[CAMERA] == set(capture.segments[segment])
    with pytest.raises(DamagedArchiveError, match=rf"cam{CAMERA}\.zip: not a whole zip"):
        capture.frame(segment, stem).image_file(CAMERA)
    assert {str(error) for error in faults(capture).values()} == {
        f"file://{path}: not a whole zip (File is not a zip file); fetch the archive again"
    }


def test_flipped_byte_in_an_image_is_damage(own_ava256_folder):
    path = own_ava256_folder / f"decoder/image/cam{CAMERA}.zip"
    body = layout.read_zip(path)[f"cam{CAMERA}/000123.avif"]
    raw = bytearray(path.read_bytes())
    raw[raw.index(body) + len(body) // 2] ^= 1
    path.write_bytes(raw)
    (error,) = faults(Ava256Capture(str(own_ava256_folder))).values()
    assert isinstance(error, DamagedArchiveError)
    assert "its CRC-32 differs" in str(error)


def test_bomb_in_a_zip_is_refused(own_ava256_folder, monkeypatch):
    monkeypatch.setattr(zip_index, "MAX_MEMBER_BYTES", 2000)
    capture = Ava256Capture(str(own_ava256_folder))
    with pytest.raises(ArchiveBombError, match=r"000120\.ply: declares \d+ bytes, at most 2000"):
        capture.frame(*first_frame(capture)).vertices()
