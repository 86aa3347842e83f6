"""Which captures may be in one shard set, what they are called, and the frontal camera that they share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lipflow.errors import ConfigError
from pipeline.capture import Capture
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import write_dome
from pipeline.sharding.shards import plan_shards
from pipeline.sharding.sources import named_captures, open_for_sharding
from pipeline.sharding.splits import SplitConfig
from tests.pipeline.sessions import ABSENT, CONFIG, DOME, write_sessions


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two sessions. Not to be changed."""
    return write_sessions(tmp_path_factory.mktemp("sessions"))


@pytest.fixture(scope="module")
def captures(folders: dict[str, Path]) -> dict[str, Capture]:
    return {name: open_capture(folder) for name, folder in folders.items()}


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
