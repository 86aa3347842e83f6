"""An error of ours in a worker ends the training at once; a training is not mixed with another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.records.tracking import ERROR_TAG, TrackingConfig, open_client
from cluster.train import train
from cluster.training.failures import FailAtOnce
from lipflow.config import LossConfig
from lipflow.errors import ConfigError
from lipflow.losses import NonFiniteLossError

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


def test_only_errors_of_ours_end_a_training_at_once():
    callback = FailAtOnce()
    callback.after_exception(None, {0: RuntimeError("connection reset"), 1: OSError("lost")})
    with pytest.raises(NonFiniteLossError):
        callback.after_exception(None, {0: RuntimeError("connection reset"), 1: NonFiniteLossError("inf")})


def test_a_loss_that_is_not_finite_is_not_tried_again(shards, tiny_training, tmp_path: Path):
    tracking = TrackingConfig(uri=shards.tracking.uri, experiment="errors")
    recipe = tiny_training(tracking, learning_rate=1e30, warmup_steps=0, max_failures=3)
    with pytest.raises(NonFiniteLossError, match="not finite"):
        train(shards.uri, str(tmp_path / "out"), recipe)
    client = open_client(tracking)
    (run,) = client.search_runs([client.get_experiment_by_name("errors").experiment_id])
    assert run.info.status == "FAILED"
    assert "NonFiniteLossError" in run.data.tags[ERROR_TAG]
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/total")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) < recipe.steps

    # What is there now is refused to another training, before anything is started.
    other = tiny_training(tracking, loss=LossConfig(image_weight=2.0), max_failures=3)
    with pytest.raises(ConfigError, match="learning_rate") as refused:
        train(shards.uri, str(tmp_path / "out"), other)
    assert "loss" in str(refused.value)
    assert "\n" not in str(refused.value)
