"""Shards: deterministic bytes, exact offsets, resumable, committed by the manifest; plain WebDataset."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from lipflow.errors import CaptureError, ConfigError, ShardSetError
from pipeline import storage
from pipeline.capture import Capture
from pipeline.captures.opening import open_capture
from pipeline.corrupt_files import CorruptFilesError
from pipeline.images.codecs import LosslessCodec, decode_any_image, decode_image
from pipeline.loading.member_reads import read_mesh_and_texture
from pipeline.loading.shardset import ShardSet
from pipeline.manifest import Manifest
from pipeline.sharding import shards
from pipeline.sharding.costs import probe_frames
from pipeline.sharding.samples import SampleEncoder, average_texture_suffix
from pipeline.sharding.shards import ShardConfig, find_committed, plan_shards, write_shard, write_shards
from pipeline.sharding.splits import SplitConfig
from pipeline.sharding.stats import OrderedSums, merge
from pipeline.sharding.target import claimed, read_sidecar
from pipeline.sharding.undistort import Undistorter
from tests.pipeline.sealed_manifests import read_manifest, write_manifest

CONFIG = ShardConfig(frames_per_shard=4)
ALLOWED_ENDINGS = (".json", ".npy.zst", ".png", ".plz")


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shard_bytes_do_not_depend_on_when_or_in_which_order_they_are_written(
    dome: Capture, shards_folder: Path, tmp_path: Path
):
    plan = plan_shards(dome, CONFIG)
    for task in reversed(plan.shards):
        record = write_shard(dome.uri, CONFIG, task, str(tmp_path))
        assert (tmp_path / task.name).read_bytes() == (shards_folder / task.name).read_bytes()
        assert record.sha256 == storage.sha256_hex(tmp_path / task.name)


def test_an_s3_set_equals_the_local_one_byte_for_byte(dome: Capture, shards_folder: Path, s3_server):
    uri = s3_server.uri("shards")
    manifest = write_shards(dome, CONFIG, uri)
    assert {name: storage.read_bytes(storage.join(uri, name)) for name in storage.listdir(uri)} == _bytes_of(
        shards_folder
    )
    assert manifest.digest == Manifest.load(str(shards_folder)).digest


def test_a_capture_on_s3_gives_the_same_shards(dome_folder: Path, shards_folder: Path, s3_server, tmp_path: Path):
    storage.upload_dir(dome_folder, s3_server.uri("capture"))
    manifest = write_shards(open_capture(s3_server.uri("capture")), CONFIG, str(tmp_path))
    assert manifest.digest == Manifest.load(str(shards_folder)).digest


def test_member_offsets_are_exact(manifest: Manifest, shards_folder: Path):
    for shard in manifest.shards:
        with tarfile.open(shards_folder / shard.name) as tar:
            members = {member.name: member for member in tar}
            promised = {
                f"{s.frame_id}.{suffix}": place[:2] for s in shard.samples for suffix, place in s.members.items()
            }
            assert set(members) == set(promised)
            for name, (offset, size) in promised.items():
                stream = tar.extractfile(members[name])
                assert stream is not None
                assert storage.read_range(shards_folder / shard.name, offset, size) == stream.read()


def test_members_have_allowed_endings_fixed_owners_and_fixed_times(manifest: Manifest, shards_folder: Path):
    for shard in manifest.shards:
        with tarfile.open(shards_folder / shard.name) as tar:
            for member in tar:
                assert member.name.endswith(ALLOWED_ENDINGS)
                assert (member.mtime, member.uname, member.uid, member.isfile()) == (0, "lipflow", 0, True)


def test_plain_webdataset_streams_the_same_samples(manifest: Manifest, shards_folder: Path):
    for shard in manifest.shards:
        url = f"file:{shards_folder / shard.name}"
        streamed = list(webdataset.WebDataset(url, shardshuffle=False))
        assert [sample["__key__"] for sample in streamed] == [sample.frame_id for sample in shard.samples]
        for sample, record in zip(streamed, shard.samples, strict=True):
            assert {key for key in sample if not key.startswith("__")} == set(record.members)
            assert json.loads(sample["frame.json"])["cameras"]


def test_png_images_and_textures_are_stored_as_they_were_captured(dome: Capture, tmp_path: Path):
    manifest = write_shards(dome, ShardConfig(texture_codec="png"), str(tmp_path))
    for shard in manifest.shards:
        for sample in shard.samples:
            segment, _, frame = sample.frame_id.partition("/")
            offset, size, _ = sample.members["avgtex.png"]
            stored = storage.read_range(tmp_path / shard.name, offset, size)
            assert stored == dome.frame(segment, frame).average_texture_file()
            for camera in dome.cameras:
                captured = dome.frame(segment, frame).image_file(camera.camera_id)
                suffix = f"{camera.camera_id}.image.png"
                assert (captured is None) == (suffix not in sample.members)
                if captured is not None:
                    offset, size, _ = sample.members[suffix]
                    assert storage.read_range(tmp_path / shard.name, offset, size) == captured


@pytest.mark.parametrize("texture_codec", ["planar", "webp", "png"])
def test_average_textures_are_lossless_under_every_codec(dome: Capture, tmp_path: Path, texture_codec: LosslessCodec):
    manifest = write_shards(dome, ShardConfig(texture_codec=texture_codec), str(tmp_path))
    assert manifest.texture_codec == texture_codec
    suffix = average_texture_suffix(texture_codec)
    shard = manifest.shards[0]
    for sample in shard.samples:
        segment, _, frame = sample.frame_id.partition("/")
        captured = dome.frame(segment, frame).average_texture_file()
        assert captured is not None
        stored = storage.read_range(tmp_path / shard.name, *sample.members[suffix][:2])
        np.testing.assert_array_equal(decode_image(stored, suffix), decode_any_image(captured, "captured"))
        texture, _ = read_mesh_and_texture(str(tmp_path / shard.name), sample)
        batch = ShardSet.open(tmp_path).frames([sample.frame_id], manifest.train_camera_ids[:1])
        np.testing.assert_array_equal(batch.average_texture[0].numpy(), texture)


def test_a_lossy_or_unknown_texture_codec_is_refused(dome: Capture, shards_folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="texture_codec"):
        ShardConfig.model_validate({"texture_codec": "jpeg"})
    document = read_manifest(shards_folder)
    document["config"]["texture_codec"] = "jpeg"
    write_manifest(tmp_path, document)
    with pytest.raises(ShardSetError, match=r"texture_codec is 'jpeg', no lossless image codec"):
        Manifest.load(str(tmp_path))


def test_missing_views_are_recorded(dome: Capture, manifest: Manifest):
    expected = {
        (f"{segment}/{frame}", camera.camera_id)
        for segment, frames in dome.segments.items()
        for frame in frames
        for camera in dome.cameras
        if dome.frame(segment, frame).image_file(camera.camera_id) is None
    }
    assert expected
    assert set(manifest.missing_views()) == expected


def test_every_frame_is_in_one_shard_of_its_split(dome: Capture, manifest: Manifest):
    found = [(shard.split, sample.frame_id) for shard in manifest.shards for sample in shard.samples]
    expected = {
        (split, f"{segment}/{frame}")
        for split, segments in manifest.splits.items()
        for segment in segments
        for frame in dome.segments[segment]
    }
    assert len(found) == len(expected)
    assert set(found) == expected


def test_a_second_run_writes_nothing(dome: Capture, own_shards_folder: Path):
    before = {path: os.stat(path).st_mtime_ns for path in own_shards_folder.iterdir()}
    write_shards(dome, CONFIG, str(own_shards_folder))
    assert {path: os.stat(path).st_mtime_ns for path in own_shards_folder.iterdir()} == before


def test_a_killed_run_is_resumed_where_it_stopped(
    dome: Capture, shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first run dies in the middle of the third shard; the second writes that one and the rest, no more."""
    plan = plan_shards(dome, CONFIG)
    encoded: list[str] = []
    real_sample = SampleEncoder.sample
    stop_at = f"{plan.shards[2].frames[0][0]}/{plan.shards[2].frames[0][1]}"

    def dying(self: SampleEncoder, segment: str, frame: str):
        if f"{segment}/{frame}" == stop_at:
            raise KeyboardInterrupt
        return real_sample(self, segment, frame)

    monkeypatch.setattr(SampleEncoder, "sample", dying)
    with pytest.raises(KeyboardInterrupt):
        write_shards(dome, CONFIG, str(tmp_path))
    assert sorted(storage.listdir(tmp_path)) == sorted(
        name for task in plan.shards[:2] for name in (task.name, task.name.replace(".tar", ".json"))
    )
    with pytest.raises(ShardSetError, match="no manifest"):
        Manifest.load(str(tmp_path))

    def counting(self: SampleEncoder, segment: str, frame: str):
        encoded.append(f"{segment}/{frame}")
        return real_sample(self, segment, frame)

    monkeypatch.setattr(SampleEncoder, "sample", counting)
    write_shards(dome, CONFIG, str(tmp_path))
    assert encoded == ["/".join(frame) for task in plan.shards[2:] for frame in task.frames]
    assert _bytes_of(tmp_path) == _bytes_of(shards_folder)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_shard_is_written_again(dome: Capture, own_shards_folder: Path, shards_folder: Path, damage: str):
    path = own_shards_folder / "train-000001.tar"
    body = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(body[:-512])
    elif damage == "flip":
        body[len(body) // 2] ^= 1
        path.write_bytes(body)
        (own_shards_folder / "manifest.json").unlink()
    else:
        path.unlink()
    write_shards(dome, CONFIG, str(own_shards_folder))
    assert _bytes_of(own_shards_folder) == _bytes_of(shards_folder)


def test_a_sidecar_with_another_digit_in_it_is_not_trusted(dome: Capture, own_shards_folder: Path, shards_folder: Path):
    """The shard's digest would pass; the place of a member would be wrong in the manifest that is made of it."""
    path = own_shards_folder / "train-000000.json"
    text = path.read_text()
    offset = re.search(r'"avgtex\.plz":\[(\d+),', text)
    assert offset is not None
    path.write_text(text[: offset.start(1)] + str(int(offset[1]) - 512) + text[offset.end(1) :])
    (own_shards_folder / "manifest.json").unlink()
    assert read_sidecar(str(own_shards_folder), "train-000000.tar") is None
    write_shards(dome, CONFIG, str(own_shards_folder))
    assert _bytes_of(own_shards_folder) == _bytes_of(shards_folder)


def test_a_committed_set_is_recognised_by_plan_and_on_request_by_digest(dome: Capture, own_shards_folder: Path):
    uri = str(own_shards_folder)
    plan = plan_shards(dome, CONFIG)
    assert find_committed(uri, plan) is not None
    assert find_committed(uri, plan_shards(dome, ShardConfig(frames_per_shard=5))) is None
    path = own_shards_folder / "val-000000.tar"
    body = bytearray(path.read_bytes())
    body[700] ^= 1
    path.write_bytes(body)
    assert find_committed(uri, plan) is not None
    assert find_committed(uri, plan, check_digests=True) is None


def test_a_capture_made_anew_under_the_same_names_has_another_fingerprint(dome: Capture, own_dome_folder: Path):
    same = plan_shards(open_capture(own_dome_folder), CONFIG).fingerprint
    assert same == plan_shards(dome, CONFIG).fingerprint
    path = own_dome_folder / "unwrapped_uv_1024" / "EXP_eyes" / "average" / "000000.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(path)
    assert plan_shards(open_capture(own_dome_folder), CONFIG).fingerprint != same


OTHER = ShardConfig(frames_per_shard=4, seed=1)
BEGUN = {
    "committed": lambda folder: None,
    "uncommitted": lambda folder: (folder / "manifest.json").unlink(),
    "copied without sidecars": lambda folder: [path.unlink() for path in folder.glob("*-0*.json")],
}


@pytest.mark.parametrize("state", BEGUN)
def test_shards_of_another_plan_are_refused_and_stay_as_they_are(dome: Capture, own_shards_folder: Path, state: str):
    BEGUN[state](own_shards_folder)
    before = _bytes_of(own_shards_folder)
    with pytest.raises(ConfigError, match=r"of another recipe or capture; give another OUT, remove what lies there"):
        write_shards(dome, OTHER, str(own_shards_folder))
    assert _bytes_of(own_shards_folder) == before


def test_a_task_does_not_write_over_a_shard_of_another_plan(dome: Capture, own_shards_folder: Path):
    before = _bytes_of(own_shards_folder)
    with pytest.raises(ConfigError, match=r"train-000000\.tar there is of another"):
        write_shard(dome, OTHER, plan_shards(dome, OTHER).shards[0], str(own_shards_folder))
    assert _bytes_of(own_shards_folder) == before


def test_a_tar_that_no_shard_of_the_plan_is_named_like_is_refused(dome: Capture, tmp_path: Path):
    """A loader that takes all tars of a folder would take it, too."""
    (tmp_path / "train-000007.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"train-000007\.tar there is of another"):
        write_shards(dome, CONFIG, str(tmp_path))
    assert _bytes_of(tmp_path) == {"train-000007.tar": b""}


def test_the_claim_of_a_dead_job_stops_other_plans_alone_and_ends_with_the_set(
    dome: Capture, shards_folder: Path, tmp_path: Path
):
    claim = tmp_path / f".job-{plan_shards(dome, CONFIG).fingerprint}-{'0' * 32}.json"
    claim.write_text(json.dumps({"host": "dome-7", "pid": 12, "started": "2026-01-02T03:04:05+00:00"}))
    with pytest.raises(ConfigError, match=r"host dome-7, process 12, since 2026.*If that job is dead, remove file://"):
        write_shards(dome, OTHER, str(tmp_path))
    assert list(tmp_path.iterdir()) == [claim]
    write_shards(dome, CONFIG, str(tmp_path))
    assert _bytes_of(tmp_path) == _bytes_of(shards_folder)


def test_a_run_on_a_complete_set_removes_what_jobs_that_were_killed_after_the_commit_have_left(
    dome: Capture, own_shards_folder: Path, shards_folder: Path
):
    claim = own_shards_folder / f".job-{plan_shards(dome, CONFIG).fingerprint}-{'0' * 32}.json"
    fresh = own_shards_folder / f".train-000000.tar.{1:032x}.partial"
    begun = ("train-000000.tar", "val-000000.json", "topology.npz", "normalization.npz", "manifest.json", claim.name)
    stale = [own_shards_folder / f".{name}.{0:032x}.partial" for name in begun]
    for path in (claim, fresh, *stale):
        path.write_bytes(b"{}")
    for path in stale:
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    write_shards(dome, CONFIG, str(own_shards_folder))
    assert _bytes_of(own_shards_folder) == _bytes_of(shards_folder) | {fresh.name: b"{}"}


def test_a_failed_job_leaves_no_claim(own_dome_folder: Path, tmp_path: Path):
    for path in (own_dome_folder / "tracked_mesh").rglob("*.bin"):
        path.write_bytes(b"short")
    with pytest.raises(CorruptFilesError):
        write_shards(open_capture(own_dome_folder), CONFIG, str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_of_two_plans_that_claim_at_the_same_time_at_most_one_goes_on(tmp_path: Path):
    """Whichever way their steps interleave: each writes its claim before it looks."""
    first, second = "a" * 64, "b" * 64
    with claimed(str(tmp_path), first, ["train-000000.tar"]):
        with pytest.raises(ConfigError, match="another recipe"), claimed(str(tmp_path), second, ["train-000000.tar"]):
            pytest.fail("both went on")
        with claimed(str(tmp_path), first, ["train-000000.tar"]):
            assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


def test_shards_have_the_target_size(dome: Capture, tmp_path: Path):
    """Frames differ, and lack views: measured, a shard is 0.96 to 1.09 of its frames times the probed size.

    Its end, padded to 10 KiB, is of no frame.
    """
    plan = plan_shards(dome, CONFIG)
    cost = probe_frames(dome, plan.sources.captures[0].settings, plan.shards[0].frames)
    config = ShardConfig(target_shard_bytes=int(3.5 * cost.size_bytes))
    plan = plan_shards(dome, config)
    assert plan.config.frames_per_shard == 3
    manifest = write_shards(dome, config, str(tmp_path))
    whole = [shard for shard in manifest.shards if len(shard.samples) == 3]
    assert whole
    for shard in whole:
        members = sum(512 + -(-size // 512) * 512 for sample in shard.samples for _, size, _ in sample.members.values())
        assert 0.85 < members / (3 * cost.size_bytes) < 1.15
        assert members < shard.size_bytes <= members + 1024 + 10240
    # The number that was chosen, given by hand, is the same plan.
    assert plan_shards(dome, ShardConfig(frames_per_shard=3)).fingerprint == plan.fingerprint
    assert plan_shards(dome, ShardConfig(target_shard_bytes=1)).config.frames_per_shard == 1
    assert max(len(task.frames) for task in plan_shards(dome, ShardConfig()).shards) > 3


def test_planning_reads_a_few_frames_whatever_the_length(dome: Capture, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: read.append(str(uri)) or real(uri))
    plan_shards(open_capture(dome.uri), ShardConfig())
    images = {uri for uri in read if "/images/" in uri}
    frames = {(Path(uri).parents[1].name, Path(uri).stem) for uri in images}
    # Three that are probed, and the first of each of five segments.
    assert 3 <= len(frames) <= 3 + 5 < sum(len(stems) for stems in dome.segments.values())


def test_corrupt_files_can_be_skipped_after_the_job_has_failed_and_the_good_shards_stay(
    own_dome_folder: Path, tmp_path: Path
):
    corrupted(own_dome_folder)
    capture, out = open_capture(own_dome_folder), tmp_path / "out"
    with pytest.raises(CorruptFilesError):
        write_shards(capture, ShardConfig(frames_per_shard=1), str(out))
    before = {path: os.stat(path).st_mtime_ns for path in out.glob("*.tar")}
    lenient = ShardConfig(frames_per_shard=1, on_error="skip", max_skipped_fraction=0.1)
    manifest = write_shards(capture, lenient, str(out))
    assert len(manifest.skipped()) == 3
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    # And what was skipped is no finished set for one who wants none of it.
    committed = _bytes_of(out)
    with pytest.raises(CorruptFilesError):
        write_shards(capture, ShardConfig(frames_per_shard=1), str(out))
    with pytest.raises(CaptureError, match="at most"):
        write_shards(capture, lenient.model_copy(update={"max_skipped_fraction": 0.0001}), str(out))
    assert _bytes_of(out) == committed


def test_statistics_come_out_the_same_in_whichever_order_shards_are_finished(dome: Capture, shards_folder: Path):
    manifest = Manifest.load(str(shards_folder))
    parts = {record.name: shards.shard_statistics(str(shards_folder), record) for record in manifest.shards}
    parts["train-000099.tar"] = None
    expected = merge(part for part in parts.values() if part is not None)
    generator = random.Random(0)
    for _ in range(5):
        sums = OrderedSums(parts)
        for name in generator.sample(list(parts), len(parts)):
            sums.add(name, parts[name])
        total = sums.total()
        assert total is not None
        assert total.count == expected.count
        np.testing.assert_array_equal(total.texture, expected.texture)
        np.testing.assert_array_equal(total.vertices, expected.vertices)
        assert total.texture_squares == expected.texture_squares
        assert total.vertices_squares == expected.vertices_squares
    incomplete = OrderedSums(parts)
    incomplete.add("train-000000.tar", parts["train-000000.tar"])
    with pytest.raises(ValueError, match="are missing"):
        incomplete.total()


@pytest.mark.parametrize("codec", ["webp", "jpeg"])
def test_images_and_textures_are_resized_with_their_cameras(dome: Capture, tmp_path: Path, codec: str):
    config = ShardConfig(image_size_hw=(24, 12), texture_size=16, codec=codec, frames_per_shard=100)
    manifest = write_shards(dome, config, str(tmp_path))
    assert manifest.image_size_hw == (24, 12)
    for record, camera in zip(manifest.cameras, dome.cameras, strict=True):
        scale = np.diag([12 / 36, 24 / 48, 1])
        np.testing.assert_allclose(record.intrinsics, scale @ camera.intrinsics, rtol=1e-12)
    extension = {"webp": "webp", "jpeg": "jpg"}[codec]
    shard = manifest.shards[0]
    for suffix, (offset, size, _) in shard.samples[0].members.items():
        body = storage.read_range(tmp_path / shard.name, offset, size)
        if suffix.endswith(f".image.{extension}"):
            assert Image.open(io.BytesIO(body)).size == (12, 24)
        if suffix == "avgtex.plz":
            assert decode_image(body, suffix).shape == (16, 16, 3)


def corrupted(folder: Path) -> list[str]:
    """Three files made bad in three ways; their addresses."""
    image = folder / "images" / "EXP_smile" / "400001" / "000001.png"
    image.write_bytes(image.read_bytes()[:-200])
    mesh = folder / "tracked_mesh" / "EXP_smile" / "000002.bin"
    mesh.write_bytes(b"short")
    odd = folder / "images" / "EXP_eyes" / "400003" / "000000.png"
    Image.new("RGB", (5, 5)).save(odd)
    return sorted(f"file://{path}" for path in (image, mesh, odd))


def test_corrupt_files_fail_the_job_which_names_them_all_and_leaves_no_bad_shard(own_dome_folder: Path, tmp_path: Path):
    bad = corrupted(own_dome_folder)
    config = ShardConfig(frames_per_shard=1)
    with pytest.raises(CorruptFilesError) as caught:
        write_shards(open_capture(own_dome_folder), config, str(tmp_path / "out"))
    assert sorted(item.path for item in caught.value.files) == bad
    assert all(path in str(caught.value) for path in bad)
    assert "3 files cannot be used" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.files) == (str(caught.value), caught.value.files)
    # Shards without a fault are kept for the next run; those with one are not there at all.
    assert len(list((tmp_path / "out").glob("*.tar"))) == 15 - 3
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_corrupt_files_are_skipped_up_to_a_fraction_and_listed(own_dome_folder: Path, tmp_path: Path):
    bad = corrupted(own_dome_folder)
    capture = open_capture(own_dome_folder)
    strict = ShardConfig(on_error="skip", max_skipped_fraction=0.001)
    with pytest.raises(CaptureError, match=r"3 of .* files cannot be used"):
        write_shards(capture, strict, str(tmp_path / "strict"))
    manifest = write_shards(capture, ShardConfig(on_error="skip", max_skipped_fraction=0.1), str(tmp_path / "out"))
    assert sorted(item.path for item in manifest.skipped()) == bad
    assert all(item.reason for item in manifest.skipped())
    assert {("EXP_smile/000001", "400001"), ("EXP_eyes/000000", "400003")} <= set(manifest.missing_views())
    frames = {sample.frame_id for shard in manifest.shards for sample in shard.samples}
    assert "EXP_smile/000002" not in frames


def test_a_missing_average_texture_is_unwrapped_from_the_training_cameras(own_dome_folder: Path, tmp_path: Path):
    """Where the capture has the texture as well, both agree: the median texel is off by 6 (measured).

    The unwrapped one has the cameras' noise and colours in it.
    """
    folder = own_dome_folder / "unwrapped_uv_1024" / "SEN_a_good_morrow" / "average"
    original = np.asarray(Image.open(folder / "000001.png").convert("RGB")).astype(int)
    (folder / "000001.png").unlink()
    manifest = write_shards(open_capture(own_dome_folder), ShardConfig(), str(tmp_path / "out"))
    for shard in manifest.shards:
        for sample in shard.samples:
            offset, size, _ = sample.members["frame.json"]
            facts = json.loads(storage.read_range(tmp_path / "out" / shard.name, offset, size))
            made = sample.frame_id == "SEN_a_good_morrow/000001"
            assert facts["average_texture"] == ("unwrapped" if made else "capture")
            if made:
                assert 0.4 < facts["texture_seen_fraction"] <= 1
                offset, size, _ = sample.members["avgtex.plz"]
                body = storage.read_range(tmp_path / "out" / shard.name, offset, size)
                stored = decode_image(body, "avgtex.plz").astype(int)
                assert np.median(np.abs(stored - original)) < 12


def test_view_textures_are_stored_on_request(own_dome_folder: Path, tmp_path: Path):
    folder = own_dome_folder / "unwrapped_uv_1024" / "EXP_smile" / "400002"
    folder.mkdir()
    Image.new("RGB", (32, 32), (9, 8, 7)).save(folder / "000001.png")
    manifest = write_shards(open_capture(own_dome_folder), ShardConfig(store_view_textures=True), str(tmp_path / "o"))
    with_texture = {
        (sample.frame_id, suffix)
        for shard in manifest.shards
        for sample in shard.samples
        for suffix in sample.members
        if ".tex." in suffix
    }
    assert with_texture == {("EXP_smile/000001", "400002.tex.png")}


def bent(folder: Path) -> Capture:
    """The capture with a lens before one of its cameras."""
    capture = open_capture(folder)
    camera = replace(capture.cameras[1], distortion=np.array([0.3, 0, 0, 0, 0]))
    capture.cameras = (capture.cameras[0], camera, *capture.cameras[2:])
    return capture


def test_images_of_a_lens_are_undistorted(dome_folder: Path, manifest: Manifest, tmp_path: Path):
    capture = bent(dome_folder)
    undistorted = write_shards(capture, CONFIG, str(tmp_path))
    shard = undistorted.shards[0]
    sample = next(sample for sample in shard.samples if "400002" not in sample.missing_views)
    segment, _, stem = sample.frame_id.partition("/")
    for camera in capture.cameras[:2]:
        body = capture.frame(segment, stem).image_file(camera.camera_id)
        offset, size, _ = sample.members[f"{camera.camera_id}.image.png"]
        stored = np.asarray(Image.open(io.BytesIO(storage.read_range(tmp_path / shard.name, offset, size))))
        captured = np.asarray(Image.open(io.BytesIO(body)))
        np.testing.assert_array_equal(stored, Undistorter(camera).apply(captured))
        assert (stored != captured).any() == bool(camera.distortion.any())
    assert undistorted.cameras == manifest.cameras


def test_distortion_is_refused_on_request(dome_folder: Path):
    with pytest.raises(CaptureError, match=r"400002 has distortion .* undistort"):
        plan_shards(bent(dome_folder), ShardConfig(distortion="refuse"))


def test_cameras_in_neither_list_are_left_out(dome: Capture, tmp_path: Path):
    splits = SplitConfig(train_cameras=("40000[125]",), test_cameras=("400004",))
    manifest = write_shards(dome, ShardConfig(splits=splits), str(tmp_path))
    assert manifest.train_camera_ids == ("400001", "400002", "400005")
    assert manifest.test_camera_ids == ("400004",)
    assert [camera.camera_id for camera in manifest.cameras] == ["400001", "400002", "400004", "400005"]
    suffixes = {suffix for shard in manifest.shards for sample in shard.samples for suffix in sample.members}
    assert not any(suffix.startswith(("400003", "400006")) for suffix in suffixes)


def test_mixed_image_sizes_ask_for_one(dome_folder: Path):
    capture = open_capture(dome_folder)
    capture.cameras = (capture.cameras[0].resized((10, 10)), *capture.cameras[1:])
    with pytest.raises(ConfigError, match="image_size_hw"):
        plan_shards(capture, CONFIG)


def test_a_set_with_a_shard_unwritten_is_not_committed(dome: Capture, tmp_path: Path, manifest: Manifest):
    plan = plan_shards(dome, CONFIG)
    own = plan_shards(dome, ShardConfig(statistics="capture", frames_per_shard=4))
    normalization = shards.reduce_statistics(own, [])
    with pytest.raises(ShardSetError, match="1 shards were not written"):
        shards.commit(str(tmp_path), plan, list(manifest.shards[1:]), normalization)
    assert not (tmp_path / "manifest.json").exists()
