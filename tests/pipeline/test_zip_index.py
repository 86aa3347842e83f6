"""Zips are read in place: as zipfile reads them, by one request a member, and nothing that lies is allocated."""

import io
import random
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from lipflow.errors import LipflowError
from pipeline import storage, zip_index
from pipeline.capture_errors import ArchiveBombError, DamagedArchiveError
from pipeline.zip_index import ZipArchive

MEMBERS = {
    "cam400002/000012.avif": bytes(random.Random(1).randbytes(5000)),
    "cam400002/000003.avif": b"",
    "plain.txt": b"twelve numbers " * 400,
    "../up/ä.npy": b"\0" * 3000,
}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and length of every range request from here on."""
    made: list[tuple[int, int]] = []
    read_range = storage.read_range

    def counted(uri, offset, length):
        made.append((offset, length))
        return read_range(uri, offset, length)

    monkeypatch.setattr(storage, "read_range", counted)
    return made


def packed(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, body in members.items():
            archive.writestr(zipfile.ZipInfo(name), body, method)
    return stream.getvalue()


def at(folder: Path, body: bytes) -> ZipArchive:
    (folder / "a.zip").write_bytes(body)
    return ZipArchive(str(folder / "a.zip"))


def directory_entry(body: bytes, name: str) -> int:
    """Where the central directory's entry of a member starts."""
    return body.rindex(b"PK\1\2", 0, body.rindex(name.encode()))


def patched(body: bytes, at_byte: int, layout: str, *values: int) -> bytes:
    changed = bytearray(body)
    struct.pack_into(layout, changed, at_byte, *values)
    return bytes(changed)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_members_are_those_that_zipfile_reads(method, where, tmp_path, s3_server, requests):
    body = packed(MEMBERS, method)
    uri = str(tmp_path / "a.zip") if where == "disk" else s3_server.uri("zips", f"{method}.zip")
    storage.write_bytes(uri, body)
    archive = ZipArchive(uri)
    assert len(requests) == 1, "the tail of a small zip holds its directory"
    with zipfile.ZipFile(io.BytesIO(body)) as reference:
        assert list(archive.names()) == sorted(reference.namelist(), key=str.encode)
        for number, name in enumerate(MEMBERS, start=2):
            assert archive.read(name) == reference.read(name) == MEMBERS[name]
            assert len(requests) == number, "one request a member"
    assert archive.source("plain.txt") == f"{archive.uri}!plain.txt"
    assert "plain.txt" in archive
    assert "plain" not in archive
    with pytest.raises(KeyError, match="absent"):
        archive.read("absent")


def test_directory_is_read_once_in_a_process_and_again_when_the_zip_changed(tmp_path, requests):
    at(tmp_path, packed(MEMBERS))
    assert len(requests) == 1
    assert ZipArchive(str(tmp_path / "a.zip")).read("plain.txt") == MEMBERS["plain.txt"]
    assert len(requests) == 2
    changed = at(tmp_path, packed({"plain.txt": b"other"}))
    assert changed.read("plain.txt") == b"other"


def test_directory_that_is_longer_than_the_tail_takes_one_more_request(tmp_path, monkeypatch, requests):
    monkeypatch.setattr(zip_index, "_TAIL_BYTES", 100)
    archive = at(tmp_path, packed(MEMBERS))
    assert len(requests) == 2
    assert archive.read("plain.txt") == MEMBERS["plain.txt"]


def test_long_extra_field_takes_one_more_request(tmp_path, requests):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        entry = zipfile.ZipInfo("a.bin")
        entry.extra = struct.pack("<HH", 0x7777, 300) + b"x" * 300
        archive.writestr(entry, b"body")
        archive.writestr("b.bin", b"other" * 100)
    read = at(tmp_path, stream.getvalue())
    assert [read.read(name) for name in ("a.bin", "b.bin")] == [b"body", b"other" * 100]
    assert len(requests) == 1 + 2 + 1


def test_members_beyond_four_gibibytes_are_read(tmp_path):
    path = tmp_path / "a.zip"
    with path.open("wb") as stream, zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("first.bin", b"first")
        stream.seek(2**32 + 1000)  # sparse: the hole takes no room
        archive.start_dir = stream.tell()
        archive.writestr("second.bin", b"second")
        with archive.open("third.bin", "w", force_zip64=True) as member:
            member.write(b"third")
    if path.stat().st_blocks * 512 > 2**20:
        pytest.skip("this file system has no sparse files")
    archive = ZipArchive(str(path))
    assert [archive.read(f"{name}.bin") for name in ("first", "second", "third")] == [b"first", b"second", b"third"]


def test_index_of_a_camera_takes_less_than_72_bytes_a_member(tmp_path):
    archive = at(tmp_path, packed({f"cam400002/{frame:06d}.avif": b"x" for frame in range(2000)}))
    assert archive._index.nbytes / len(archive) < 72
    assert archive.read("cam400002/001999.avif") == b"x"


def test_old_indices_make_room_for_new_ones(tmp_path, monkeypatch, requests):
    monkeypatch.setattr(zip_index, "MAX_CACHED_BYTES", 1)
    for name in ("a", "b", "b", "a"):
        (tmp_path / f"{name}.zip").write_bytes(packed(MEMBERS))
        ZipArchive(str(tmp_path / f"{name}.zip"))
    assert len(requests) == 3


