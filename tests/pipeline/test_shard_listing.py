"""Looking into a shard set: what is listed is what is stored, by few reads."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lipflow.errors import ShardSetError
from pipeline import storage
from pipeline.capture import Capture
from pipeline.checks.shard_listing import list_shards, read_view, show_frame
from pipeline.loading.shardset import ShardSet
from pipeline.manifest import Manifest
from pipeline.sealing import ChecksumError
from tests.pipeline.sealed_manifests import read_manifest, with_crcs_of, write_manifest


def a_stored_view(manifest: Manifest) -> tuple[str, str]:
    """(frame id, camera id) of a frame with a missing view as well."""
    sample = next(sample for shard in manifest.shards for sample in shard.samples if sample.missing_views)
    stored = [camera.camera_id for camera in manifest.cameras if camera.camera_id not in sample.missing_views]
    return sample.frame_id, stored[0]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(name, offset, size) of every read; a whole object is (name, 0, -1)."""
    seen: list[tuple[str, int, int]] = []
    read_range, read_bytes = storage.read_range, storage.read_bytes

    def ranged(uri, offset, length):
        seen.append((str(uri).rpartition("/")[2], offset, length))
        return read_range(uri, offset, length)

    def whole(uri):
        seen.append((str(uri).rpartition("/")[2], 0, -1))
        return read_bytes(uri)

    monkeypatch.setattr(storage, "read_range", ranged)
    monkeypatch.setattr(storage, "read_bytes", whole)
    return seen


def test_shards_are_listed_from_the_manifest_alone(shards_folder: Path, manifest: Manifest, reads):
    listing = list_shards(str(shards_folder))
    assert reads == [("manifest.json", 0, -1)]
    assert [shard.name for shard in listing.shards] == [shard.name for shard in manifest.shards]
    assert listing.size_bytes == sum(path.stat().st_size for path in shards_folder.glob("*.tar"))
    assert listing.digest == manifest.digest
    frames = sum(len(shard.samples) for shard in manifest.shards)
    assert len(listing.frames) == sum(shard.frames for shard in listing.shards) == frames
    assert listing.missing_views == len(list(manifest.missing_views())) > 0
    assert listing.views + listing.missing_views == frames * len(manifest.cameras)
    assert sum(frame.views for frame in listing.frames) == listing.views


def test_a_frame_is_shown_by_one_range(shards_folder: Path, manifest: Manifest, reads):
    frame_id, _ = a_stored_view(manifest)
    shown = show_frame(str(shards_folder), frame_id)
    shard, sample = next((s, x) for s in manifest.shards for x in s.samples if x.frame_id == frame_id)
    assert reads == [("manifest.json", 0, -1), (shard.name, *sample.members["frame.json"][:2])]
    assert {member.name: (member.offset, member.size_bytes) for member in shown.members} == {
        f"{frame_id}.{suffix}": place[:2] for suffix, place in sample.members.items()
    }
    assert [member.offset for member in shown.members] == sorted(member.offset for member in shown.members)
    assert f"{shown.facts['segment']}/{shown.facts['frame']}" == frame_id
    assert shown.frame.missing_views == sample.missing_views
    batch = ShardSet.open(shards_folder).frames([frame_id], [manifest.cameras[0].camera_id])
    assert np.shape(shown.facts["world_from_head"]) == (3, 4)
    assert batch.frame_ids == [frame_id]


def test_a_view_is_one_range_and_the_captured_picture(shards_folder: Path, manifest: Manifest, dome: Capture, reads):
    frame_id, camera_id = a_stored_view(manifest)
    view = read_view(str(shards_folder), frame_id, camera_id)
    assert [name for name, *_ in reads[1:]] == [next(s.name for s in manifest.shards for x in s.samples
                                                     if x.frame_id == frame_id)]  # fmt: skip
    assert len(reads) == 2
    source = dome.frame(*frame_id.split("/")).image_file(camera_id)
    assert source is not None
    assert view.image_size_hw == manifest.image_size_hw
    expected = np.asarray(Image.open(io.BytesIO(source)).convert("RGB"))
    decoded = np.asarray(Image.open(io.BytesIO(view.encoded_for("there.png"))))
    np.testing.assert_array_equal(decoded, expected)
    assert view.encoded_for("x.PNG") == view.body


