"""The manifest is the commit: nothing is read without it, and nothing of another version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lipflow.errors import ConfigError, ShardSetError
from pipeline.capture import Capture
from pipeline.loading.shardset import ShardSet
from pipeline.manifest import Manifest, ShardSetVersionError
from pipeline.sealing import ChecksumError, seal, unseal
from pipeline.sharding.shards import ShardConfig, write_shards
from tests.pipeline.sealed_manifests import read_manifest, write_manifest


def _edit(folder: Path, **changes: object) -> None:
    write_manifest(folder, read_manifest(folder) | changes)


def test_a_folder_without_manifest_is_no_shard_set(tmp_path: Path):
    with pytest.raises(ShardSetError, match=r"no manifest\.json, so no shard set; .*lipflow shard"):
        ShardSet.open(tmp_path)


def test_it_survives_the_way_to_storage_and_back(manifest: Manifest, tmp_path: Path):
    manifest.save(str(tmp_path))
    assert Manifest.load(str(tmp_path)) == manifest
    assert Manifest.load(str(tmp_path)).digest == manifest.digest


def test_the_digest_names_the_data_and_not_their_place(manifest: Manifest):
    (capture,) = manifest.captures
    moved = capture.model_copy(update={"uri": "s3://elsewhere"})
    assert manifest.model_copy(update={"captures": (moved,)}).digest == manifest.digest
    other = capture.model_copy(update={"cameras": capture.cameras[:-1]})
    assert manifest.model_copy(update={"captures": (other,)}).digest != manifest.digest
    assert manifest.model_copy(update={"test_camera_ids": ("400002",)}).digest != manifest.digest
    changed = manifest.shards[0].model_copy(update={"sha256": "0" * 64})
    assert manifest.model_copy(update={"shards": (changed, *manifest.shards[1:])}).digest != manifest.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format version 3, expected 2; shard again, to another place"),
        ({"captures": []}, "damaged at captures"),
        ({"shards": 3}, "damaged at shards"),
        ({"train_camera_ids": []}, "no camera is for training"),
        ({"surprise": 1}, "damaged at surprise"),
    ],
)
def test_other_versions_and_damage_are_refused(own_shards_folder: Path, changes: dict, message: str):
    _edit(own_shards_folder, **changes)
    with pytest.raises(ShardSetError, match=message) as caught:
        Manifest.load(str(own_shards_folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ShardSetError, match="not a manifest"):
        Manifest.load(str(tmp_path))


def test_members_outside_of_their_shard_and_names_that_are_paths_are_refused(own_shards_folder: Path):
    content = read_manifest(own_shards_folder)
    place = content["shards"][0]["samples"][0]["members"]["avgtex.plz"]
    place[2] = 2**32
    _edit(own_shards_folder, shards=content["shards"])
    with pytest.raises(ShardSetError, match=r"avgtex\.plz has 4294967296 for a CRC-32"):
        Manifest.load(str(own_shards_folder))
    place[:] = [10**12, 5, 0]
    _edit(own_shards_folder, shards=content["shards"])
    with pytest.raises(ShardSetError, match="lies outside of the shard"):
        Manifest.load(str(own_shards_folder))
    content["shards"][0]["samples"] = []
    content["shards"][0]["name"] = "../../etc/passwd"
    _edit(own_shards_folder, shards=content["shards"])
    with pytest.raises(ShardSetError, match="not a plain file name"):
        Manifest.load(str(own_shards_folder))


def _as_version_1(folder: Path) -> None:
    """What the first format was: no checksum, and members of an offset and a size."""
    document = read_manifest(folder) | {"format_version": 1}
    for shard in document["shards"]:
        for sample in shard["samples"]:
            sample["members"] = {suffix: place[:2] for suffix, place in sample["members"].items()}
    (folder / "manifest.json").write_text(json.dumps(document, indent=1))


def test_a_set_of_the_first_version_is_told_from_a_damaged_one(own_shards_folder: Path):
    _as_version_1(own_shards_folder)
    with pytest.raises(ShardSetVersionError, match="format version 1, expected 2"):
        ShardSet.open(own_shards_folder)


def test_a_set_of_the_first_version_is_not_written_over(own_shards_folder: Path, dome: Capture):
    _as_version_1(own_shards_folder)
    for sidecar in own_shards_folder.glob("t*-*.json"):
        sidecar.unlink()
    before = {path.name: path.read_bytes() for path in own_shards_folder.iterdir()}
    with pytest.raises(ConfigError, match=r"format version 1, expected 2.*give another OUT"):
        write_shards(dome, ShardConfig(frames_per_shard=4), str(own_shards_folder))
    assert {path.name: path.read_bytes() for path in own_shards_folder.iterdir()} == before


def test_no_flipped_bit_of_a_manifest_passes(own_shards_folder: Path):
    """Every bit of its head, its tail, and of what is about the first members; every 97th of what lies between."""
    path, uri = own_shards_folder / "manifest.json", str(own_shards_folder)
    sound = path.read_bytes()
    ends = {*range(8 * 300), *range(8 * (len(sound) - 120), 8 * len(sound))}
    still_json = 0
    for place in sorted(ends | set(range(0, 8 * len(sound), 97))):
        damaged = bytearray(sound)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(ChecksumError, match=r"manifest\.json: "):
            unseal(bytes(damaged), "manifest.json")
        if place % 41 == 0:
            path.write_bytes(damaged)
            with pytest.raises(ShardSetError, match=r"manifest\.json: "):
                Manifest.load(uri)
        try:
            json.loads(damaged)
        except ValueError:
            continue
        still_json += 1
    # Half of all flips leave a JSON document, which a parser alone takes.
    assert still_json > 500


@pytest.mark.parametrize("damage", [lambda sealed: sealed[:-1], lambda sealed: sealed + b" ", lambda sealed: b"{}"])
def test_a_document_that_does_not_end_with_its_checksum_is_refused(damage):
    sealed = seal(b'{"a":1}')
    assert unseal(sealed, "here") == b'{"a":1}'
    assert json.loads(sealed)["checksum"] == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    with pytest.raises(ChecksumError, match=r"^here: does not end with its checksum"):
        unseal(damage(sealed), "here")


def test_changed_statistics_do_not_pass(own_shards_folder: Path):
    path = own_shards_folder / "normalization.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ShardSetError, match=r"normalization\.npz does not match the manifest"):
        ShardSet.open(own_shards_folder)
