"""Chosen frames and views by range requests: no more of them than needed, and nothing else is taken for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lipflow.errors import ShardSetError
from pipeline import storage
from pipeline.checks.shard_listing import read_view, show_frame
from pipeline.loading import loader as loader_module
from pipeline.loading import member_reads
from pipeline.loading.loader import LoaderConfig, ShardLoader, ShardSet
from pipeline.loading.member_reads import read_mesh_and_texture
from pipeline.sealing import ChecksumError

CONFIG = LoaderConfig(frames_per_batch=4, views_per_frame=2, window_shards=2, decode_threads=2)


@pytest.fixture(scope="module")
def shard_set(shards_folder: Path) -> ShardSet:
    return ShardSet.open(shards_folder)


@pytest.fixture(scope="module")
def s3_shards_uri(shards_folder: Path, s3_server) -> str:
    storage.upload_dir(shards_folder, s3_server.uri("member-reads"))
    return s3_server.uri("member-reads")


@pytest.fixture
def range_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all range requests."""
    sizes: list[int] = []
    real = storage.read_range

    def counting(uri, offset: int, length: int) -> bytes:
        sizes.append(length)
        return real(uri, offset, length)

    monkeypatch.setattr(storage, "read_range", counting)
    return sizes


def _complete_frame_id(shard_set: ShardSet) -> str:
    missing = {frame_id for frame_id, _ in shard_set.manifest.missing_views()}
    return next(frame_id for frame_id in shard_set.frame_ids("train") if frame_id not in missing)


def test_a_view_takes_one_range_request_of_its_own_size(shard_set: ShardSet, range_reads: list[int]):
    frame_id, camera_id = _complete_frame_id(shard_set), shard_set.train_camera_ids[2]
    image = shard_set.view(frame_id, camera_id)
    member = next(
        sample.members[f"{camera_id}.image.png"]
        for shard in shard_set.manifest.shards
        for sample in shard.samples
        if sample.frame_id == frame_id
    )
    assert range_reads == [member[1] + 512]
    batch = shard_set.frames([frame_id], [camera_id])
    assert image is not None
    assert torch.equal(image, batch.images[0, 0])


def test_a_missing_view_is_none_and_asks_for_nothing(shard_set: ShardSet, range_reads: list[int]):
    frame_id, camera_id = next(iter(shard_set.manifest.missing_views()))
    assert shard_set.view(frame_id, camera_id) is None
    assert range_reads == []


def test_a_whole_frame_takes_one_range_request(shard_set: ShardSet, range_reads: list[int]):
    """Its members are neighbours in the shard."""
    frame_id = shard_set.frame_ids("test")[0]
    batch = shard_set[frame_id]
    assert len(range_reads) == 1
    assert batch.frame_ids == [frame_id]
    assert batch.images.shape[1] == len(shard_set.cameras)
    ids = [camera.camera_id for camera in shard_set.cameras]
    assert torch.equal(batch.images, shard_set.frames([frame_id], ids).images)


