"""``lipflow verify``: its exit codes, its table, its JSON, shard sets, and the same report with and without Ray."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import ray

from cluster import command, verify
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.sharding.shards import ShardConfig, write_shards

DOME = DomeConfig(
    cameras=4,
    image_size_hw=(24, 18),
    texture_size=32,
    segments=4,
    frames_per_segment=3,
    missing_fraction=0.05,
    headset_image_size_hw=(8, 8),
    supersampling=1,
)
IMAGE, MESH = "images/EXP_smile/400003/000001.png", "tracked_mesh/EXP_smile/000002.bin"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_dome(DOME, str(folder))
    return folder


@pytest.fixture(scope="module")
def bad(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a truncated image and a mesh of one vertex."""
    folder = Path(shutil.copytree(good, tmp_path_factory.mktemp("bad") / "dome"))
    os.truncate(folder / IMAGE, 100)
    os.truncate(folder / MESH, 12)
    return folder


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """``called(URI, ...)``: exit code, standard output and standard error of the command; it must not start Ray."""

    def call(*arguments: str) -> tuple[int, str, str]:
        def started(*_args, **_kwargs):
            raise AssertionError("Ray was started for a small capture")

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", started)
        monkeypatch.setattr(sys, "argv", ["verify", *arguments])
        monkeypatch.setenv("LIPFLOW_DEBUG", "0")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command.run(verify.verify_command)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def test_a_good_capture_exits_with_0(called, good: Path):
    code, out, err = called(str(good))
    assert code == 0
    assert out.startswith(f"file://{good}: multiface, ")
    assert " 0 bad" in out
    assert out.count("\n") == 1
    assert "bad file" not in err


def test_a_bad_capture_exits_with_1_and_a_table_that_names_the_files(called, bad: Path):
    code, out, err = called(str(bad))
    assert code == command.EXIT_BAD
    assert " 2 bad; " in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in err.splitlines() if "│" in line]
    faults = {row[0]: (row[1], row[2]) for row in rows if row[0].endswith((".png", ".bin"))}
    assert {path: fault for path, (fault, _) in faults.items()} == {IMAGE: "truncated-image", MESH: "vertex-count"}
    assert faults[MESH][1].startswith("1 vertices (float32 x 3), but the capture's topology has ")


def test_missing_views_are_shown_and_no_fault(called, good: Path):
    report = verify.verify(str(good))
    assert report.missing_views
    code, out, err = called(str(good))
    assert code == 0
    assert f"{sum(report.missing_views.values())} views missing" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in err.splitlines() if "│" in line]
    shown = {row[1]: int(row[2]) for row in rows}
    assert shown == report.missing_views | report.missing_views_by_segment | report.missing_headset_views


def test_json_is_alone_on_standard_output(called, bad: Path):
    code, out, _ = called(str(bad), "--json")
    assert code == command.EXIT_BAD
    document = json.loads(out)
    assert document == {"good": False} | json.loads(json.dumps(asdict(verify.verify(str(bad)))))
    assert [(entry["path"], entry["fault"]) for entry in document["bad"]] == [
        (f"file://{bad}/{IMAGE}", "truncated-image"),
        (f"file://{bad}/{MESH}", "vertex-count"),
    ]


def test_a_calibration_that_cannot_be_used_exits_with_1_and_says_that_the_rest_was_not_checked(
    called, good: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(good, tmp_path / "dome"))
    krt = (folder / "KRT").read_text()
    (folder / "KRT").write_text(krt + "\n" + krt)
    code, out, err = called(str(folder))
    assert code == command.EXIT_BAD
    assert " 1 bad; the rest cannot be checked before that is repaired" in out
    assert "duplicate-camera" in err


def test_no_capture_exits_with_2_and_one_line(called, tmp_path: Path):
    code, out, err = called(str(tmp_path))
    assert (code, out) == (command.EXIT_USAGE, "")
    assert err.startswith(f"lipflow: error: file://{tmp_path}: not a capture")
    assert err.count("\n") == 1


def test_long_tables_are_cut_and_say_so(called, bad: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "_ROWS_SHOWN", 1)
    _, out, err = called(str(bad))
    assert " 2 bad" in out
    assert IMAGE in err
    assert MESH not in err
    assert "1 more; --json lists them all" in err


def test_ray_gives_the_same_report(ray_session, bad: Path, monkeypatch: pytest.MonkeyPatch):
    in_process = verify.verify(str(bad))
    monkeypatch.setattr(verify, "IN_PROCESS_VIEWS", 0)
    assert verify.verify(str(bad)) == in_process
    assert len(in_process.bad) == 2


def test_a_shard_set_is_told_by_its_manifest(called, good: Path, tmp_path: Path):
    write_shards(open_capture(good), ShardConfig(frames_per_shard=5), str(tmp_path))
    code, out, err = called(str(tmp_path))
    assert code == 0
    assert out.startswith(f"file://{tmp_path}: shards, ")
    shard = next(tmp_path.glob("train-*.tar"))
    os.truncate(shard, shard.stat().st_size // 2)
    code, out, err = called(str(tmp_path))
    assert code == command.EXIT_BAD
    assert "shard-digest" in err
    assert shard.name in err


def test_ray_gives_the_same_report_of_a_shard_set(ray_session, good: Path, tmp_path: Path, monkeypatch):
    write_shards(open_capture(good), ShardConfig(frames_per_shard=5), str(tmp_path))
    shard = next(tmp_path.glob("train-*.tar"))
    os.truncate(shard, shard.stat().st_size // 2)
    in_process = verify.verify(str(tmp_path))
    monkeypatch.setattr(verify, "IN_PROCESS_BYTES", 0)
    assert verify.verify(str(tmp_path)) == in_process
    assert not in_process.good
