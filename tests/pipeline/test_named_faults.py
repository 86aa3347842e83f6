"""``lipflow verify`` on captures that are damaged in one way each: one bad file, its own name, and nothing else."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.checks.verification import verify_capture
from pipeline.checks.verification_report import VerifyReport
from tests.pipeline.ava256_layout import LAYOUT_CONFIG, read_zip, write_ava256, write_zip

Change = Callable[[Path], None]

IMAGE = "images/EXP_smile/400002/000001.png"
MESH = "tracked_mesh/EXP_smile/000001.bin"
POSE = "tracked_mesh/EXP_smile/000001_transform.txt"


def change_bytes(change: Callable[[bytes], bytes]) -> Change:
    def apply(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return apply


def change_text(change: Callable[[str], str]) -> Change:
    return change_bytes(lambda body: change(body.decode()).encode())


def become(body: bytes) -> Change:
    return change_bytes(lambda _: body)


def half(body: bytes) -> bytes:
    return body[: len(body) // 2]


def half_with_end(body: bytes) -> bytes:
    """Cut in the middle, but with a PNG's last chunk: only decoding shows it."""
    return half(body) + body[-12:]


def flipped_bit(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 0x10]) + body[middle + 1 :]


def resave(size_wh: tuple[int, int]) -> Change:
    return lambda path: Image.new("L", size_wh).save(path)