def test_members_far_apart_are_fetched_alone(
    shard_set: ShardSet, range_reads: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(member_reads, "_WORTH_A_REQUEST_BYTES", 512)
    ids = shard_set.train_camera_ids
    batch = shard_set.frames([_complete_frame_id(shard_set)], [ids[0], ids[3]], signals=())
    assert bool(batch.view_present.all())
    assert len(range_reads) == 4  # mesh and texture, two views, the frame's own facts


@pytest.mark.parametrize("wrong", ["offset", "size", "name"])
def test_a_range_that_holds_something_else_is_refused(own_shards_folder: Path, wrong: str):
    opened = ShardSet.open(own_shards_folder)
    frame_id, camera_id = opened.frame_ids("train")[1], opened.train_camera_ids[0]
    shard, sample = opened._record(frame_id)
    offset, size, crc32 = sample.members[f"{camera_id}.image.png"]
    if wrong == "name":
        other = sample.members[f"{opened.train_camera_ids[1]}.image.png"]
        sample.members[f"{camera_id}.image.png"] = other
    else:
        sample.members[f"{camera_id}.image.png"] = (
            (offset - 512, size, crc32) if wrong == "offset" else (offset, size - 1, crc32)
        )
    with pytest.raises(ShardSetError, match=rf"{shard.name}.*{camera_id}\.image\.png"):
        opened.view(frame_id, camera_id)


def test_a_flipped_bit_that_no_decoder_notices_is_refused_by_every_read_of_single_members(own_shards_folder: Path):
    """The head pose is JSON: with another digit in it, it is another pose."""
    opened = ShardSet.open(own_shards_folder)
    frame_id, camera_id = _complete_frame_id(opened), opened.train_camera_ids[0]
    shard, sample = opened._record(frame_id)
    path, uri = own_shards_folder / shard.name, storage.join(opened.uri, shard.name)
    offset, size, _ = sample.members["frame.json"]
    facts = path.read_bytes()[offset : offset + size]
    digit = next(place for place in range(facts.index(b"world_from_head"), size) if chr(facts[place]).isdigit())
    _flip(path, offset + digit)
    with pytest.raises(ChecksumError, match=rf"{shard.name}!{frame_id}\.frame\.json: CRC-32 .* the manifest says"):
        opened[frame_id]
    with pytest.raises(ChecksumError, match=r"frame\.json"):
        show_frame(str(own_shards_folder), frame_id)
    assert opened.view(frame_id, camera_id) is not None
    read_mesh_and_texture(uri, sample)
    for suffix in ("verts.npy.zst", f"{camera_id}.image.png"):
        _flip(path, sum(sample.members[suffix][:2]) - 1)
    with pytest.raises(ChecksumError, match=rf"{camera_id}\.image\.png"):
        opened.view(frame_id, camera_id)
    with pytest.raises(ChecksumError, match=rf"{camera_id}\.image\.png"):
        read_view(str(own_shards_folder), frame_id, camera_id)
    with pytest.raises(ChecksumError, match=r"verts\.npy\.zst"):
        read_mesh_and_texture(uri, sample)


def _flip(path: Path, place: int) -> None:
    body = bytearray(path.read_bytes())
    body[place] ^= 1
    path.write_bytes(body)


def test_chosen_members_of_a_remote_set_give_the_same_batches(
    shard_set: ShardSet,
    s3_shards_uri: str,
    tmp_path: Path,
    range_reads: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(member_reads, "_WORTH_A_REQUEST_BYTES", 512)
    remote, ids = ShardSet.open(s3_shards_uri), shard_set.train_camera_ids
    config = CONFIG.model_copy(update={"remote_reads": "members", "visits_per_epoch": 1, "signals": ()})
    far = ShardLoader(remote, "train", ids, config, 0, 1, tmp_path)
    near = ShardLoader(shard_set, "train", ids, config)
    assert far.reads_members
    assert not near.reads_members
    range_reads.clear()
    members = list(far.epoch(0))
    assert not list(tmp_path.iterdir())
    wanted = sum(range_reads)
    assert 0 < wanted < sum(shard.size_bytes for shard in remote.shards("train"))
    for first, second in zip(near.epoch(0), members, strict=True):
        for name in ("vertices", "average_texture", "images", "view_present", "camera_index"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_auto_reads_members_only_where_that_is_less_and_the_cache_is_too_small(
    s3_shards_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In this small set one view and what belongs to its frame are 0.60 of the bytes, three views twice 1.34."""
    monkeypatch.setattr(loader_module, "_WORTH_SINGLE_READS", 0.7)
    remote = ShardSet.open(s3_shards_uri)

    def reads_members(**changes) -> bool:
        few = {"views_per_frame": 1, "visits_per_epoch": 1, "signals": (), "cache_max_bytes": 1}
        config = LoaderConfig(**{**few, **changes})
        return ShardLoader(remote, "train", remote.train_camera_ids, config, 0, 1, tmp_path).reads_members

    assert reads_members()
    assert not reads_members(cache_max_bytes=2**30)
    assert not reads_members(check_shards="each-epoch")
    assert not reads_members(remote_reads="shards")
    assert not reads_members(views_per_frame=3, visits_per_epoch=None)


def test_members_cannot_be_read_alone_where_digests_are_asked_for():
    with pytest.raises(ValueError, match="remote_reads=shards or check_shards=once"):
        LoaderConfig(remote_reads="members", check_shards="each-epoch")
