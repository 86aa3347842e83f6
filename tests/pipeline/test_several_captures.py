"""Several captures in one shard set: each frame keeps the calibration of its own capture."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from lipflow.errors import ConfigError, ShardSetError
from lipflow.render.camera import compose
from pipeline.capture import Capture
from pipeline.captures.opening import open_capture
from pipeline.checks.shard_listing import list_shards, show_frame
from pipeline.checks.shard_verification import verify_shards
from pipeline.loading.loader import PADDING_FRAME_ID, LoaderConfig, ShardLoader
from pipeline.loading.member_reads import read_mesh_and_texture
from pipeline.loading.shardset import ShardSet
from pipeline.manifest import Manifest
from pipeline.sharding.shards import plan_shards, write_shard, write_shards
from pipeline.sharding.splits import SplitConfig
from tests.pipeline.sealed_manifests import read_manifest, write_manifest
from tests.pipeline.sessions import ABSENT, CONFIG, write_sessions


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two sessions. Not to be changed."""
    return write_sessions(tmp_path_factory.mktemp("sessions"))


@pytest.fixture(scope="module")
def captures(folders: dict[str, Path]) -> dict[str, Capture]:
    return {name: open_capture(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def shards(captures: dict[str, Capture], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both sessions in one set. Not to be changed."""
    folder = tmp_path_factory.mktemp("set")
    write_shards(captures, CONFIG, str(folder))
    return folder


@pytest.fixture(scope="module")
def shard_set(shards: Path) -> ShardSet:
    return ShardSet.open(shards)


def all_frames(shard_set: ShardSet) -> list[str]:
    return [frame_id for split in ("train", "val", "test") for frame_id in shard_set.frame_ids(split)]


def source_of(captures: dict[str, Capture], frame_id: str):
    """The capture of a frame, and the frame as the capture has it."""
    segment, frame = frame_id.split("/")
    own, name = segment.split("@")
    return captures[name], captures[name].frame(own, frame)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_frame_of_every_capture_is_there_once_in_shards_of_one_capture_each(
    captures: dict[str, Capture], shard_set: ShardSet
):
    expected = {
        f"{segment}@{name}/{frame}"
        for name, capture in captures.items()
        for segment, frames in capture.segments.items()
        for frame in frames
    }
    found = all_frames(shard_set)
    assert len(found) == len(set(found)) == 4 * 2 + 4 * 3
    assert set(found) == expected
    for shard in shard_set.manifest.shards:
        assert len({shard_set.manifest.capture_of(sample.frame_id).name for sample in shard.samples}) == 1


def test_the_order_of_captures_and_of_tasks_does_not_change_a_byte(
    captures: dict[str, Capture], shards: Path, tmp_path: Path
):
    other_way = dict(reversed(captures.items()))
    assert write_shards({name: capture.uri for name, capture in other_way.items()}, CONFIG, str(tmp_path / "whole"))
    assert bytes_of(tmp_path / "whole") == bytes_of(shards)
    plan = plan_shards(other_way, CONFIG)
    for task in reversed(plan.shards):
        # as a worker does, which opens one capture alone
        stored = plan.sources.of(task.capture_name).place.open()
        write_shard(stored, plan.config, task, str(tmp_path / "tasks"))
        assert (tmp_path / "tasks" / task.name).read_bytes() == (shards / task.name).read_bytes()


def test_k_and_pose_of_every_frame_are_those_of_its_own_capture(captures: dict[str, Capture], shard_set: ShardSet):
    """Exactly; the two calibrations differ by 6 % of the focal length and 7.5 mm along each axis."""
    ids = [camera.camera_id for camera in shard_set.cameras]
    assert ids == [camera.camera_id for camera in captures["a"].cameras]
    seen = set()
    for frame_id in all_frames(shard_set):
        capture, source = source_of(captures, frame_id)
        batch, own = shard_set[frame_id], {camera.camera_id: camera for camera in capture.cameras}
        for place, camera_id in enumerate(ids):
            camera = own.get(camera_id, capture.cameras[0])
            expected = compose(camera.cam_from_world, source.world_from_head()).astype(np.float32)
            np.testing.assert_array_equal(batch.cameras.cam_from_head[0, place], expected)
            np.testing.assert_array_equal(batch.cameras.intrinsics[0, place], camera.intrinsics.astype(np.float32))
            seen.add((camera_id, float(batch.cameras.intrinsics[0, place, 0, 0])))
        frontal = own[shard_set.frontal_camera_id or ""]
        expected = compose(frontal.cam_from_world, source.world_from_head()).astype(np.float32)
        np.testing.assert_array_equal(batch.driving.frontal_cameras.cam_from_head[0], expected)
        np.testing.assert_array_equal(
            batch.driving.frontal_cameras.intrinsics[0], frontal.intrinsics.astype(np.float32)
        )
        headset = np.stack([camera.cam_from_world for camera in capture.headset_cameras]).astype(np.float32)
        np.testing.assert_array_equal(batch.driving.hmc_cameras.cam_from_head[0], headset)
    # that is what differs, were it taken from the other capture
    assert len(seen) == 2 * len(ids)


def test_a_camera_that_one_capture_lacks_is_a_missing_view_of_its_frames(
    captures: dict[str, Capture], shards: Path, shard_set: ShardSet
):
    manifest = shard_set.manifest
    of_b = [frame_id for frame_id in all_frames(shard_set) if "@b/" in frame_id]
    missing = Counter(camera_id for frame_id, camera_id in manifest.missing_views() if "@b/" in frame_id)
    assert missing[ABSENT] == len(of_b) == 12
    for frame_id in of_b:
        assert not shard_set.frames([frame_id], [ABSENT]).view_present.any()
        assert shard_set.view(frame_id, ABSENT) is None
        assert ABSENT in show_frame(str(shards), frame_id).frame.missing_views
    assert any(shard_set.view(frame_id, ABSENT) is not None for frame_id in all_frames(shard_set))
    # known from the captures' cameras, and not repeated in each frame
    assert all(
        ABSENT not in sample.missing_views
        for shard in manifest.shards
        for sample in shard.samples
        if "@b/" in sample.frame_id
    )
    listing = list_shards(str(shards))
    frames = len(all_frames(shard_set))
    assert listing.views + listing.missing_views == frames * len(manifest.cameras)
    assert listing.missing_views == sum(1 for _ in manifest.missing_views())
    assert {shard.capture for shard in listing.shards} == {"a", "b"}


def test_statistics_are_those_of_all_training_frames_together(shards: Path, shard_set: ShardSet):
    """Against two passes in float64 over the frames; measured: textures 5e-8 of the values, meshes 8e-6 mm."""
    parts = [
        read_mesh_and_texture(str(shards / shard.name), sample)
        for shard in shard_set.shards("train")
        for sample in shard.samples
    ]
    textures = np.stack([texture for texture, _ in parts]).astype(np.float64)
    vertices = np.stack([mesh for _, mesh in parts]).astype(np.float64)
    found = shard_set.normalization
    np.testing.assert_allclose(found.texture_mean, textures.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.vertices_mean, vertices.mean(0), rtol=1e-6, atol=1e-5)
    assert found.texture_std == pytest.approx(np.sqrt(np.square(textures - textures.mean(0)).mean()), rel=1e-6)
    assert found.vertices_std == pytest.approx(np.sqrt(np.square(vertices - vertices.mean(0)).mean()), rel=1e-6)


def test_an_epoch_has_every_view_of_both_captures_once(captures: dict[str, Capture], shard_set: ShardSet):
    ids = shard_set.train_camera_ids
    config = LoaderConfig(frames_per_batch=3, views_per_frame=2, decode_threads=1, signals=())
    seen = Counter()
    for rank in range(2):
        for batch in ShardLoader(shard_set, "train", ids, config, rank, 2).epoch(0):
            for row, frame_id in enumerate(batch.frame_ids):
                if frame_id == PADDING_FRAME_ID:
                    continue
                own = {camera.camera_id: camera for camera in source_of(captures, frame_id)[0].cameras}
                for view in torch.nonzero(batch.view_present[row])[:, 0].tolist():
                    camera_id = shard_set.cameras[int(batch.camera_index[row, view])].camera_id
                    seen[frame_id, camera_id] += 1
                    expected = own[camera_id].intrinsics.astype(np.float32)
                    np.testing.assert_array_equal(batch.cameras.intrinsics[row, view], expected)
    missing = set(shard_set.manifest.missing_views())
    expected = {(frame, camera) for frame in shard_set.frame_ids("train") for camera in ids} - missing
    assert set(seen) == expected
    assert set(seen.values()) == {1}


def test_a_segment_that_is_drawn_is_held_out_in_every_capture(shard_set: ShardSet):
    splits = shard_set.manifest.splits
    together = [segment for segments in splits.values() for segment in segments]
    assert len(together) == len(set(together)) == 8
    for segments in splits.values():
        names = Counter(segment.split("@")[0] for segment in segments)
        assert set(names.values()) == {2}


def test_patterns_address_a_segment_in_all_captures_or_in_one(captures: dict[str, Capture]):
    first, second = list(captures["a"].segments)[:2]
    splits = SplitConfig(test_segments=(first, f"{second}@b"), val_fraction=0, test_camera_count=0)
    plan = plan_shards(captures, CONFIG.model_copy(update={"splits": splits}))
    assert plan.splits["test"] == sorted([f"{first}@a", f"{first}@b", f"{second}@b"])
    assert f"{second}@a" in plan.splits["train"]
    for pattern in ("*@c", f"{first}@"):
        wrong = SplitConfig(test_segments=(pattern,))
        with pytest.raises(ConfigError, match=r"splits\.test_segments: .* fits none of"):
            plan_shards(captures, CONFIG.model_copy(update={"splits": wrong}))


def test_a_whole_capture_can_be_the_test(captures: dict[str, Capture], tmp_path: Path):
    config = CONFIG.model_copy(update={"splits": SplitConfig(test_segments=("*@b",), test_camera_count=0)})
    manifest = write_shards(captures, config.model_copy(update={"frames_per_shard": None}), str(tmp_path))
    assert {frame.split("@")[1][0] for frame in ShardSet.open(tmp_path).frame_ids("test")} == {"b"}
    assert all(segment.endswith("@a") for segment in (*manifest.splits["train"], *manifest.splits["val"]))


def test_a_set_of_several_is_verified_and_still_plain_webdataset(shards: Path, shard_set: ShardSet):
    report = verify_shards(str(shards))
    assert report.bad == ()
    assert report.missing_views[ABSENT] >= 12
    names = [str(shards / shard.name) for shard in shard_set.manifest.shards]
    samples = webdataset.WebDataset(names, shardshuffle=False)
    keys = {sample["__key__"]: json.loads(sample["frame.json"]) for sample in samples}
    assert set(keys) == set(all_frames(shard_set))
    assert all(key == f"{facts['segment']}/{facts['frame']}" for key, facts in keys.items())


def test_another_capture_added_later_is_another_plan(captures: dict[str, Capture], tmp_path: Path):
    write_shards(captures["a"], CONFIG, str(tmp_path))
    with pytest.raises(ConfigError, match="of another recipe or capture"):
        write_shards(captures, CONFIG, str(tmp_path))


def test_one_capture_has_no_name_however_it_is_given(captures: dict[str, Capture]):
    alone = plan_shards(captures["a"], CONFIG)
    assert plan_shards({"a": captures["a"].uri}, CONFIG).fingerprint == alone.fingerprint
    assert not any("@" in segment for segments in alone.splits.values() for segment in segments)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "b", "captures: .*one stands there twice"),
        ("name", "../x", "captures: .*are no names"),
        ("name", None, "captures: .*are no names"),
        ("name", "0", "of none of the captures"),
        ("cameras", [], "one has no camera"),
        ("headset_cameras", [], "headset cameras differ"),
    ],
)
def test_a_manifest_whose_captures_do_not_fit_is_refused(
    shards: Path, tmp_path: Path, field: str, value: object, message: str
):
    document = read_manifest(shards)
    document["captures"][0][field] = value
    if field == "cameras":
        document["camera_ids"] = [camera["camera_id"] for camera in document["captures"][1]["cameras"]]
        document["test_camera_ids"] = []
        document["train_camera_ids"] = document["camera_ids"]
    write_manifest(tmp_path, document)
    with pytest.raises(ShardSetError, match=message):
        Manifest.load(str(tmp_path))
