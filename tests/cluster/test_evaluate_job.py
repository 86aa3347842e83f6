"""What the job is called with, what it refuses before it scores, and which frames calibrate which cameras."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from cluster import evaluate as job
from cluster.compare import CompareRecipe, compare
from cluster.evaluate import EvaluateRecipe, calibration_segments, evaluate_models
from cluster.reports.evaluation_report import compared
from cluster.scores.scene import context_of
from cluster.scores.scoring import calibrate_colors, held_out_cameras, scored_cameras
from lipflow.checkpoint import save_avatar
from lipflow.config import AvatarConfig, RenderConfig
from lipflow.errors import ConfigError
from lipflow.model.avatar import Avatar
from pipeline.captures.opening import open_capture
from pipeline.loading.loader import ShardSet
from pipeline.sharding.shards import write_shards
from pipeline.sharding.splits import SplitConfig
from tests.cluster.score_sheets import constant, scores_of, sheet_of
from tests.pipeline.sessions import ABSENT, CONFIG, write_sessions


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Two sessions in one set; the held-out camera is the one that session ``b`` lacks."""
    root = tmp_path_factory.mktemp("sessions")
    captures = {name: open_capture(folder) for name, folder in sorted(write_sessions(root).items(), reverse=True)}
    splits = SplitConfig(test_cameras=(ABSENT,))
    write_shards(captures, CONFIG.model_copy(update={"splits": splits}), str(root / "set"))
    return ShardSet.open(str(root / "set"))


@pytest.fixture(scope="module")
def avatar(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Untrained."""
    folder = tmp_path_factory.mktemp("avatar")
    save_avatar(Avatar(AvatarConfig.small(texture_size=32, method="dam"), context_of(shards)), folder)
    return str(folder)


def test_a_camera_that_one_session_lacks_is_calibrated_on_the_other(shards: ShardSet, avatar: str):
    segments = calibration_segments(shards, EvaluateRecipe())
    assert {segment.split("@")[1] for segment in segments} == {"a", "b"}
    train = shards.frame_ids("train")
    frames = {name[-1]: [frame for frame in train if frame.split("/")[0] == name][:2] for name in segments}
    assert held_out_cameras(shards) == [ABSENT]
    assert calibrate_colors(avatar, shards.uri, RenderConfig(), frames["b"]) == {}
    both = calibrate_colors(avatar, shards.uri, RenderConfig(), frames["b"] + frames["a"])
    assert set(both) == {ABSENT}
    # What the other session adds are absent views, which must not move the solution: measured to 3e-5 levels.
    alone = calibrate_colors(avatar, shards.uri, RenderConfig(), frames["a"])
    np.testing.assert_allclose(both[ABSENT], alone[ABSENT], atol=1e-3)


def test_one_calibration_segment_can_be_asked_for_and_must_be_a_training_one(shards: ShardSet):
    segment = shards.frame_ids("train")[-1].split("/")[0]
    assert calibration_segments(shards, EvaluateRecipe(calibration_segment=segment)) == (segment,)
    held_out = shards.frame_ids("test")[0].split("/")[0]
    with pytest.raises(ConfigError, match=f"{held_out!r} is no training segment"):
        calibration_segments(shards, EvaluateRecipe(calibration_segment=held_out))


def test_the_frontal_camera_is_never_scored(shards: ShardSet):
    assert shards.frontal_camera_id in shards.train_camera_ids
    assert shards.frontal_camera_id not in scored_cameras(shards, None)


def test_models_are_named_taken_apart_from_shards_and_given_a_protocol(monkeypatch: pytest.MonkeyPatch):
    calls = []
    sheet = sheet_of("a", scores_of("hmc", 0, constant(10.0), constant(1.0)))

    def evaluated(*arguments):
        calls.append(arguments)
        return compared([sheet], None, "auto", None), []

    monkeypatch.setattr(job, "evaluate_models", evaluated)
    app = typer.Typer()
    app.command()(job.evaluate_command)
    arguments = [
        "a=runs:/1",
        "b",
        "s3://x/shards",
        "--out",
        "o",
        "--protocol",
        "lipflow",
        "--set",
        "fit_iterations=[0,3]",
    ]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    ((models, shards, out, recipe),) = calls
    assert (models, shards, out) == (["a=runs:/1", "b"], "s3://x/shards", "o")
    assert (recipe.protocol, recipe.scored_iterations) == ("lipflow", (0, 3))
    assert "Driven by one signal" in shown.output


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        (["runs/1/avatar", "other/1/avatar"], {}, "two are called '1'"),
        (["models:/lipflow/3", "lipflow-3=x"], {}, "two are called 'lipflow-3'"),
        (["a=x", "b=y"], {"baseline": "c"}, "'c' is none of the models"),
    ],
)
def test_models_of_one_name_are_seeds_only_if_they_were_named(models, settings, message, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        evaluate_models(models, "shards", str(tmp_path), EvaluateRecipe(**settings))


def test_evaluations_of_one_name_are_seeds_only_if_they_were_named(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).mkdir()
        sheet = sheet_of("lipflow", scores_of("hmc", 0, constant(10.0), constant(1.0)))
        (tmp_path / name / "scores.json").write_text(sheet.to_json())
    with pytest.raises(ConfigError, match="two are called 'lipflow'"):
        compare([f"{tmp_path}/a", f"{tmp_path}/b"], str(tmp_path / "out"), CompareRecipe())
    found = compare([f"x={tmp_path}/a", f"x={tmp_path}/b"], str(tmp_path / "out"), CompareRecipe())
    assert [len(table.rows) for table in found.tables] == [1, 1]