def png_header(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that claims ``width`` x ``height`` pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def with_nan(body: bytes) -> bytes:
    vertices = np.frombuffer(body, "<f4").copy()
    vertices[100] = np.nan
    return vertices.tobytes()


def times(factors: list[float]) -> Change:
    """Multiply the columns of a pose."""
    return lambda path: np.savetxt(path, np.loadtxt(path) * factors)


def with_line(number: int, line: str) -> Change:
    def change(text: str) -> str:
        lines = text.splitlines()
        return "\n".join([*lines[:number], line, *lines[number + 1 :]]) + "\n"

    return change_text(change)


def append(lines: str) -> Change:
    return change_text(lambda text: text + lines)


@dataclass(frozen=True)
class Damage:
    """What is done to which file, and what has to be reported.

    Attributes:
        file: is damaged.
        do: damages it.
        fault: the name of the fault.
        reported: the file that has to be named, if it is another one.
        blocking: whether the frames cannot be checked any more.
    """

    file: str
    do: Change
    fault: str
    reported: str | None = None
    blocking: bool = False


DAMAGES = {
    "truncated PNG": Damage(IMAGE, change_bytes(half), "truncated-image"),
    "truncated PNG with an end": Damage(IMAGE, change_bytes(half_with_end), "unreadable-image"),
    "PNG with a flipped bit": Damage(IMAGE, change_bytes(flipped_bit), "unreadable-image"),
    "garbage PNG": Damage(IMAGE, become(b"<html>404 Not Found</html>"), "unreadable-image"),
    "empty PNG": Damage(IMAGE, become(b""), "unreadable-image"),
    "image bomb": Damage(IMAGE, become(png_header(60000, 60000)), "image-bomb"),
    "image size that disagrees with the calibration": Damage(IMAGE, resave((36, 47)), "image-size"),
    "image size of the first image of all": Damage("images/EXP_eyes/400001/000000.png", resave((8, 8)), "image-size"),
    "first image of all truncated": Damage("images/EXP_eyes/400001/000000.png", change_bytes(half), "truncated-image"),
    "first image of all garbage": Damage("images/EXP_eyes/400001/000000.png", become(b"garbage"), "unreadable-image"),
    "headset view of another size": Damage(
        "driving/headset/EXP_smile/cyclops/000001.png", resave((8, 8)), "image-size"
    ),
    "average texture truncated": Damage(
        "unwrapped_uv_1024/EXP_smile/average/000001.png", change_bytes(half), "truncated-image"
    ),
    "average texture of the first frame garbage": Damage(
        "unwrapped_uv_1024/EXP_eyes/average/000000.png", become(b"garbage"), "unreadable-image"
    ),
    "wrong vertex count": Damage(MESH, change_bytes(lambda body: body[:-12]), "vertex-count"),
    "mesh cut within a number": Damage(MESH, change_bytes(lambda body: body[:-1]), "vertex-count"),
    "NaN vertex": Damage(MESH, change_bytes(with_nan), "vertex-not-finite"),
    "mesh that is missing": Damage(MESH, Path.unlink, "missing-file"),
    "pose with a scale": Damage(POSE, times([1.01, 1.01, 1.01, 1]), "pose-not-rigid"),
    "mirrored pose": Damage(POSE, times([-1, 1, 1, 1]), "pose-not-rigid"),
    "text instead of a pose": Damage(POSE, become(b"<html>404 Not Found</html>"), "unreadable"),
    "pose that is missing": Damage(POSE, Path.unlink, "missing-file"),
    "keypoints that are none": Damage("driving/keypoints/EXP_smile/000001.npy", become(b"garbage"), "unreadable"),
    "singular K": Damage("KRT", with_line(1, "0 0 17.5"), "singular-intrinsics", blocking=True),
    "duplicate camera id": Damage(
        "KRT", change_text(lambda krt: krt + "\n" + krt.split("\n\n")[0] + "\n"), "duplicate-camera", blocking=True
    ),
    "KRT that ends early": Damage("KRT", change_bytes(half), "unreadable", blocking=True),
    "topology that is none": Damage(
        "tracked_mesh/EXP_eyes/000000.obj", become(b"v 1 2 three\n"), "unreadable", blocking=True
    ),
    "headset calibration that is none": Damage("driving/headset.json", become(b"[{}]"), "unreadable", blocking=True),
    "an expression listed without frames": Damage(
        "frame_list.txt", append("EXP_wink\n"), "empty-segment", blocking=True
    ),
    "an expression listed with frames that have no file": Damage(
        "frame_list.txt", append("EXP_wink 000000\nEXP_wink 000001\n"), "empty-segment", "tracked_mesh/EXP_wink"
    ),
    "the first expression listed has no file": Damage(
        "frame_list.txt", append("EXP_aaa 000000\n"), "empty-segment", "tracked_mesh/EXP_aaa"
    ),
    "no frame is listed": Damage("frame_list.txt", become(b"\n"), "unreadable", blocking=True),
    "frame list that is no text": Damage("frame_list.txt", become(b"\xff\xfe\x00"), "unreadable", blocking=True),
    "statistics that lack a file": Damage("vert_var.txt", Path.unlink, "unreadable"),
    "variance that is no number": Damage("tex_var.txt", become(b"nan"), "unreadable"),
    "mean mesh with another vertex count": Damage("vert_mean.bin", change_bytes(half), "vertex-count"),
    "frontal camera that does not exist": Damage(
        "driving/frontal.json", become(json.dumps({"camera_id": "1"}).encode()), "unreadable"
    ),
}


@pytest.fixture(scope="module")
def undamaged(dome_folder: Path) -> VerifyReport:
    report = verify_capture(str(dome_folder))
    assert report.good
    return report


@pytest.mark.parametrize("name", DAMAGES)
def test_one_damage_is_one_bad_file_with_its_name(own_dome_folder: Path, undamaged: VerifyReport, name: str):
    damage = DAMAGES[name]
    damage.do(own_dome_folder / damage.file)
    report = verify_capture(str(own_dome_folder))
    found = [(bad.path, bad.fault) for bad in report.bad]
    assert found == [(f"file://{own_dome_folder}/{damage.reported or damage.file}", damage.fault)]
    assert report.bad[0].reason
    assert not report.bad[0].reason.startswith("file://")
    assert not report.good
    assert report.complete is not damage.blocking
    if not damage.blocking and damage.file != "frame_list.txt":
        assert report.missing_views == undamaged.missing_views
        assert report.files_checked == undamaged.files_checked


ZIP, HEADSET_ZIP = "decoder/image/cam400002.zip", "encoder/image/cam-left-mouth.zip"
MESH_ZIP, POSE_ZIP = "decoder/kinematic_tracking/registration_vertices.zip", "decoder/head_pose/head_pose.zip"


def replace_member(name: str, body: bytes, method: int = zipfile.ZIP_STORED) -> Change:
    def change(path: Path) -> None:
        members = read_zip(path)
        assert name in members
        write_zip(path, members | {name: body}, method)

    return change


def declare(name: str, unpacked_bytes: int) -> Change:
    """Let the central directory claim that a member unpacks to so many bytes."""

    def change(body: bytes) -> bytes:
        entry = body.rindex(b"PK\1\2", 0, body.rindex(name.encode()))
        return body[: entry + 24] + struct.pack("<I", unpacked_bytes) + body[entry + 28 :]

    return change_bytes(change)


def flipped_bit_of(name: str) -> Change:
    """Of the stored bytes of a member."""

    def change(body: bytes) -> bytes:
        place = body.index(name.encode()) + len(name) + 20
        return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]

    return change_bytes(change)


