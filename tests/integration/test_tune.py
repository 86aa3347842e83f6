"""Sweeps by Ray Tune: one that is killed in the middle and resumed, and what a second submission may change."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cluster.recipe import dump_recipe, load_recipe
from cluster.records.tracking import TrackingConfig, open_client
from cluster.scores.scene import context_of
from cluster.training.objective import Objective
from cluster.training.recipe import TrainRecipe
from cluster.tune import tune
from cluster.tuning.ledger import FINAL, RECORD_FILE, TRIALS_FOLDER, SweepError
from cluster.tuning.recipe import TuneRecipe
from lipflow.config import LossConfig
from lipflow.errors import ConfigError
from lipflow.model.avatar import Avatar
from lipflow.render.renderer import Renderer
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.loading.loader import ShardSet
from pipeline.sharding.shards import ShardConfig, write_shards
from tests.processes import kill_family

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

SPACE: dict[str, Any] = {
    "learning_rate": {"kind": "loguniform", "low": 3e-4, "high": 2e-2},
    "loss.latent_weight": {"kind": "loguniform", "low": 1e-3, "high": 1e-1},
    "loss.image_weight": {"kind": "loguniform", "low": 0.01, "high": 1.0},
    "avatar.latent_size": {"kind": "int", "low": 4, "high": 32, "log": True},
    "avatar.flow_steps": {"kind": "int", "low": 2, "high": 6},
    "avatar.flow_transform": {"kind": "choice", "values": ["affine", "spline"]},
    "avatar.residual": {"kind": "choice", "values": [False, True]},
    "avatar.method": {"kind": "choice", "values": ["lipflow", "conditional"]},
}
TRIALS = 16
TRIAL_STEPS = 96
# Enough frames, and pixels smooth enough, for a hundred steps to make a difference.
DOME = DomeConfig(
    cameras=6,
    image_size_hw=(48, 36),
    texture_size=32,
    segments=6,
    frames_per_segment=6,
    headset_image_size_hw=(16, 20),
    supersampling=2,
)


@pytest.fixture(scope="module")
def learnable_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a set of which avatars learn something within a trial."""
    root = tmp_path_factory.mktemp("learnable")
    write_dome(DOME, str(root / "capture"))
    write_shards(open_capture(str(root / "capture")), ShardConfig(frames_per_shard=6), str(root / "shards"))
    return str(root / "shards")


def _sweep(tiny_training, tracking: TrackingConfig, **changes: Any) -> TuneRecipe:
    base = tiny_training(tracking, steps=120, warmup_steps=4, workers=1, register_as=None, learning_rate=1e-3)
    # The dome's textures hardly change, so that an image error in units of their std would drown everything else.
    avatar = base.avatar.model_copy(update={"mean_scale": 1.0, "log_std_scale": 0.1})
    base = base.model_copy(update={"avatar": avatar, "loss": LossConfig(image_weight=0.05)})
    settings = {"trials": TRIALS, "trial_steps": TRIAL_STEPS, "grace_steps": 24, "reduction_factor": 2, "space": SPACE}
    return TuneRecipe(train=base, **(settings | changes))