def test_a_headset_view_is_monochrome(shards_folder: Path, manifest: Manifest):
    camera = manifest.headset_cameras[0]
    frame_id = next(
        sample.frame_id
        for shard in manifest.shards
        for sample in shard.samples
        if f"hmc-{camera.camera_id}.png" in sample.members
    )
    view = read_view(str(shards_folder), frame_id, camera.camera_id)
    assert view.image_size_hw == camera.image_size_hw
    assert Image.open(io.BytesIO(view.encoded_for("x.png"))).mode == "L"


def test_s3_is_listed_and_shown_as_a_folder_is(shards_folder: Path, manifest: Manifest, s3_server):
    uri = s3_server.uri("shard-listing")
    storage.upload_dir(shards_folder, uri)
    frame_id, camera_id = a_stored_view(manifest)
    here, there = list_shards(str(shards_folder)), list_shards(uri)
    assert (here.shards, here.frames, here.digest) == (there.shards, there.frames, there.digest)
    assert show_frame(uri, frame_id) == show_frame(str(shards_folder), frame_id)
    assert read_view(uri, frame_id, camera_id) == read_view(str(shards_folder), frame_id, camera_id)


def test_what_is_not_there_is_named(shards_folder: Path, manifest: Manifest, tmp_path: Path):
    frame_id, camera_id = a_stored_view(manifest)
    sample = next(s for shard in manifest.shards for s in shard.samples if s.frame_id == frame_id)
    uri = str(shards_folder)
    with pytest.raises(ShardSetError, match=r"no manifest\.json, so no shard set"):
        list_shards(str(tmp_path))
    with pytest.raises(ShardSetError, match=r"no frame 'EXP_x/000000'; expected SEGMENT/FRAME"):
        show_frame(uri, "EXP_x/000000")
    with pytest.raises(ShardSetError, match=rf"no camera 'x'; choose from {manifest.cameras[0].camera_id}, "):
        read_view(uri, frame_id, "x")
    with pytest.raises(ShardSetError, match=rf"{frame_id} has no image of camera {sample.missing_views[0]}"):
        read_view(uri, frame_id, sample.missing_views[0])
    with pytest.raises(ShardSetError, match=r"as it is stored \(\.png\) or as \.png"):
        read_view(uri, frame_id, camera_id).encoded_for("there.tiff")


def test_a_damaged_member_is_named(own_shards_folder: Path, manifest: Manifest):
    shard, sample = manifest.shards[0], manifest.shards[0].samples[0]
    camera_id = next(c.camera_id for c in manifest.cameras if c.camera_id not in sample.missing_views)
    with (own_shards_folder / shard.name).open("r+b") as stream:
        for suffix in ("frame.json", f"{camera_id}.image.png"):
            stream.seek(sample.members[suffix][0])
            stream.write(b"garbage!")
    with pytest.raises(ChecksumError, match=rf"{shard.name}!{sample.frame_id}\.frame\.json: CRC-32"):
        show_frame(str(own_shards_folder), sample.frame_id)
    with pytest.raises(ChecksumError, match=rf"{sample.frame_id}\.{camera_id}\.image\.png: CRC-32"):
        read_view(str(own_shards_folder), sample.frame_id, camera_id)
    document = read_manifest(own_shards_folder)
    with_crcs_of(document["shards"][0], (own_shards_folder / shard.name).read_bytes())
    write_manifest(own_shards_folder, document)
    with pytest.raises(ShardSetError, match=rf"{shard.name}!{sample.frame_id}\.frame\.json: not JSON"):
        show_frame(str(own_shards_folder), sample.frame_id)
    with pytest.raises(ShardSetError, match=rf"{sample.frame_id}\.{camera_id}\.image\.png: "):
        read_view(str(own_shards_folder), sample.frame_id, camera_id)
