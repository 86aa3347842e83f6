"""Every job under ``ray job submit``, on a cluster with token authentication."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.recipe import dump_recipe
from cluster.records.registry import find_version
from cluster.records.tracking import TrackingConfig, initialise, open_client
from pipeline import storage
from pipeline.loading.loader import ShardSet

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

RAY = str(Path(sys.executable).parent / "ray")


class Submitter:
    """Submits jobs to the session's cluster with the MLflow store of this test; a job's id is its module's name."""

    def __init__(self, dashboard: str, tracking: TrackingConfig):
        self._dashboard = dashboard
        self._client = JobSubmissionClient(dashboard)
        variables = {"MLFLOW_TRACKING_URI": tracking.uri, "OMP_NUM_THREADS": "1"}
        self._runtime_env = json.dumps({"env_vars": variables})

    def submit(self, job_id: str, module: str, *arguments: str, wait: bool = False) -> int:
        """The exit code of ``ray job submit``, whose output is shown if the test fails."""
        command = [RAY, "job", "submit", "--address", self._dashboard, "--runtime-env-json", self._runtime_env]
        command += ["--submission-id", job_id, *([] if wait else ["--no-wait"])]
        command += ["--", sys.executable, "-m", module, *arguments]
        deadline = time.monotonic() + 60
        while True:
            submission = subprocess.run(command, capture_output=True, text=True, timeout=120)
            # A head that has only just come up on a busy machine asks to try again.
            if "No available agent" not in submission.stderr or time.monotonic() > deadline:
                print(submission.stdout, submission.stderr)
                return submission.returncode
            time.sleep(1.0)

    def finish(self, job_id: str) -> str:
        """The log of a job that must end with success."""
        deadline = time.monotonic() + 150
        while not (status := self._client.get_job_status(job_id)).is_terminal():
            assert time.monotonic() < deadline, self.log(job_id)
            time.sleep(0.2)
        assert status == JobStatus.SUCCEEDED, self.log(job_id)
        return self.log(job_id)

    def log(self, job_id: str) -> str:
        return self._client.get_job_logs(job_id)

    def run(self, module: str, *arguments: str) -> str:
        """The log of a job that must end with success."""
        assert self.submit(module, module, *arguments) == 0
        return self.finish(module)


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    config = TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('jobs')}/mlflow.db")
    initialise(config)
    return config


@pytest.fixture(scope="module")
def submitter(ray_head, tracking: TrackingConfig) -> Submitter:
    return Submitter(ray_head.dashboard, tracking)


def test_a_submission_without_the_token_is_refused(ray_head, tmp_path: Path):
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [RAY, "job", "submit", "--address", ray_head.dashboard, "--", "touch", str(tmp_path / "done")]
    refused = subprocess.run(
        command, capture_output=True, text=True, env=stranger | {"HOME": str(tmp_path)}, timeout=60
    )
    assert refused.returncode != 0
    assert "uthenticat" in refused.stdout + refused.stderr
    assert not (tmp_path / "done").exists()


def test_every_job_runs_under_submission(
    submitter: Submitter, shards, tracking: TrackingConfig, tiny_training, tmp_path: Path
):
    recipe = tmp_path / "recipe.yaml"
    dump_recipe(tiny_training(TrackingConfig(), steps=4, checkpoint_every_steps=4, workers=1), recipe)
    capture, shard_set, out = (str(tmp_path / name) for name in ("capture", "shards", "avatar"))

    # The first three are independent of each other.
    assert submitter.submit("synth", "cluster.synth", capture, *_dome_settings(shards.dome)) == 0
    settings = ("shard.frames_per_shard=3", "shard.splits.test_camera_count=2")
    assert submitter.submit("shard", "cluster.shard", shards.capture, shard_set, *_overrides(settings)) == 0
    bad_recipe = ("cluster.train", shards.uri, str(tmp_path / "never"), "--set", "stepz=3")
    assert submitter.submit("bad-recipe", *bad_recipe, wait=True) == 1
    log = submitter.log("bad-recipe")
    assert "lipflow: error: recipe the defaults: unknown key 'stepz'; did you mean 'steps'?" in log
    assert "Traceback" not in log
    assert not (tmp_path / "never").exists()
    submitter.finish("synth")
    frame_list = Path(capture, "frame_list.txt")
    assert frame_list.read_bytes() == storage.read_bytes(storage.join(shards.capture, "frame_list.txt"))
    submitter.finish("shard")
    assert ShardSet.open(shard_set).digest == shards.summary.digest

    submitter.run("cluster.train", shard_set, out, "--recipe", str(recipe))
    summary = json.loads(Path(out, "train.json").read_text())
    assert (summary["steps"], summary["model"]) == (4, "models:/lipflow/1")

    evaluation = str(tmp_path / "evaluation")
    settings = ("fit.iterations=1", "max_frames=1", "picture_frames=1", "signals=[keypoints]")
    submitter.run("cluster.evaluate", summary["model"], shard_set, "--out", evaluation, *_overrides(settings))
    assert json.loads(Path(evaluation, "evaluation.json").read_text())["method"] == "lipflow"

    log = submitter.run("cluster.promote", summary["model"])
    assert "there was no champion" in log
    assert str(find_version(open_client(tracking), "lipflow", "champion").version) == "1"


def _overrides(settings: tuple[str, ...]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def _dome_settings(dome) -> list[str]:
    changed = dome.model_dump(mode="json", exclude_unset=True)
    return _overrides(tuple(f"{name}={value}" for name, value in changed.items()))
