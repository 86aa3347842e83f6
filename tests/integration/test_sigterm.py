"""A worker that is told to go (SIGTERM, as before a machine is taken away) leaves with a checkpoint of its step."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from cluster.records.tracking import TrackingConfig
from cluster.train import train
from cluster.training.checkpoints import CheckpointStore
from cluster.training.loop import Training
from tests.cluster.training.training_runs import differing, end_of, train_alone

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

STEPS, EVERY = 40, 15


class TellOneWorker(threading.Thread):
    """SIGTERM to one training worker below process ``pid``, once the first checkpoint is complete."""

    def __init__(self, pid: int, out: Path):
        super().__init__(daemon=True)
        self._pid, self._out = pid, out

    def run(self) -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not CheckpointStore(str(self._out)).complete():
            time.sleep(0.05)
        for process in psutil.Process(self._pid).children(recursive=True):
            if "RayTrainWorker" in "".join(process.cmdline()[:1]):
                process.send_signal(signal.SIGTERM)
                return


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_told_to_go_leaves_with_a_checkpoint_and_no_failure_is_counted(
    shards, tiny_training, ray_session, tmp_path: Path
):
    tracking = TrackingConfig(uri=shards.tracking.uri, experiment="sigterm")
    recipe = tiny_training(
        tracking, steps=STEPS, checkpoint_every_steps=EVERY, keep_checkpoints=9, max_failures=0, register_as=None
    )
    teller = TellOneWorker(ray_session.pid, tmp_path / "told")
    teller.start()
    summary = train(shards.uri, str(tmp_path / "told"), recipe)
    teller.join()
    assert summary.steps == STEPS
    checkpoints = CheckpointStore(str(tmp_path / "told")).complete()
    left = [checkpoint.step for checkpoint in checkpoints if checkpoint.validation_loss is None]
    assert len(left) == 1
    assert EVERY < left[0] < STEPS
    assert [checkpoint.step for checkpoint in checkpoints if checkpoint.validation_loss is not None] == [15, 30, 40]

    alone = Training(recipe.model_copy(update={"micro_batches": 2}), shards.uri, str(tmp_path / "alone"))
    train_alone(alone)
    told = Training(recipe, shards.uri, str(tmp_path / "told"))
    assert differing(end_of(told, tmp_path / "ends"), end_of(alone, tmp_path / "end")) == []
