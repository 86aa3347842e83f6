"""``lipflow verify`` on shard sets that are damaged in one way each: what is bad is named, and nothing else."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections import Counter
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.checks import shard_members
from pipeline.checks.shard_verification import is_shard_set, verify_shard, verify_shards
from pipeline.checks.verification_report import VerifyReport
from pipeline.images.codecs import decode_npz, encode_npz
from pipeline.manifest import Manifest, SampleRecord, ShardRecord
from tests.pipeline.sealed_manifests import read_manifest, with_crcs_of, write_manifest


def named(report: VerifyReport) -> list[tuple[str, str]]:
    """(path under the set, fault) of the bad files."""
    return [(bad.path.removeprefix(f"{report.uri}/"), bad.fault) for bad in report.bad]


def first_sample(manifest: Manifest) -> tuple[ShardRecord, SampleRecord]:
    return manifest.shards[0], manifest.shards[0].samples[0]


def overwrite(folder: Path, shard: ShardRecord, sample: SampleRecord, suffix: str, body: bytes) -> None:
    """Put other bytes over the start of a member."""
    offset, size, _ = sample.members[suffix]
    assert len(body) <= size
    with (folder / shard.name).open("r+b") as stream:
        stream.seek(offset)
        stream.write(body)


def seal(folder: Path) -> None:
    """Write a manifest with the digests of the files as they are now: only decoding shows what is wrong."""
    document = read_manifest(folder)
    for shard in document["shards"]:
        body = (folder / shard["name"]).read_bytes()
        shard["sha256"] = hashlib.sha256(body).hexdigest()
        with_crcs_of(shard, body)
    document["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in document["files"]}
    write_manifest(folder, document)


def change_manifest(folder: Path, change) -> None:
    document = read_manifest(folder)
    change(document)
    write_manifest(folder, document)


def test_every_member_of_a_good_set_is_decoded(shards_folder: Path, manifest: Manifest):
    report = verify_shards(str(shards_folder))
    assert report.good
    members = sum(len(sample.members) for shard in manifest.shards for sample in shard.samples)
    # Beside them: the shards themselves, the manifest, topology.npz and normalization.npz.
    assert report.files_checked == members + len(manifest.shards) + 3
    assert report.layout == "shards"


def test_missing_views_are_those_of_the_manifest(shards_folder: Path, manifest: Manifest):
    report = verify_shards(str(shards_folder))
    missing = list(manifest.missing_views())
    assert missing
    assert report.missing_views == Counter(camera_id for _, camera_id in missing)
    assert report.missing_views_by_segment == Counter(frame_id.split("/")[0] for frame_id, _ in missing)
    stored = sum(name.startswith("hmc-") for shard in manifest.shards for s in shard.samples for name in s.members)
    frames = sum(len(shard.samples) for shard in manifest.shards)
    assert sum(report.missing_headset_views.values()) == frames * len(manifest.headset_cameras) - stored > 0


def test_a_bit_that_no_decoder_notices_is_in_the_digest(own_shards_folder: Path, manifest: Manifest):
    shard, sample = first_sample(manifest)
    offset, size, _ = sample.members["verts.npy.zst"]
    padding = offset + size
    assert padding % 512
    path = own_shards_folder / shard.name
    with path.open("r+b") as stream:
        stream.seek(padding)
        stream.write(b"\1")
    report = verify_shards(str(own_shards_folder))
    assert named(report) == [(shard.name, "shard-digest")]


@pytest.mark.parametrize(
    ("suffix", "fault"),
    [("avgtex.plz", "unreadable-image"), ("verts.npy.zst", "unreadable"), ("frame.json", "shard-member")],
)
def test_a_damaged_member_is_named_beside_its_shard(own_shards_folder: Path, manifest: Manifest, suffix, fault):
    shard, sample = first_sample(manifest)
    overwrite(own_shards_folder, shard, sample, suffix, b"garbage!" * 4)
    member = f"{shard.name}!{sample.frame_id}.{suffix}"
    report = verify_shards(str(own_shards_folder))
    assert named(report) == [(shard.name, "shard-digest"), (member, "checksum")]
    seal(own_shards_folder)
    assert named(verify_shards(str(own_shards_folder))) == [(member, fault)]


def test_a_member_whose_crc32_is_not_the_manifest_s(own_shards_folder: Path, manifest: Manifest):
    shard, sample = first_sample(manifest)

    def change(document: dict) -> None:
        document["shards"][0]["samples"][0]["members"]["avgtex.plz"][2] ^= 1

    change_manifest(own_shards_folder, change)
    member = f"{shard.name}!{sample.frame_id}.avgtex.plz"
    assert named(verify_shards(str(own_shards_folder))) == [(member, "checksum")]


@pytest.mark.parametrize("left", [0.0, 0.4, 0.999])
def test_a_truncated_shard(own_shards_folder: Path, manifest: Manifest, left: float):
    shard = manifest.shards[-1]
    os.truncate(own_shards_folder / shard.name, int(left * shard.size_bytes))
    assert named(verify_shards(str(own_shards_folder))) == [(shard.name, "shard-digest")]


def test_bytes_after_the_end_of_a_shard(own_shards_folder: Path, manifest: Manifest):
    with (own_shards_folder / manifest.shards[0].name).open("ab") as stream:
        stream.write(b"more")
    assert named(verify_shards(str(own_shards_folder))) == [(manifest.shards[0].name, "shard-digest")]


def test_a_shard_that_is_missing(own_shards_folder: Path, manifest: Manifest):
    (own_shards_folder / manifest.shards[1].name).unlink()
    assert named(verify_shards(str(own_shards_folder))) == [(manifest.shards[1].name, "object-not-found")]


def test_a_member_that_the_manifest_places_elsewhere(own_shards_folder: Path, manifest: Manifest):
    shard, sample = first_sample(manifest)

    def move(document: dict) -> None:
        document["shards"][0]["samples"][0]["members"]["avgtex.plz"][0] += 512

    change_manifest(own_shards_folder, move)
    member = f"{shard.name}!{sample.frame_id}.avgtex.plz"
    assert named(verify_shards(str(own_shards_folder))) == [(member, "shard-member")]


def test_a_member_of_the_manifest_that_is_in_no_shard(own_shards_folder: Path, manifest: Manifest):
    def add(document: dict) -> None:
        document["shards"][0]["samples"][0]["members"]["400001.tex.png"] = [512, 10, 0]

    change_manifest(own_shards_folder, add)
    assert named(verify_shards(str(own_shards_folder))) == [(manifest.shards[0].name, "shard-member")]


@pytest.mark.parametrize(
    ("place", "field"),
    [
        (156, b"1"),
        (156, b"2"),
        (156, b"5"),
        (156, b"x"),
        (156, b"L"),
        (156, b"S"),
        (124, b"77777777777\0"),
        (124, b"\x80" + b"\xff" * 11),
        (124, b"\xff" * 12),
        (0, b"\xff\xfe"),
    ],
    ids=["hard-link", "link", "folder", "pax", "long-name", "sparse", "8-gib", "2-to-88", "negative", "not-utf-8"],
)
def test_a_header_that_is_not_of_a_plain_file_ends_the_shard(
    own_shards_folder: Path, manifest: Manifest, place: int, field: bytes
):
    """tarfile would seek through 2 ** 88 bytes that are not there, and take 8 GiB for an extended header."""
    shard, sample = first_sample(manifest)
    start = min(offset for offset, _, _ in sample.members.values()) - 512
    body = bytearray((own_shards_folder / shard.name).read_bytes())
    body[start + place : start + place + len(field)] = field
    body[start + 148 : start + 156] = b" " * 8
    body[start + 148 : start + 156] = b"%06o\0 " % sum(body[start : start + 512])
    (own_shards_folder / shard.name).write_bytes(body)
    seal(own_shards_folder)
    assert named(verify_shards(str(own_shards_folder))) == [(shard.name, "shard-member")]


@pytest.mark.parametrize("suffix", ["verts.npy.zst", "avgtex.plz", "frame.json"])
def test_a_pickle_under_a_member_s_name_is_not_loaded(own_shards_folder: Path, manifest: Manifest, suffix: str):
    class Loaded:
        def __reduce__(self):
            return (Path(own_shards_folder / "loaded").touch, ())

    shard, sample = first_sample(manifest)
    overwrite(own_shards_folder, shard, sample, suffix, pickle.dumps(Loaded()))
    seal(own_shards_folder)
    assert [name for name, _ in named(verify_shards(str(own_shards_folder)))] == [
        f"{shard.name}!{sample.frame_id}.{suffix}"
    ]
    assert not (own_shards_folder / "loaded").exists()


def test_images_of_another_size_than_the_manifest_says(own_shards_folder: Path, manifest: Manifest):
    change_manifest(own_shards_folder, lambda document: document.update(image_size_hw=[48, 37]))
    report = verify_shards(str(own_shards_folder))
    images = {
        f"{shard.name}!{sample.frame_id}.{suffix}"
        for shard in manifest.shards
        for sample in shard.samples
        for suffix in sample.members
        if suffix.endswith(".image.png")
    }
    assert {bad.path.removeprefix(f"{report.uri}/") for bad in report.bad} == images
    assert {bad.fault for bad in report.bad} == {"shard-member"}


def test_a_view_that_is_neither_present_nor_missing(own_shards_folder: Path, manifest: Manifest):
    _, sample = first_sample(manifest)

    def claim(document: dict) -> None:
        record = document["shards"][0]["samples"][0]
        record["missing_views"] = [] if record["missing_views"] else ["400001"]

    change_manifest(own_shards_folder, claim)
    [bad] = verify_shards(str(own_shards_folder)).bad
    assert bad.path == f"file://{own_shards_folder}/manifest.json"
    assert f"{sample.frame_id}: missing views " in bad.reason


@pytest.mark.parametrize("name", ["topology.npz", "normalization.npz"])
def test_a_set_file_that_is_damaged_missing_or_of_another_set(own_shards_folder: Path, name: str):
    path = own_shards_folder / name
    body = path.read_bytes()
    path.write_bytes(body[:-1] + b"?")
    assert named(verify_shards(str(own_shards_folder))) == [(name, "shard-digest")]
    arrays = decode_npz(body, name)
    arrays |= (
        {"num_vertices": arrays["num_vertices"] + 1}
        if name == "topology.npz"
        else {"vertices_mean": arrays["vertices_mean"][:-1]}
    )
    path.write_bytes(encode_npz(arrays))
    seal(own_shards_folder)
    assert named(verify_shards(str(own_shards_folder))) == [(name, "shard-member")]
    path.unlink()
    assert named(verify_shards(str(own_shards_folder))) == [(name, "object-not-found")]


@pytest.mark.parametrize("body", [b"", b"{}", b'{"format_version": 1}', b"\xff\xfe", b"garbage"])
def test_a_manifest_that_is_none(own_shards_folder: Path, body: bytes):
    (own_shards_folder / "manifest.json").write_bytes(body)
    assert is_shard_set(str(own_shards_folder))
    report = verify_shards(str(own_shards_folder))
    assert [bad.path for bad in report.bad] == [f"{report.uri}/manifest.json"]
    assert not report.complete


def test_the_size_of_the_ranges_changes_nothing(own_shards_folder: Path, manifest: Manifest, monkeypatch):
    shard, sample = first_sample(manifest)
    overwrite(own_shards_folder, shard, sample, "frame.json", b"{}")
    whole = verify_shards(str(own_shards_folder))
    monkeypatch.setattr(shard_members, "_CHUNK_BYTES", 1000)
    assert verify_shards(str(own_shards_folder)) == whole
    assert len(whole.bad) == 2


def test_s3_is_read_in_few_large_ranges(shards_folder: Path, manifest: Manifest, s3_server, monkeypatch):
    uri = s3_server.uri("verify", "shards")
    storage.upload_dir(shards_folder, uri)
    ranges = []
    read_range = storage.read_range

    def counted(address, offset, length):
        ranges.append((offset, length))
        return read_range(address, offset, length)

    monkeypatch.setattr(storage, "read_range", counted)
    shard = manifest.shards[0]
    part = verify_shard(uri, manifest, shard)
    assert part.bad == ()
    assert ranges == [(0, shard.size_bytes)]
