"""A node that dies in the middle of an epoch costs time: the training ends in the same weights bit for bit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cluster.recipe import dump_recipe
from cluster.records.tracking import TrackingConfig, initialise
from cluster.training.checkpoints import CheckpointStore
from cluster.training.loop import Training
from tests.cluster.training.training_runs import differing, end_of, tiny, train_alone, write_tiny_shards
from tests.integration.ray_nodes import RayNodes, ray_nodes

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

STEPS, EVERY = 80, 8
WAIT_S = 280
REPETITIONS = 20


@dataclass(frozen=True)
class Undisturbed:
    """What every training of this file is compared with: one worker, one process, no Ray."""

    shards: str
    tracking: TrackingConfig
    seconds_a_step: float
    end: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed")
    shards = write_tiny_shards(root)
    training = Training(tiny(steps=STEPS, checkpoint_every_steps=EVERY), shards, str(root / "out"))
    began = time.monotonic()
    train_alone(training)
    seconds_a_step = (time.monotonic() - began) / STEPS
    tracking = TrackingConfig(uri=f"sqlite:///{root}/mlflow.db", experiment="nodes")
    initialise(tracking)
    return Undisturbed(shards, tracking, seconds_a_step, end_of(training, root))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    with ray_nodes(tmp_path_factory.mktemp("nodes"), 2) as cluster:
        yield cluster


class Submitted:
    """``lipflow train`` on the cluster, in a process of its own."""

    def __init__(self, nodes: RayNodes, undisturbed: Undisturbed, folder: Path, *options: str):
        self.out = folder / "out"
        recipe = tiny(
            steps=STEPS, checkpoint_every_steps=EVERY, workers=2, tracking=undisturbed.tracking, register_as=None
        )
        dump_recipe(recipe, folder / "recipe.yaml")
        command = [sys.executable, "-m", "cluster.cli", "train", undisturbed.shards, str(self.out), "--json"]
        command += ["--recipe", str(folder / "recipe.yaml"), *options]
        self._log = folder / "train.log"
        with self._log.open("wb") as log, (folder / "summary.json").open("wb") as summary:
            self._process = subprocess.Popen(command, stdout=summary, stderr=log, env=nodes.environment())
        self._summary = folder / "summary.json"

    def latest_step(self) -> int:
        """Of the latest checkpoint; 0 as long as there is none."""
        found = CheckpointStore(str(self.out)).complete()
        return found[-1].step if found else 0

    def wait_for_a_checkpoint(self, step: int = EVERY) -> None:
        """Return as soon as there is one of ``step`` or later."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if self.latest_step() >= step:
                return
            time.sleep(0.02)
        raise AssertionError(f"no checkpoint appeared: {self._log.read_text()[-2000:]}")

    def wait(self) -> dict:
        """Its summary."""
        try:
            assert self._process.wait(timeout=WAIT_S) == 0, self._log.read_text()[-4000:]
        finally:
            self.kill()
        return json.loads(self._summary.read_text())

    def kill(self) -> None:
        """End the driver, if it is still there."""
        self._process.kill()
        self._process.wait()


def _end(submitted: Submitted, undisturbed: Undisturbed, folder: Path) -> dict[str, torch.Tensor]:
    return end_of(Training(tiny(), undisturbed.shards, str(submitted.out)), folder)


def _kill_a_node_and_compare(nodes: RayNodes, undisturbed: Undisturbed, folder: Path, chance: random.Random) -> None:
    submitted = Submitted(nodes, undisturbed, folder)
    try:
        # Between two checkpoints of the first half, if it goes on about as fast as it did alone.
        submitted.wait_for_a_checkpoint(EVERY * chance.randrange(1, STEPS // EVERY // 2))
        time.sleep(chance.uniform(0, EVERY) * undisturbed.seconds_a_step)
        nodes.kill(chance.randrange(2))
        assert submitted.latest_step() < STEPS
        nodes.add()
        summary = submitted.wait()
    finally:
        submitted.kill()
    assert summary["steps"] == STEPS
    assert differing(_end(submitted, undisturbed, folder), undisturbed.end) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(REPETITIONS))
def test_a_node_that_is_killed_at_a_random_moment_and_replaced_changes_nothing(
    seed: int, nodes, undisturbed, tmp_path: Path
):
    _kill_a_node_and_compare(nodes, undisturbed, tmp_path, random.Random(seed))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_node_goes_on_alone_and_ends_in_the_same_weights(nodes, undisturbed, tmp_path: Path):
    submitted = Submitted(nodes, undisturbed, tmp_path, "--set", "min_workers=1")
    try:
        submitted.wait_for_a_checkpoint()
        nodes.kill(1)
        assert submitted.latest_step() < STEPS
        submitted.wait()
    finally:
        submitted.kill()
        nodes.add()
    assert differing(_end(submitted, undisturbed, tmp_path), undisturbed.end) == []