def _environment(folder: Path) -> dict[str, str]:
    """Without the session's cluster: the command starts one of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"OMP_NUM_THREADS": "1", "HOME": str(folder), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}


def _records(out: Path) -> dict[int, dict[str, Any]]:
    found = {}
    for path in sorted((out / TRIALS_FOLDER).glob(f"*/{RECORD_FILE}")):
        found[int(path.parent.name)] = json.loads(path.read_text())
    return found


def _final(out: Path) -> dict[int, dict[str, Any]]:
    return {number: record for number, record in _records(out).items() if record["state"] in FINAL}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_sweep_that_is_killed_and_resumed_loses_and_doubles_no_trial(
    shards, learnable_shards: str, tiny_training, tmp_path: Path
):
    tracking = TrackingConfig(uri=shards.tracking.uri, experiment="sweep")
    out, recipe, log = tmp_path / "sweep", tmp_path / "sweep.yaml", tmp_path / "sweep.log"
    dump_recipe(_sweep(tiny_training, tracking), recipe)
    command = [sys.executable, "-m", "cluster.cli", "tune", learnable_shards, str(out), "--json"]
    with log.open("wb") as output:
        killed = subprocess.Popen(
            [*command, "--recipe", str(recipe)],
            stdout=output,
            stderr=output,
            env=_environment(tmp_path),
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 1500
            while time.monotonic() < deadline and killed.poll() is None and len(_final(out)) < TRIALS // 3:
                time.sleep(0.2)
        finally:
            kill_family(killed)
    before, files = _final(out), {}
    assert TRIALS // 3 <= len(before) < TRIALS, log.read_text()[-2000:]
    for number, record in before.items():
        if record["state"] == "completed":
            summary = out / TRIALS_FOLDER / f"{number:04d}" / "train.json"
            files[summary] = (summary.stat().st_mtime_ns, summary.read_bytes())
    assert not (out / "tune.json").exists()

    again = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, env=_environment(tmp_path), timeout=2400
    )
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    after = _records(out)

    # No trial is lost, doubled or run again.
    assert sorted(after) == list(range(TRIALS))
    assert all(record["state"] in FINAL for record in after.values())
    assert {number: after[number] for number in before} == before
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files} == files
    assert summary["resumed_trials"] >= len(before)
    states = Counter(record["state"] for record in after.values())
    assert (summary["completed"], summary["stopped"]) == (states["completed"], states["stopped"])
    assert states["stopped"] >= 4
    steps = [step for record in after.values() if record["state"] == "completed" for step, _ in record["reports"][-1:]]
    assert set(steps) == {TRIAL_STEPS}

    # The winner beats the base recipe at equal budget, by the base recipe's own loss.
    assert after[0]["state"] == "completed"
    assert summary["base_loss"] == after[0]["loss"]
    assert summary["best_loss"] < summary["base_loss"]
    best = load_recipe(TrainRecipe, str(out / "best_recipe.yaml"))
    assert best.loss.image_weight == after[summary["best_trial"]]["values"]["loss.image_weight"]
    assert best.validation_loss is not None
    assert best.validation_loss.image_weight == 0.05
    assert (best.steps, summary["avatar"]) == (120, f"file://{out}/best/avatar")

    # Every trial is one MLflow run below the sweep's, and none still counts as running.
    client = open_client(tracking)
    experiment = client.get_experiment_by_name("sweep")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == summary["run_id"]]
    assert Counter(run.data.tags.get("lipflow.trial") for run in below) == {
        **{str(number): 1 for number in range(TRIALS)},
        None: 1,  # the best trial's final training
    }
    assert all(run.info.status != "RUNNING" for run in runs)
    for run in below:
        if run.data.tags.get("lipflow.trial_state") == "stopped":
            assert run.info.status == "KILLED"
            assert run.data.tags["lipflow.stopped_by"].startswith("ASHA at step ")
    assert client.get_run(summary["run_id"]).info.status == "FINISHED"

    rows = list(csv.DictReader((out / "trials.csv").open()))
    assert [int(row["trial"]) for row in rows] == list(range(TRIALS))
    page = (out / "report.html").read_text()
    for heading in ("Settings and what came of them", "What matters", "Validation loss of all trials"):
        assert heading in page
    # Nothing is computed by a third submission.
    assert tune(learnable_shards, str(out), load_recipe(TuneRecipe, str(recipe))).seconds == summary["seconds"]
    print(json.dumps(summary, indent=2))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_of_which_every_trial_fails_names_the_first_failure(shards, tiny_training, tmp_path: Path):
    tracking = TrackingConfig(uri=shards.tracking.uri, experiment="failing")
    space = {"loss.min_posterior_std": {"kind": "uniform", "low": 1e3, "high": 1e4}}
    base = tiny_training(tracking, workers=1, loss={"min_posterior_std": 1e3})
    sweep = TuneRecipe(train=base, space=space, trials=2, trial_steps=6, grace_steps=3)
    with pytest.raises(SweepError, match=r"2 of 2 failed; the first, trial 0: PosteriorCollapseError: the encoder's"):
        tune(shards.uri, str(tmp_path / "sweep"), sweep)
    client = open_client(tracking)
    experiment = client.get_experiment_by_name("failing")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FAILED"}


def test_avatars_are_compared_by_one_yardstick_whatever_they_are_trained_with(shards, tiny_training):
    """A trial's own weights would make the one that weighs its errors least the best."""
    recipe = tiny_training(shards.tracking)
    shard_set = ShardSet.open(shards.uri)
    avatar = Avatar(recipe.avatar, context_of(shard_set)).eval()
    batches = [shard_set.frames(shard_set.frame_ids("val")[:1], shard_set.train_camera_ids[:2])]
    renderer = Renderer(shard_set.topology)

    def loss(**settings: Any) -> float:
        weights = LossConfig(image_weight=settings.pop("image_weight"))
        total, frames = Objective(avatar, renderer, weights, **settings).validate(batches)
        return total / frames

    yardstick = LossConfig(image_weight=1.0)
    assert loss(image_weight=0.01) < 0.5 * loss(image_weight=1.0)
    judged = [loss(image_weight=weight, validation_loss=yardstick) for weight in (0.01, 1.0, 3.0)]
    assert judged[0] == judged[1] == judged[2] == loss(image_weight=1.0)

    # Without drivers, an avatar of the same encoder and decoder is judged as this one's encoder alone.
    without = Avatar(recipe.avatar.model_copy(update={"method": "dam", "signals": None}), context_of(shard_set)).eval()
    shared = {name: value for name, value in avatar.state_dict().items() if name in without.state_dict()}
    without.load_state_dict(shared)
    encoder_alone = loss(image_weight=1.0, validation_signals=())
    assert encoder_alone == Objective(without, renderer, yardstick).validate(batches)[0]
    assert encoder_alone != loss(image_weight=1.0)


def test_a_sweep_is_not_continued_with_other_settings(shards, tiny_training, tmp_path: Path):
    """Which is found before anything is started."""
    sweep = _sweep(tiny_training, shards.tracking)
    dump_recipe(sweep, tmp_path / "recipe.yaml")
    facts = {"run_id": "0", "shards_digest": shards.summary.digest}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    wider = SPACE | {"learning_rate": {"kind": "loguniform", "low": 3e-4, "high": 1e-1}}
    for changes, said in (
        ({"space": wider}, r"another space.learning_rate.high"),
        ({"grace_steps": 12}, r"another grace_steps"),
        ({"workers": 2, "max_concurrent_trials": 1, "trials": 99}, r"another workers: give the same"),
    ):
        with pytest.raises(ConfigError, match=said):
            tune(shards.uri, str(tmp_path), _sweep(tiny_training, shards.tracking, **changes))
    (tmp_path / "run.json").write_text(json.dumps(facts | {"shards_digest": "another"}))
    with pytest.raises(ConfigError, match="another shard set"):
        tune(shards.uri, str(tmp_path), sweep)
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / "tune.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"another number of trials \(16, and it is finished\)"):
        tune(shards.uri, str(tmp_path), _sweep(tiny_training, shards.tracking, trials=17))
