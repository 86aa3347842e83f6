"""The manifest is the commit: nothing is read without it, and nothing of another version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lipflow.errors import ShardSetError
from pipeline.manifest import Manifest
from pipeline.shardset import ShardSet


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
        ({"format_version": 1}, "format version 1, expected 2; shard again"),
        ({"captures": []}, "damaged at captures"),
        ({"shards": 3}, "damaged at shards"),
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
    content = json.loads((own_shards_folder / "manifest.json").read_text())
    content["shards"][0]["samples"][0]["members"]["avgtex.png"] = [10**12, 5]
    _edit(own_shards_folder, shards=content["shards"])
    with pytest.raises(ShardSetError, match="lies outside of the shard"):
        Manifest.load(str(own_shards_folder))
    content["shards"][0]["samples"] = []
    content["shards"][0]["name"] = "../../etc/passwd"
    _edit(own_shards_folder, shards=content["shards"])
    with pytest.raises(ShardSetError, match="not a plain file name"):
        Manifest.load(str(own_shards_folder))


def test_changed_statistics_do_not_pass(own_shards_folder: Path):
    path = own_shards_folder / "normalization.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ShardSetError, match=r"normalization\.npz does not match the manifest"):
        ShardSet.open(own_shards_folder)
