"""The loader: right pixels with the right cameras, exact resume, damage refused, a bounded cache."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lipflow import memory
from lipflow.errors import ConfigError, ShardSetError
from lipflow.render.camera import project
from lipflow.types import FrameBatch
from pipeline import storage
from pipeline.capture import Capture
from pipeline.images.codecs import ImageCodec
from pipeline.loading import cache
from pipeline.loading.loader import PADDING_FRAME_ID, LoaderConfig, ShardLoader, ShardSet, prefetch_to_device
from pipeline.loading.shards_ahead import ShardsAhead
from pipeline.sharding.plan import ShardConfig
from pipeline.sharding.shards import write_shards

CONFIG = LoaderConfig(frames_per_batch=4, views_per_frame=2, window_shards=2, decode_threads=2)
SHARD_CONFIG = ShardConfig(frames_per_shard=4)


@pytest.fixture(scope="module")
def shard_set(shards_folder: Path) -> ShardSet:
    return ShardSet.open(shards_folder)


@pytest.fixture(scope="module")
def s3_shards_uri(shards_folder: Path, s3_server) -> str:
    storage.upload_dir(shards_folder, s3_server.uri("loader-shards"))
    return s3_server.uri("loader-shards")


def _all_camera_ids(shard_set: ShardSet) -> list[str]:
    return [camera.camera_id for camera in shard_set.cameras]


def _assert_equal(first: FrameBatch, second: FrameBatch) -> None:
    assert first.frame_ids == second.frame_ids
    for name in ("vertices", "average_texture", "images", "view_present", "camera_index"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert torch.equal(first.cameras.cam_from_head, second.cameras.cam_from_head)
    for name in ("hmc_images", "hmc_present", "frontal_images", "frontal_present", "keypoints"):
        assert torch.equal(getattr(first.driving, name), getattr(second.driving, name)), name


def test_frames_hold_what_the_capture_holds(dome: Capture, shard_set: ShardSet):
    ids = _all_camera_ids(shard_set)
    frame_ids = shard_set.frame_ids("train") + shard_set.frame_ids("test")
    batch = shard_set.frames(frame_ids, ids)
    assert batch.images.dtype == batch.average_texture.dtype == torch.uint8
    for row, frame_id in enumerate(frame_ids):
        source = dome.frame(*frame_id.split("/"))
        np.testing.assert_array_equal(batch.vertices[row].numpy(), source.vertices())
        texture = np.asarray(Image.open(io.BytesIO(source.average_texture_file() or b"")).convert("RGB"))
        np.testing.assert_array_equal(batch.average_texture[row].numpy(), texture[::-1].transpose(2, 0, 1))
        for column, camera_id in enumerate(ids):
            body = source.image_file(camera_id)
            assert bool(batch.view_present[row, column]) == (body is not None)
            expected = 0 if body is None else np.asarray(Image.open(io.BytesIO(body))).transpose(2, 0, 1)
            assert (batch.images[row, column].numpy() == expected).all()
        keypoints = source.keypoints()
        assert keypoints is not None
        np.testing.assert_allclose(batch.driving.keypoints[row].numpy(), keypoints, rtol=1e-6)
        for column, camera in enumerate(dome.headset_cameras):
            body = source.headset_file(camera.camera_id)
            assert bool(batch.driving.hmc_present[row, column]) == (body is not None)
            expected = 0 if body is None else np.asarray(Image.open(io.BytesIO(body)).convert("L"))
            assert (batch.driving.hmc_images[row, column, 0].numpy() == expected).all()
    frontal = ids.index(shard_set.frontal_camera_id)
    assert torch.equal(batch.driving.frontal_images, batch.images[:, frontal])
    assert torch.equal(batch.driving.frontal_present, batch.view_present[:, frontal])


def test_cameras_see_the_landmarks_where_the_capture_says(dome: Capture, shard_set: ShardSet):
    """Against keypoints with 0.3 px of noise: worst measured error 1.0 px."""
    batch = shard_set.frames(shard_set.frame_ids("train"), [shard_set.frontal_camera_id])
    landmarks = torch.tensor([shard_set.topology.landmarks[name] for name in shard_set.keypoint_names])
    cameras = batch.driving.frontal_cameras
    pixels, depth = project(batch.vertices[:, landmarks], cameras.intrinsics, cameras.cam_from_head)
    assert (depth > 0).all()
    seen = batch.driving.keypoints[..., 2] > 0
    error = (pixels - batch.driving.keypoints[..., :2]).norm(dim=-1)[seen]
    assert seen.any()
    assert error.max() < 2.0
    torch.testing.assert_close(batch.cameras.cam_from_head[:, 0], cameras.cam_from_head)


@pytest.mark.parametrize("codec", ["png", "planar", "jpeg"])
def test_batches_do_not_depend_on_how_their_images_are_shared_out_among_threads(
    dome: Capture, tmp_path: Path, codec: ImageCodec
):
    """Single jobs of one image, of several, and all images of a batch in one; the frontal view among them or not."""
    write_shards(dome, ShardConfig(codec=codec), str(tmp_path))
    shard_set = ShardSet.open(tmp_path)
    ids = shard_set.train_camera_ids
    batches = {}
    for threads in (1, 3, 16):
        config = CONFIG.model_copy(update={"decode_threads": threads, "prefetch_batches": threads % 3})
        loader = ShardLoader(shard_set, "train", ids, config)
        batches[threads] = list(loader.epoch(0))
    for one, several, every in zip(*batches.values(), strict=True):
        _assert_equal(one, several)
        _assert_equal(one, every)
        known = [row for row, frame_id in enumerate(one.frame_ids) if frame_id != PADDING_FRAME_ID]
        whole = shard_set.frames([one.frame_ids[row] for row in known], _all_camera_ids(shard_set))
        for place, row in enumerate(known):
            seen = one.view_present[row]
            assert torch.equal(one.images[row][seen], whole.images[place, one.camera_index[row][seen]])
            assert torch.equal(one.average_texture[row], whole.average_texture[place])


def test_an_epoch_holds_every_view_once(shard_set: ShardSet):
    ids = shard_set.train_camera_ids
    seen: Counter[tuple[str, int]] = Counter()
    for rank in range(2):
        loader = ShardLoader(shard_set, "train", ids, CONFIG, rank, 2)
        batches = list(loader.epoch(3))
        assert len(batches) == loader.batches_per_epoch
        for batch in batches:
            for row, frame_id in enumerate(batch.frame_ids):
                places = batch.camera_index[row][batch.view_present[row]].tolist()
                assert not places or frame_id != PADDING_FRAME_ID
                seen.update((frame_id, place) for place in places)
    missing = set(shard_set.manifest.missing_views())
    expected = {
        (frame_id, place)
        for frame_id in shard_set.frame_ids("train")
        for place, camera_id in zip(shard_set.camera_places(ids), ids, strict=True)
        if (frame_id, camera_id) not in missing
    }
    assert seen == Counter(dict.fromkeys(expected, 1))


def test_batches_equal_random_access(shard_set: ShardSet):
    for batch in ShardLoader(shard_set, "train", shard_set.train_camera_ids, CONFIG).epoch(0):
        for row, frame_id in enumerate(batch.frame_ids):
            if frame_id == PADDING_FRAME_ID:
                assert not batch.view_present[row].any()
                continue
            present = batch.view_present[row]
            ids = [shard_set.cameras[place].camera_id for place in batch.camera_index[row]]
            single = shard_set.frames([frame_id], ids)
            assert torch.equal(batch.images[row][present], single.images[0][present])
            assert torch.equal(batch.vertices[row], single.vertices[0])
            torch.testing.assert_close(batch.cameras.cam_from_head[row], single.cameras.cam_from_head[0])
            torch.testing.assert_close(batch.cameras.intrinsics[row], single.cameras.intrinsics[0])


@pytest.mark.parametrize("codec", ["png", "planar", "webp"])
def test_lossless_codecs_give_the_same_batches(dome: Capture, shard_set: ShardSet, tmp_path: Path, codec: str):
    config = SHARD_CONFIG.model_copy(update={"codec": codec})
    write_shards(dome, config, str(tmp_path))
    other = ShardSet.open(tmp_path)
    ids = shard_set.train_camera_ids
    batches = ShardLoader(shard_set, "train", ids, CONFIG).epoch(0), ShardLoader(other, "train", ids, CONFIG).epoch(0)
    for first, second in zip(*batches, strict=True):
        _assert_equal(first, second)


def test_a_batch_that_is_held_is_not_written_again(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch):
    """Memory is used again only when nobody holds the batch, or any view of its pixels."""
    monkeypatch.setattr(memory, "_LEAST_BYTES", 0)
    loader = ShardLoader(shard_set, "train", shard_set.train_camera_ids, CONFIG)
    held = []
    for batch in loader.epoch(0):
        held.append((batch.images[0, 0].numpy()[1], batch.images[0, 0, 1].clone().numpy()))
        del batch
    for _ in loader.epoch(1):
        pass
    for view, copy in held:
        np.testing.assert_array_equal(view, copy)


def test_prefetching_to_the_cpu_passes_batches_through(shard_set: ShardSet):
    batches = list(ShardLoader(shard_set, "train", shard_set.train_camera_ids, CONFIG).epoch(0))
    for batch, moved in zip(batches, prefetch_to_device(batches, "cpu"), strict=True):
        assert moved.images is batch.images
        _assert_equal(batch, moved)


def test_pinned_memory_is_for_cuda_alone(shard_set: ShardSet):
    config = CONFIG.model_copy(update={"pin_memory": True})
    batch = next(iter(ShardLoader(shard_set, "train", shard_set.train_camera_ids, config).epoch(0)))
    assert batch.images.is_pinned() == torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_prefetching_to_a_gpu_gives_the_same_batches(shard_set: ShardSet):
    config = CONFIG.model_copy(update={"pin_memory": True})
    loader = ShardLoader(shard_set, "train", shard_set.train_camera_ids, config)
    count = 0
    for batch, moved in zip(loader.epoch(0), prefetch_to_device(loader.epoch(0), "cuda"), strict=True):
        assert moved.images.is_cuda
        assert moved.images.dtype == torch.uint8
        _assert_equal(batch, moved.to("cpu"))
        count += 1
    assert count == loader.batches_per_epoch


@pytest.mark.parametrize(("check", "digests"), [("once", 1), ("each-epoch", 2), ("size", 0)])
def test_digests_are_compared_as_often_as_asked(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch, check: str, digests: int
):
    taken: Counter[str] = Counter()
    real = storage.sha256_hex

    def counting(path) -> str:
        taken[Path(path).name] += 1
        return real(path)

    monkeypatch.setattr(storage, "sha256_hex", counting)
    config = CONFIG.model_copy(update={"check_shards": check})
    loader = ShardLoader(shard_set, "train", shard_set.train_camera_ids, config)
    for epoch in range(2):
        assert len(list(loader.epoch(epoch))) == loader.batches_per_epoch
    assert taken == Counter({shard.name: digests for shard in shard_set.shards("train") if digests})


def test_a_shard_damaged_between_epochs_is_found_if_asked(own_shards_folder: Path):
    opened = ShardSet.open(own_shards_folder)
    config = CONFIG.model_copy(update={"check_shards": "each-epoch"})
    loader = ShardLoader(opened, "train", opened.train_camera_ids, config)
    list(loader.epoch(0))
    path = own_shards_folder / "train-000000.tar"
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    with pytest.raises(ShardSetError, match=r"train-000000\.tar.*SHA-256"):
        list(loader.epoch(1))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4), st.integers(10, 60))
def test_shards_come_in_order_once_and_within_the_bounds(seed: int, shards: int, places: int, max_bytes: int):
    generator = np.random.default_rng(seed)
    used = generator.integers(-1, shards, (8, places))
    sizes = generator.integers(1, 20, shards).tolist()
    started: list[int] = []
    ahead = ShardsAhead(started.append, used, sizes, max_bytes, max_shards=2, threads=1)
    for batch in range(8):
        ahead.advance(batch)
        for shard in used[batch]:
            ahead.wait(shard)
        coming = {shard for shard in started if shard in used[batch:]}
        assert sum(sizes[shard] for shard in coming) <= max_bytes
        assert sum(shard not in used[: batch + 1] for shard in started) <= 2
    ahead.close()
    first_uses = [shard for shard in dict.fromkeys(used.ravel().tolist()) if shard >= 0]
    assert started == first_uses[: len(started)]


def test_going_on_in_mid_epoch_equals_not_having_stopped_and_reads_nothing_twice(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
):
    def loader() -> ShardLoader:
        return ShardLoader(shard_set, "train", shard_set.train_camera_ids, CONFIG)

    whole = list(loader().epoch(1))
    reads: list[str] = []
    real_read = cache.ShardCache.read

    def counting(self: cache.ShardCache, shard, offset: int, size: int) -> bytes:
        reads.append(shard.name)
        return real_read(self, shard, offset, size)

    monkeypatch.setattr(cache.ShardCache, "read", counting)
    start = len(whole) - 1
    rest = list(loader().epoch(1, start_batch=start))
    assert len(rest) == 1
    _assert_equal(rest[0], whole[start])
    members_per_frame = 3 + CONFIG.views_per_frame + len(shard_set.headset_cameras) + 2
    assert len(reads) <= CONFIG.frames_per_batch * members_per_frame


def test_s3_gives_the_same_batches_as_the_disk(shard_set: ShardSet, s3_shards_uri: str, tmp_path: Path):
    remote = ShardSet.open(s3_shards_uri)
    assert remote.digest == shard_set.digest
    ids = shard_set.train_camera_ids
    near, far = (
        ShardLoader(shard_set, "train", ids, CONFIG),
        ShardLoader(remote, "train", ids, CONFIG, 0, 1, tmp_path),
    )
    for first, second in zip(near.epoch(0), far.epoch(0), strict=True):
        _assert_equal(first, second)
    frame_ids = shard_set.frame_ids("test")
    _assert_equal(shard_set.frames(frame_ids, ids), remote.frames(frame_ids, ids))


def _cached_bytes(folder: Path) -> int:
    """Threads remove files meanwhile."""
    total = 0
    for path in folder.glob("*.shard"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_the_cache_stays_within_its_bound_and_still_serves_all(s3_shards_uri: str, tmp_path: Path):
    remote = ShardSet.open(s3_shards_uri)
    largest = max(shard.size_bytes for shard in remote.manifest.shards)
    config = CONFIG.model_copy(update={"cache_max_bytes": largest, "window_shards": 1, "decode_threads": 1})
    loader = ShardLoader(remote, "train", remote.train_camera_ids, config, 0, 1, tmp_path)
    for _ in loader.epoch(0):
        assert _cached_bytes(tmp_path) <= largest


@pytest.mark.parametrize("place", ["file", "s3"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_tampered_shard_is_refused(
    own_shards_folder: Path, request: pytest.FixtureRequest, tmp_path: Path, damage: str, place: str
):
    path = own_shards_folder / "train-000000.tar"
    body = bytearray(path.read_bytes())
    if damage == "flip":
        body[len(body) // 2] ^= 1
    path.write_bytes(body[:-10240] if damage == "truncate" else body)
    if damage == "remove":
        path.unlink()
    uri = str(own_shards_folder)
    if place == "s3":
        uri = request.getfixturevalue("s3_server").uri(f"tampered-{damage}")
        storage.upload_dir(own_shards_folder, uri)
    opened = ShardSet.open(uri)
    loader = ShardLoader(opened, "train", opened.train_camera_ids, CONFIG, 0, 1, tmp_path / "cache")
    with pytest.raises(ShardSetError, match=r"train-000000\.tar") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_more_ranks_than_frames_still_give_equal_batches(shard_set: ShardSet):
    ids = shard_set.train_camera_ids
    frames = Counter()
    for rank in range(5):
        loader = ShardLoader(shard_set, "val", ids, CONFIG, rank, 5)
        batches = list(loader.epoch(0))
        assert len(batches) == loader.batches_per_epoch
        frames.update(frame_id for batch in batches for frame_id in batch.frame_ids)
    assert {frame_id for frame_id in frames if frame_id} == set(shard_set.frame_ids("val"))


def test_signals_that_are_not_asked_for_are_not_decoded(shard_set: ShardSet):
    batch = shard_set.frames(shard_set.frame_ids("val"), shard_set.train_camera_ids[:1], signals=("keypoints",))
    assert batch.driving.available() == ("keypoints",)
    assert batch.driving.frontal_cameras is not None
    bare = shard_set.frames(shard_set.frame_ids("val"), shard_set.train_camera_ids[:1], signals=())
    assert bare.driving.available() == ()


def test_an_abandoned_epoch_leaves_no_thread(shard_set: ShardSet):
    import threading

    before = threading.active_count()
    batches = ShardLoader(shard_set, "train", shard_set.train_camera_ids, CONFIG).epoch(0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("split", "cameras", "rank", "error", "message"),
    [
        ("nothing", ["400001"], 0, ShardSetError, "choose one of train, val, test"),
        ("train", ["999"], 0, ShardSetError, "no camera '999'"),
        ("train", [], 0, ConfigError, "at least one camera"),
        ("train", ["400001"], 2, ConfigError, "rank 2 of a world of 2"),
    ],
)
def test_wrong_use_is_refused(shard_set: ShardSet, split: str, cameras: list, rank: int, error: type, message: str):
    with pytest.raises(error, match=message):
        ShardLoader(shard_set, split, cameras, CONFIG, rank, 2)


def test_an_unknown_frame_is_named(shard_set: ShardSet):
    with pytest.raises(ShardSetError, match="no frame 'x/y'"):
        shard_set.frames(["x/y"], ["400001"])
