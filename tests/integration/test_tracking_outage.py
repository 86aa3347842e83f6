"""A training whose MLflow server is killed: it goes on, and every metric is found once, in MLflow or in a file."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.records.run import LOST_METRICS_TAG
from cluster.records.tracking import TrackingConfig, open_client
from cluster.train import train
from cluster.training.checkpoints import CheckpointStore
from tests.cluster.records.mlflow_server import MlflowServer, mlflow_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    # Raised inside MLflow, about its own use of SQLAlchemy.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
]

STEPS, CHECKPOINT_EVERY = 45, 3
CHECKPOINTS_IN_THE_OUTAGE = 3
LONG_S = 300.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path) as running:
        yield running


def kill_in_the_middle(server: MlflowServer, out: Path, then: Callable[[], None]) -> threading.Thread:
    """Kills the server after the first checkpoint, and calls ``then`` after three more that were made without it."""

    def wait_for(count: int, seen: set[str]) -> None:
        deadline = time.monotonic() + LONG_S
        while len(seen) < count:
            assert time.monotonic() < deadline, f"{count} checkpoints did not appear"
            seen |= {checkpoint.name for checkpoint in CheckpointStore(str(out)).complete()}
            time.sleep(0.05)

    def run() -> None:
        seen: set[str] = set()
        wait_for(1, seen)
        server.kill()
        wait_for(len(seen) + CHECKPOINTS_IN_THE_OUTAGE, seen)
        then()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def logged(config: TrackingConfig, run_id: str, key: str) -> Counter[int]:
    return Counter(point.step for point in open_client(config).get_metric_history(run_id, key))


def test_training_goes_on_and_its_metrics_arrive_once_the_server_is_back(shards, tiny_training, tmp_path, server):
    out = tmp_path / "out"
    tracking = TrackingConfig(uri=server.uri, wait_s=LONG_S)
    recipe = tiny_training(tracking, steps=STEPS, checkpoint_every_steps=CHECKPOINT_EVERY, register_as=None)
    outage = kill_in_the_middle(server, out, server.start)
    summary = train(shards.uri, str(out), recipe)
    outage.join(LONG_S)
    assert not outage.is_alive()
    assert summary.steps == STEPS
    assert logged(tracking, summary.run_id, "train/total") == Counter(range(1, STEPS + 1))
    assert logged(tracking, summary.run_id, "val/loss") == Counter(range(3, STEPS + 1, CHECKPOINT_EVERY))
    found = open_client(tracking).get_run(summary.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["best/step"] == summary.best_step
    assert LOST_METRICS_TAG not in found.data.tags
    assert list(out.glob("unsent-metrics/*")) == []


def test_training_ends_well_without_the_server_and_keeps_the_metrics_in_files(
    shards, tiny_training, tmp_path, server, caplog
):
    out = tmp_path / "out"
    tracking = TrackingConfig(uri=server.uri, wait_s=1)
    recipe = tiny_training(tracking, steps=STEPS, checkpoint_every_steps=CHECKPOINT_EVERY, register_as=None)
    outage = kill_in_the_middle(server, out, lambda: None)
    summary = train(shards.uri, str(out), recipe)
    outage.join(LONG_S)
    assert summary.steps == STEPS
    assert Path(out, "train.json").exists()
    assert f"run {summary.run_id} lacks" in caplog.text
    assert "was not recorded" in caplog.text
    lines = [line for path in out.glob("unsent-metrics/*.jsonl") for line in path.read_text().splitlines()]
    kept = {(entry["key"], entry["step"]) for entry in map(json.loads, lines)}
    assert ("train/total", STEPS) in kept
    assert ("best/step", STEPS) in kept
    server.start()
    arrived = logged(tracking, summary.run_id, "train/total")
    assert max(arrived.values()) == 1
    assert set(arrived) | {step for key, step in kept if key == "train/total"} == set(range(1, STEPS + 1))
