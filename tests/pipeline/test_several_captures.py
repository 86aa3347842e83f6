"""Several captures in one shard set: each frame keeps the calibration of its own capture."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from lipflow.errors import ConfigError, ShardSetError
from lipflow.render.camera import compose
from pipeline.capture import Capture
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.frames import read_mesh_and_texture
from pipeline.loader import PADDING_FRAME_ID, LoaderConfig, ShardLoader
from pipeline.manifest import Manifest
from pipeline.shard_listing import list_shards, show_frame
from pipeline.shard_sources import named_captures, open_for_sharding
from pipeline.shard_verification import verify_shards
from pipeline.shards import ShardConfig, plan_shards, write_shard, write_shards
from pipeline.shardset import ShardSet
from pipeline.splits import SplitConfig

DOME = DomeConfig(
    cameras=5,
    image_size_hw=(32, 24),
    texture_size=32,
    segments=4,
    frames_per_segment=2,
    missing_fraction=0.05,
    headset_image_size_hw=(8, 10),
    supersampling=1,
)
ABSENT = "400005"
"""The camera that session B lacks."""
CONFIG = ShardConfig(frames_per_shard=2, splits=SplitConfig(test_camera_count=1))


def recalibrate(folder: Path) -> None:
    """Another focal length and another place for every camera, and one camera less: as after a rebuild of the dome."""
    blocks = [block.splitlines() for block in (folder / "KRT").read_text().strip().split("\n\n")]
    written = []
    for block in blocks:
        if block[0].strip() == ABSENT:
            continue
        rows = [[float(number) for number in line.split()] for line in block[1:]]
        rows[0][0] *= 1.0625
        for row in rows[-3:]:
            row[3] += 7.5
        written.append("\n".join([block[0], *(" ".join(f"{number!r}" for number in row) for row in rows)]))
    (folder / "KRT").write_text("\n\n".join(written) + "\n\n")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two sessions of one face: other head motion, another calibration, one camera less. Not to be changed."""
    root = tmp_path_factory.mktemp("sessions")
    write_dome(DOME, str(root / "a"))
    write_dome(DOME.model_copy(update={"head_translation_mm": 9.0, "frames_per_segment": 3}), str(root / "b"))
    recalibrate(root / "b")
    return {"a": root / "a", "b": root / "b"}


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
    """Against two passes in float64 over the frames themselves; measured: equal to 1e-7 of the values."""
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


def changed_dome(folder: Path, **changes: object) -> Path:
    write_dome(DOME.model_copy(update={"segments": 3, "frames_per_segment": 1, **changes}), str(folder))
    return folder


@pytest.mark.parametrize(
    ("changes", "remedy", "settings"),
    [
        ({"texture_size": 64}, r"texture sizes differ \(32, 64\); set shard\.texture_size", {"texture_size": 32}),
        (
            {"image_size_hw": (48, 36)},
            r"image sizes \(height, width\) differ \(\(32, 24\), \(48, 36\)\); set shard\.image_size_hw",
            {"image_size_hw": (32, 24)},
        ),
        ({"headset_image_size_hw": (16, 20)}, "headset cameras differ", None),
    ],
)
def test_sizes_that_differ_are_refused_unless_one_is_chosen(
    folders: dict[str, Path], tmp_path: Path, changes: dict, remedy: str, settings: dict | None
):
    named = {"a": str(folders["a"]), "z": str(changed_dome(tmp_path / "z", **changes))}
    with pytest.raises(ConfigError, match=rf"{folders['a']} and file://{tmp_path}/z: {remedy}"):
        open_for_sharding(named, CONFIG)
    if settings is not None:
        config = CONFIG.model_copy(update=settings)
        shapes = {stored.settings.image_size_hw for stored in open_for_sharding(named, config).captures}
        assert shapes == {(32, 24)}


def _one_face_less(folder: Path) -> None:
    for mesh in folder.glob("tracked_mesh/*/*.obj"):
        lines = mesh.read_text().splitlines()
        last = max(index for index, line in enumerate(lines) if line.startswith("f "))
        mesh.write_text("\n".join(lines[:last] + lines[last + 1 :]) + "\n")


def _moved_uvs(folder: Path) -> None:
    for mesh in folder.glob("tracked_mesh/*/*.obj"):
        mesh.write_text(mesh.read_text().replace("\nvt 0.", "\nvt 0.0"))


@pytest.mark.parametrize(("damage", "what"), [(_one_face_less, "faces"), (_moved_uvs, "uvs")])
def test_other_topologies_are_refused(
    folders: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None], what: str
):
    other = Path(shutil.copytree(folders["b"], tmp_path / "b"))
    damage(other)
    with pytest.raises(
        ConfigError, match=rf"a and file://{other}: {what} of the topologies differ .*sets of their own"
    ):
        open_for_sharding({"a": str(folders["a"]), "b": str(other)}, CONFIG)


def test_the_captures_own_statistics_are_refused_for_several(captures: dict[str, Capture]):
    with pytest.raises(ConfigError, match=r"statistics=capture takes one .* 2 captures .*statistics=recompute"):
        plan_shards(captures, CONFIG.model_copy(update={"statistics": "capture"}))