def many_zeros() -> bytes:
    """Two megabytes that deflate to two thousand bytes."""
    return bytes(2 * 2**20)


ZIP_DAMAGES = {
    "zip bomb: a member that declares four gigabytes": Damage(
        ZIP, declare("cam400002/000123.avif", 2**32 - 2), "archive-bomb", f"{ZIP}!cam400002/000123.avif"
    ),
    "zip bomb: a member that unpacks to a thousand times its size": Damage(
        ZIP,
        replace_member("cam400002/000123.avif", many_zeros(), zipfile.ZIP_DEFLATED),
        "archive-bomb",
        f"{ZIP}!cam400002/000123.avif",
    ),
    "zip bomb among the meshes": Damage(
        MESH_ZIP, declare("000126.ply", 2**31), "archive-bomb", f"{MESH_ZIP}!000126.ply"
    ),
    "zip bomb in the headset capture": Damage(
        HEADSET_ZIP,
        declare("cam-left-mouth/007001.avif", 2**31),
        "archive-bomb",
        f"{HEADSET_ZIP}!cam-left-mouth/007001.avif",
    ),
    "image bomb in a zip": Damage(
        ZIP,
        replace_member("cam400002/000123.avif", png_header(60000, 60000)),
        "image-bomb",
        f"{ZIP}!cam400002/000123.avif",
    ),
    "flipped bit in a member": Damage(
        ZIP, flipped_bit_of("cam400002/000123.avif"), "damaged-archive", f"{ZIP}!cam400002/000123.avif"
    ),
    "zip that is truncated": Damage(ZIP, change_bytes(half), "damaged-archive"),
    "zip of meshes that is none": Damage(MESH_ZIP, become(b"<html>404 Not Found</html>"), "damaged-archive"),
    "pose that is not rigid": Damage(
        POSE_ZIP, replace_member("000120.txt", b"2 0 0 0 0 2 0 0 0 0 2 0"), "pose-not-rigid", f"{POSE_ZIP}!000120.txt"
    ),
}


@pytest.fixture(scope="module")
def ava256_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ava256")
    write_ava256(folder, LAYOUT_CONFIG)
    report = verify_capture(str(folder))
    assert report.good
    assert report.layout == "ava256"
    assert report.missing_views == {}
    return folder


@pytest.mark.parametrize("name", ZIP_DAMAGES)
def test_one_damage_in_a_zip_is_one_bad_file_with_its_name(ava256_folder: Path, tmp_path: Path, name: str):
    folder, damage = Path(shutil.copytree(ava256_folder, tmp_path / "unreadable")), ZIP_DAMAGES[name]
    damage.do(folder / damage.file)
    report = verify_capture(str(folder))
    found = [(bad.path, bad.fault) for bad in report.bad]
    assert found == [(f"file://{folder}/{damage.reported or damage.file}", damage.fault)]
    assert report.complete
    assert report.missing_views == {}
