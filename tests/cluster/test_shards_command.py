"""``lipflow shards``: its tables, its JSON, the files it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster import command
from cluster.shards import shards_command
from pipeline.captures.opening import open_capture
from pipeline.checks.shard_listing import list_shards
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.loading.shardset import ShardSet
from pipeline.manifest import Manifest
from pipeline.sharding.shards import ShardConfig, write_shards

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG images, so that a decoded view differs from the stored bytes."""
    folder = tmp_path_factory.mktemp("shards-command")
    config = DomeConfig(
        cameras=2,
        image_size_hw=(24, 18),
        texture_size=32,
        segments=3,
        frames_per_segment=2,
        headset_image_size_hw=(8, 8),
        supersampling=1,
    )
    write_dome(config, str(folder / "dome"))
    write_shards(open_capture(folder / "dome"), ShardConfig(codec="jpeg"), str(folder / "set"))
    return folder / "set"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("ls", SHARDS)``: exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shards", *arguments])
        monkeypatch.setenv("LIPFLOW_DEBUG", "0")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command.run(shards_command)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]


def test_ls_is_one_row_a_shard_and_the_totals(run: Run, shards: Path):
    code, out, err = run("ls", str(shards))
    manifest = Manifest.load(str(shards))
    assert (code, err) == (0, "")
    *listed, totals = rows(out)
    assert [(row[0], row[1], row[2], row[-1]) for row in listed] == [
        (shard.name, shard.split, str(len(shard.samples)), shard.sha256[:12]) for shard in manifest.shards
    ]
    assert totals[0] == f"{len(manifest.shards)} shards"
    assert totals[2:4] == ["6", "12"]
    assert out.splitlines()[-1] == f"file://{shards}: digest {manifest.digest}"


def test_the_captures_of_a_set_of_several_are_listed(shards: Path, run: Run, tmp_path: Path):
    dome = shards.parent / "dome"
    shutil.copytree(dome, tmp_path / "second")
    captures = {"one": str(dome), "two": str(tmp_path / "second")}
    manifest = write_shards(captures, ShardConfig(codec="jpeg"), str(tmp_path / "set"))
    code, out, _ = run("ls", str(tmp_path / "set"))
    assert code == 0
    assert "capture" in out.splitlines()[1]
    *listed, totals = rows(out)
    assert [(row[0], row[2]) for row in listed] == [
        (shard.name, manifest.capture_of(shard.samples[0].frame_id).name) for shard in manifest.shards
    ]
    assert {row[2] for row in listed} == {"one", "two"}
    assert totals[3] == "12"
    frame_id = manifest.shards[0].samples[0].frame_id
    code, out, _ = run("show", str(tmp_path / "set"), frame_id, "--json")
    assert code == 0
    assert json.loads(out)["facts"]["segment"] == frame_id.split("/")[0] == f"{frame_id.split('@')[0]}@one"


def test_ls_frames_is_one_row_a_frame_too(run: Run, shards: Path):
    code, out, _ = run("ls", str(shards), "--frames")
    frames = list_shards(str(shards)).frames
    assert code == 0
    assert [row[0] for row in rows(out)][-len(frames) :] == [frame.frame_id for frame in frames]


def test_json_is_one_document(run: Run, shards: Path):
    code, out, err = run("ls", str(shards), "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["totals"]["frames"] == 6
    assert document["totals"]["size_bytes"] == sum(shard["size_bytes"] for shard in document["shards"])
    assert "frames" not in document
    frame = json.loads(run("ls", str(shards), "--frames", "--json")[1])["frames"][0]
    shown = json.loads(run("show", str(shards), frame["frame_id"], "--json")[1])
    assert shown["frame"] == frame
    assert len(shown["members"]) == frame["members"]


def test_show_tells_members_facts_and_head_pose(run: Run, shards: Path):
    frame_id = list_shards(str(shards)).frames[0].frame_id
    code, out, _ = run("show", str(shards), frame_id)
    assert code == 0
    names = [row[0] for row in rows(out)]
    assert {f"{frame_id}.frame.json", f"{frame_id}.verts.npy.zst", f"{frame_id}.400001.image.jpg"} <= set(names)
    shown = json.loads(run("show", str(shards), frame_id, "--json")[1])["facts"]
    start = next(place for place, line in enumerate(out.splitlines()) if line.startswith("world_from_head"))
    printed = [[float(word) for word in line.split()[-4:]] for line in out.splitlines()[start : start + 3]]
    np.testing.assert_allclose(printed, shown["world_from_head"], rtol=1e-4)


def test_show_takes_a_view_out_as_stored_or_decoded(run: Run, shards: Path, tmp_path: Path):
    frame_id = list_shards(str(shards)).frames[0].frame_id
    expected = ShardSet.open(shards).frames([frame_id], ["400002"]).images[0, 0].permute(1, 2, 0).numpy()
    code, out, _ = run("show", str(shards), frame_id, "--camera", "400002")
    assert code == 0
    assert out.startswith(f"{frame_id}.400002.image.jpg: 18x24 pixels, ")
    for name in ("view.jpg", "view.png"):
        code, out, _ = run("show", str(shards), frame_id, "--camera", "400002", "--out", str(tmp_path / name))
        assert code == 0
        assert out.endswith(f"; written to file://{tmp_path / name}\n")
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), expected)
    members = json.loads(run("show", str(shards), frame_id, "--json")[1])["members"]
    stored = next(member["size_bytes"] for member in members if member["name"].endswith("400002.image.jpg"))
    assert (tmp_path / "view.jpg").stat().st_size == stored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "SET"], "expected `shards ls SHARDS` or `shards show SHARDS SEG/FRAME`"),
        (["ls", "SET", "EXP_smile/000000"], "shards ls takes no frame"),
        (["ls", "SET", "--camera", "400001"], "shards ls takes no --camera"),
        (["show", "SET"], "shards show needs a frame"),
        (["show", "SET", "EXP_smile/000000", "--frames"], "--frames goes with shards ls"),
        (["show", "SET", "EXP_smile/000000", "--out", "x.png"], "needs --camera ID"),
        (["show", "SET", "EXP_smile/999999"], "no frame 'EXP_smile/999999'"),
        (["show", "SET", "FRAME", "--camera", "9"], "no camera '9'"),
        (["show", "SET", "FRAME", "--camera", "400001", "--out", "x.gif"], "as it is stored (.jpg) or as .png"),
        (["ls", "/nowhere"], "no manifest.json, so no shard set"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(run: Run, shards: Path, arguments: list[str], message: str):
    given = {"SET": str(shards), "FRAME": list_shards(str(shards)).frames[0].frame_id}
    code, out, err = run(*(given.get(argument, argument) for argument in arguments))
    assert (code, out) == (command.EXIT_USAGE, "")
    assert err.startswith("lipflow: error: ")
    assert message in err
    assert err.count("\n") == 1