def test_a_frontal_camera_that_one_capture_lacks_is_refused(captures: dict[str, Capture]):
    driving = CONFIG.driving.model_copy(update={"frontal_camera": ABSENT})
    with pytest.raises(ConfigError, match=rf"/b: has no camera '{ABSENT}', .*set shard\.driving\.frontal_camera"):
        plan_shards(captures, CONFIG.model_copy(update={"driving": driving}))


@pytest.fixture
def bare(folders: dict[str, Path], tmp_path: Path) -> dict[str, str]:
    """The sessions without driving signals of their own, the face's landmarks beside them."""
    shutil.copy(folders["a"] / "driving/landmarks.json", tmp_path / "landmarks.json")
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("driving"))
    return {name: str(tmp_path / name) for name in folders}


def test_a_frontal_camera_that_is_looked_for_is_one_that_all_captures_have(bare: dict[str, str], tmp_path: Path):
    """The other one of the pair is taken away: each capture alone would choose another frontal camera."""
    driving = CONFIG.driving.model_copy(update={"landmarks": str(tmp_path / "landmarks.json")})
    config = CONFIG.model_copy(update={"driving": driving, "splits": SplitConfig(test_camera_count=0)})
    alone = plan_shards(bare["a"], config).sources.frontal_camera_id
    krt = Path(bare["b"], "KRT")
    blocks = krt.read_text().strip().split("\n\n")
    krt.write_text("\n\n".join(block for block in blocks if not block.startswith(str(alone))) + "\n\n")
    sources = open_for_sharding(bare, config)
    assert sources.frontal_camera_id != alone
    for stored in sources.captures:
        assert sources.frontal_camera_id in stored.place.camera_ids
        # what a worker opens is the same capture
        again = stored.place.open()
        assert again.capture.frontal_camera_id == sources.frontal_camera_id
        for camera, other in zip(again.capture.headset_cameras, stored.capture.headset_cameras, strict=True):
            np.testing.assert_array_equal(camera.cam_from_world, other.cam_from_world)


def test_frontal_cameras_that_differ_are_refused_and_one_may_be_chosen(folders: dict[str, Path], tmp_path: Path):
    other = Path(shutil.copytree(folders["b"], tmp_path / "b"))
    declared = open_capture(folders["a"]).frontal_camera_id
    another = next(c.camera_id for c in open_capture(other).cameras if c.camera_id != declared)
    frontal = other / "driving/frontal.json"
    frontal.write_text(frontal.read_text().replace(str(declared), another))
    named = {"a": str(folders["a"]), "b": str(other)}
    with pytest.raises(ConfigError, match=rf"frontal cameras, {declared} and {another}; set shard\.driving\.frontal"):
        open_for_sharding(named, CONFIG)
    driving = CONFIG.driving.model_copy(update={"frontal_camera": declared})
    assert open_for_sharding(named, CONFIG.model_copy(update={"driving": driving})).frontal_camera_id == declared


def test_a_capture_without_training_cameras_is_refused(bare: dict[str, str]):
    splits = SplitConfig(train_cameras=(ABSENT,), test_cameras=("40000[1-4]",))
    driving = CONFIG.driving.model_copy(update={"render": "never"})
    with pytest.raises(ConfigError, match=rf"/b: has none of the training cameras \({ABSENT}"):
        plan_shards(bare, CONFIG.model_copy(update={"splits": splits, "driving": driving}))


def test_names_come_from_addresses_or_are_given():
    assert named_captures(["x=y"]) == "x=y"
    assert named_captures(["/data/one/", "s3://b/two"]) == {"one": "/data/one/", "two": "s3://b/two"}
    assert named_captures(["v1=/data/x", "/data/run=3/y"]) == {"v1": "/data/x", "y": "/data/run=3/y"}
    with pytest.raises(ConfigError, match=r"/one/x and /two/x are both called 'x'; give NAME=URI"):
        named_captures(["/one/x", "/two/x"])
    with pytest.raises(ConfigError, match=r"'a@b' cannot name a capture .*give NAME=/one/a@b"):
        named_captures(["/one/a@b", "/two/x"])
    with pytest.raises(ConfigError, match="no capture is named"):
        named_captures([])


def test_names_that_are_unsafe_and_captures_given_twice_are_refused(folders: dict[str, Path]):
    a, b = str(folders["a"]), str(folders["b"])
    for name in ("..", "x/y", "x@y", "*", ""):
        with pytest.raises(ConfigError, match="cannot name a capture"):
            open_for_sharding({"a": a, name: b}, CONFIG)
    with pytest.raises(ConfigError, match=r"is given twice, as 'one' and 'two'"):
        open_for_sharding({"one": a, "two": a}, CONFIG)


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
    document = json.loads((shards / "manifest.json").read_text())
    document["captures"][0][field] = value
    if field == "cameras":
        document["camera_ids"] = [camera["camera_id"] for camera in document["captures"][1]["cameras"]]
        document["test_camera_ids"] = []
        document["train_camera_ids"] = document["camera_ids"]
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ShardSetError, match=message):
        Manifest.load(str(tmp_path))