def test_truncated_zip_is_damaged(tmp_path):
    body = packed(MEMBERS)
    for length in (0, 10, len(body) // 2, len(body) - 1):
        with pytest.raises(DamagedArchiveError, match=r"a\.zip: not a whole zip"):
            at(tmp_path, body[:length])


def test_every_flipped_byte_of_a_member_is_found(tmp_path):
    body = packed({"a.bin": bytes(range(64)), "b.bin": b"b"})
    start = body.index(bytes(range(64)))
    for position in range(start, start + 64):
        archive = at(tmp_path, patched(body, position, "B", body[position] ^ 1))
        with pytest.raises(DamagedArchiveError, match=r"a\.zip!a\.bin: its CRC-32 differs"):
            archive.read("a.bin")
        assert archive.read("b.bin") == b"b"
        zip_index._cache.clear()


def test_directory_with_any_flipped_byte_is_refused_by_name_or_read(tmp_path):
    """Whatever the damage: the right bytes, a missing member, or a named fault."""
    body = packed({"a.bin": b"a" * 500, "b.bin": b"b" * 500}, zipfile.ZIP_DEFLATED)
    faults = 0
    for position in range(body.index(b"PK\1\2"), len(body)):
        for mask in (0x01, 0x80, 0xFF):
            zip_index._cache.clear()
            try:
                archive = at(tmp_path, patched(body, position, "B", body[position] ^ mask))
                read = {name: archive.read(name) for name in archive.names()}
                assert set(read.values()) <= {b"a" * 500, b"b" * 500}
            except (DamagedArchiveError, ArchiveBombError):
                faults += 1
    assert faults > 100


@pytest.mark.parametrize(
    ("offset", "layout", "value", "fault", "message"),
    [
        (20, "<I", 2**31, ArchiveBombError, "declares 2147483648 bytes, at most"),
        (24, "<I", 2**31, ArchiveBombError, "declares 2147483648 bytes, at most"),
        (24, "<I", 100 * 2**20, ArchiveBombError, "bytes would unpack to 104857600, more than 200 times as many"),
        (24, "<I", 499, ArchiveBombError, "unpacks to more than the 499 bytes"),
        (24, "<I", 501, DamagedArchiveError, "unpacks to 500 of 501 bytes"),
        (10, "<H", 0, DamagedArchiveError, "stored, but its sizes differ"),
        (10, "<H", 12, DamagedArchiveError, "compression method 12; expected 0"),
        (8, "<H", 1, DamagedArchiveError, "the member is encrypted"),
        (16, "<I", 7, DamagedArchiveError, "its CRC-32 differs"),
        (42, "<I", 5, DamagedArchiveError, "no local header at byte 5"),
        (42, "<I", 10**6, DamagedArchiveError, "lies outside of its archive"),
        (20, "<I", 900, DamagedArchiveError, "lies outside of its archive, or in another member"),
    ],
)
def test_member_that_lies_is_refused(tmp_path, requests, offset, layout, value, fault, message):
    body = packed({"a.bin": b"a" * 500, "b.bin": b"b" * 500}, zipfile.ZIP_DEFLATED)
    archive = at(tmp_path, patched(body, directory_entry(body, "a.bin") + offset, layout, value))
    requests.clear()
    with pytest.raises(fault, match=message) as caught:
        archive.read("a.bin")
    assert "\n" not in str(caught.value)
    assert sum(length for _, length in requests) < 2000
    assert offset == 42 or archive.read("b.bin") == b"b" * 500


def test_stream_that_unpacks_to_more_than_declared_stops_there(tmp_path, monkeypatch):
    """64 MiB of zeros declared as 1,000 bytes: no more than 1,001 are ever unpacked."""
    bomb = packed({"bomb.npy": b"\0" * 64 * 2**20}, zipfile.ZIP_DEFLATED)
    archive = at(tmp_path, patched(bomb, directory_entry(bomb, "bomb.npy") + 24, "<I", 1000))
    limits = []
    create = zlib.decompressobj

    class Watched:
        def __init__(self, *settings):
            self._stream = create(*settings)

        def decompress(self, body, limit):
            limits.append(limit)
            return self._stream.decompress(body, limit)

    monkeypatch.setattr(zip_index.zlib, "decompressobj", Watched)
    with pytest.raises(ArchiveBombError, match="unpacks to more than the 1000 bytes that it declares"):
        archive.read("bomb.npy")
    assert limits == [1001]


def test_huge_directory_is_refused_before_it_is_read(tmp_path, monkeypatch, requests):
    monkeypatch.setattr(zip_index, "MAX_DIRECTORY_BYTES", 64 * 1024 + 22)
    monkeypatch.setattr(zip_index, "_TAIL_BYTES", 1000)
    with pytest.raises(ArchiveBombError, match=r"a central directory of \d+ bytes, at most 65558"):
        at(tmp_path, packed({f"{frame:060d}": b"" for frame in range(1000)}))
    assert sum(length for _, length in requests) == 1000


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_index, "MAX_MEMBERS", 3)
    with pytest.raises(ArchiveBombError, match="4 members, at most 3"):
        at(tmp_path, packed(MEMBERS))


def test_name_that_comes_twice_is_refused(tmp_path):
    body = packed({"a.bin": b"1", "b.bin": b"2"}).replace(b"b.bin", b"a.bin")
    with pytest.raises(DamagedArchiveError, match=r"member a\.bin is in it twice"):
        at(tmp_path, body)


def test_zip_that_is_not_there_is_a_storage_error(tmp_path):
    with pytest.raises(storage.ObjectNotFoundError, match=r"none\.zip"):
        ZipArchive(str(tmp_path / "none.zip"))


def test_random_bytes_never_crash(tmp_path):
    generator = np.random.default_rng(0)
    for length in (1, 22, 100, 5000):
        with pytest.raises(LipflowError, match="not a whole zip"):
            at(tmp_path, generator.bytes(length))
