"""The pipeline with everything on a real S3 server: capture, shards, checkpoints, avatar, evaluation, artifacts."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.evaluate import EvaluateRecipe, evaluate
from cluster.records.registry import download_model
from cluster.records.tracking import TrackingConfig, open_client
from cluster.scores.evaluation import Evaluation
from cluster.shard import ShardRecipe, ShardSummary, shard
from cluster.synth import synthesise
from cluster.train import TrainSummary, train
from cluster.training.checkpoints import CheckpointStore
from lipflow.checkpoint import load_avatar
from lipflow.config import FitConfig
from pipeline import storage

# Raised inside MLflow, about its own use of SQLAlchemy and pandas.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
]

STEPS = 10


@dataclass(frozen=True)
class OnS3:
    """Where everything is, and what the jobs came to."""

    root: str
    objects: Path
    store: Path
    tracking: TrackingConfig
    sharded: ShardSummary
    trained: TrainSummary
    killed_after_step: int
    evaluation: Evaluation


class KillOneWorker(threading.Thread):
    """Kills a training worker below process ``pid`` as soon as the first checkpoint is complete.

    Attributes:
        after_step: the step of the checkpoint that was there; None if nothing was killed.
    """

    def __init__(self, pid: int, training: Path):
        super().__init__(daemon=True)
        self.after_step: int | None = None
        self._pid, self._training = pid, training

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            complete = complete_checkpoints(self._training)
            if complete:
                workers = [
                    process
                    for process in psutil.Process(self._pid).children(recursive=True)
                    if "RayTrainWorker" in "".join(process.cmdline()[:1])
                ]
                workers[0].kill()
                self.after_step = complete[-1]
                return
            time.sleep(0.05)


def complete_checkpoints(training: Path) -> list[int]:
    """Steps of the checkpoints that are there, in the server's own folder."""
    return [checkpoint.step for checkpoint in CheckpointStore(str(training)).complete()]


@pytest.fixture(scope="module")
def on_s3(shards, s3_server, ray_session, tiny_training, tmp_path_factory: pytest.TempPathFactory):
    root = s3_server.uri("everything")
    objects = s3_server.folder / s3_server.bucket / "everything"
    store = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIPFLOW_ARTIFACT_URI", storage.join(root, "artifacts"))
        tracking = TrackingConfig(uri=f"sqlite:///{store}/mlflow.db")
        capture = synthesise(storage.join(root, "capture"), shards.dome).capture
        sharded = shard(capture, storage.join(root, "shards"), ShardRecipe(shard=shards.config, tracking=tracking))
        killer = KillOneWorker(ray_session.pid, objects / "avatar")
        killer.start()
        recipe = tiny_training(tracking, steps=STEPS, checkpoint_every_steps=2, max_failures=1, workers=1)
        trained = train(sharded.shards, storage.join(root, "avatar"), recipe)
        killer.join()
        evaluation = evaluate(
            trained.model or "",
            sharded.shards,
            storage.join(root, "evaluation"),
            EvaluateRecipe(fit=FitConfig(iterations=1), tracking=tracking, max_frames=1, picture_frames=1),
            parent_run=trained.run_id,
        )
    assert killer.after_step is not None
    return OnS3(root, objects, store, tracking, sharded, trained, killer.after_step, evaluation)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_capture_and_shards_are_the_same_bytes_as_on_a_disk(shards, on_s3: OnS3):
    assert _files(on_s3.objects / "capture") == _files(storage.local_path(shards.capture))
    local, remote = _files(storage.local_path(shards.uri)), _files(on_s3.objects / "shards")
    assert set(local) == set(remote)
    assert on_s3.sharded.digest == shards.summary.digest
    tars = [name for name in local if name.endswith(".tar")]
    assert tars
    for name in tars:
        assert local[name] == remote[name], name


def test_a_second_sharding_on_s3_writes_nothing(shards, on_s3: OnS3):
    again = shard(
        storage.join(on_s3.root, "capture"),
        on_s3.sharded.shards,
        ShardRecipe(shard=shards.config, tracking=on_s3.tracking),
    )
    assert not again.written


def test_a_training_whose_worker_was_killed_continues_from_its_checkpoint_on_s3(on_s3: OnS3):
    assert 0 < on_s3.killed_after_step < STEPS
    client = open_client(on_s3.tracking)
    steps = [point.step for point in client.get_metric_history(on_s3.trained.run_id, "train/total")]
    assert set(steps) == set(range(1, STEPS + 1))
    # Steps that the checkpoint holds were not computed again.
    assert [step for step in steps if step <= on_s3.killed_after_step] == list(range(1, on_s3.killed_after_step + 1))
    assert complete_checkpoints(on_s3.objects / "avatar")[-1] == STEPS


def test_avatar_evaluation_and_artifacts_are_on_s3_and_the_model_loads(on_s3: OnS3, tmp_path: Path):
    assert on_s3.trained.avatar == storage.join(on_s3.root, "avatar", "avatar")
    names = set(_files(on_s3.objects))
    assert {"avatar/train.json", "evaluation/evaluation.json", "evaluation/latents.json"} <= names
    assert any(name.startswith("artifacts/") and name.endswith("pictures/hmc.png") for name in names)
    assert not [path for path in on_s3.store.rglob("*") if path.is_dir()]
    registered = load_avatar(download_model("models:/lipflow@challenger", tmp_path / "registered", on_s3.tracking))
    stored = load_avatar(download_model(on_s3.trained.avatar, tmp_path / "stored"))
    for name, weights in stored.state_dict().items():
        assert weights.equal(registered.state_dict()[name]), name
    assert len(on_s3.evaluation.rows) > 0


def test_no_credential_is_in_any_object_or_in_the_store(on_s3: OnS3):
    contents = _files(on_s3.objects) | _files(on_s3.store)
    assert len(contents) > 200
    for name, body in contents.items():
        assert b"test-secret" not in body, name
        assert b"test-key" not in body, name
