"""The sharding job: its forecast, what it says was kept and written, and how it tells its progress."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import ray

from cluster import cli, shard
from cluster.records.tracking import TrackingConfig
from cluster.shard import ShardRecipe, forecast
from lipflow.errors import ConfigError
from pipeline.corrupt_files import CorruptFilesError
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.sharding.shards import ShardConfig, finish_shard, open_for_sharding, plan_shards, write_shards
from pipeline.sharding.splits import SplitConfig

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

CONFIG = ShardConfig(frames_per_shard=2, splits=SplitConfig(test_camera_count=1))


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("capture")
    config = DomeConfig(
        cameras=4, image_size_hw=(48, 36), texture_size=32, segments=4, frames_per_segment=3, supersampling=1
    )
    write_dome(config, str(folder))
    return str(folder)


@pytest.fixture
def recipe(tracking_config: TrackingConfig) -> ShardRecipe:
    return ShardRecipe(shard=CONFIG, tracking=tracking_config)


def test_a_forecast_is_what_the_job_then_writes(capture: str, recipe: ShardRecipe, tmp_path: Path):
    """Sizes are told from three of twelve frames: measured, 5 % off, for these small pictures."""
    out, on_ray = tmp_path / "out", ray.is_initialized()
    planned = forecast(capture, str(out), recipe)
    assert not out.exists()
    assert ray.is_initialized() == on_ray
    manifest = write_shards(capture, CONFIG, str(out))
    assert planned.shards_planned == len(manifest.shards)
    assert planned.shards_present == 0
    frames = {split: sum(len(s.samples) for s in manifest.shards if s.split == split) for split in manifest.splits}
    assert planned.frames == frames
    assert planned.held_out_cameras == manifest.test_camera_ids != ()
    written = sum(record.size_bytes for record in manifest.shards)
    # The end of each tar and its padding to 10 KiB belong to no frame.
    assert planned.size_bytes == pytest.approx(written, rel=0.1, abs=10240 * len(manifest.shards))
    assert planned.cpu_hours is not None
    assert 0 < planned.cpu_hours < 1
    assert forecast(capture, str(out), recipe).shards_present == len(manifest.shards)


def test_a_forecast_tells_what_the_job_would_refuse(capture: str, recipe: ShardRecipe, tmp_path: Path):
    write_shards(capture, CONFIG.model_copy(update={"seed": 3}), str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="of another recipe or capture"):
        forecast(capture, str(tmp_path), recipe)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_dry_run_on_the_command_line_writes_nothing(
    capture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = ["lipflow", "shard", capture, str(tmp_path / "out"), "--dry-run", "--set", "shard.frames_per_shard=5"]
    for extra in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*arguments, *extra])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        said = capsys.readouterr().out
        if extra:
            assert json.loads(said)["shards_planned"] == 4
        else:
            assert "4 shards of up to 5 frames (0 there already)" in said
            assert "CPU-hours; nothing written" in said
    assert not (tmp_path / "out").exists()


def test_progress_counts_kept_shards_apart_and_rates_only_what_was_written(
    capture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = [100.0]
    monkeypatch.setattr(shard.time, "monotonic", lambda: clock[0])
    opened = open_for_sharding(capture, CONFIG)
    plan = plan_shards(opened, CONFIG)
    (stored,) = plan.sources.captures
    first, second = plan.shards[:2]
    finish_shard(stored, CONFIG, first, str(tmp_path))
    progress = shard._Progress(plan)
    assert progress.note() == "none written yet"
    clock[0] += 2
    progress.receive(finish_shard(stored, CONFIG, first, str(tmp_path)))
    assert (progress.shards_kept, progress.note()) == (1, "1 kept, none written yet")
    clock[0] += 2
    outcome = finish_shard(stored, CONFIG, second, str(tmp_path))
    assert progress.receive(outcome) is outcome.record
    megabytes = outcome.record.size_bytes / 4 / 1e6
    # Two frames in four seconds; 8 of 12 are left.
    assert progress.note() == f"1 kept, 0.5 frames/s, {megabytes:.1f} MB/s, 0:00:16 left"
    faults = CorruptFilesError(capture, ())
    assert progress.receive(faults) is faults


def test_several_captures_on_the_command_line(
    capture: str,
    recipe: ShardRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Tasks run here, but as Ray would send them: pickled."""

    def map_here(function, arguments, *, receive, **_: object) -> list:
        return [receive(function(*pickle.loads(pickle.dumps(one)))) for one in arguments]

    monkeypatch.setattr(shard, "map_tasks", map_here)
    monkeypatch.setattr(shard, "ray_cluster", contextlib.nullcontext)
    other = tmp_path / "other"
    shutil.copytree(capture, other)
    arguments = ["shard", f"first={capture}", str(other), str(tmp_path / "out"), "--json"]
    arguments += ["--set", "shard.frames_per_shard=2", "--set", f"tracking.uri={recipe.tracking.uri}"]

    def run(*extra: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["lipflow", *arguments, *extra])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return json.loads(capsys.readouterr().out)

    planned = run("--dry-run")
    assert not (tmp_path / "out").exists()
    done = run()
    assert planned["captures"] == done["captures"] == [f"file://{capture}", f"file://{other}"]
    assert planned["frames"] == done["frames"]
    assert sum(done["frames"].values()) == 2 * 4 * 3
    assert planned["shards_planned"] == done["shards_written"]
    assert planned["size_bytes"] == pytest.approx(done["size_bytes"], rel=0.1, abs=10240 * done["shards_written"])
    assert run()["written"] is False
    by_hand = write_shards(
        {"other": str(other), "first": capture}, ShardConfig(frames_per_shard=2), str(tmp_path / "b")
    )
    assert by_hand.digest == done["digest"]
    assert {segment.split("@")[1] for segments in by_hand.splits.values() for segment in segments} == {"first", "other"}
