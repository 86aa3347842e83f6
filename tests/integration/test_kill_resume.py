"""A training that is killed in the middle ends, when it is submitted again, in the same weights bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.recipe import dump_recipe
from cluster.records.tracking import TrackingConfig
from cluster.scores.scene import context_of
from cluster.train import train
from cluster.training.checkpoints import CheckpointStore
from cluster.training.loop import Training
from cluster.training.recipe import TrainRecipe
from lipflow.checkpoint import save_avatar
from lipflow.config import AvatarConfig
from lipflow.model.avatar import Avatar
from pipeline.loading.loader import ShardSet
from tests.cluster.training.training_runs import differing, end_of
from tests.processes import kill_family

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

STEPS = 16


def _command(shards_uri: str, out: Path, recipe: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "cluster.cli", "train", shards_uri, str(out), "--recipe", str(recipe)),
        *("--set", "checkpoint_every_steps=4", "--json"),
    ]


def _environment(folder: Path) -> dict[str, str]:
    """Without the session's cluster: the command starts one of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"OMP_NUM_THREADS": "1", "HOME": str(folder), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}


def _checkpoints(out: Path) -> dict[int, Path]:
    """Step -> folder, of the complete checkpoints."""
    complete = CheckpointStore(str(out)).complete()
    return {checkpoint.step: out / "checkpoints" / checkpoint.name for checkpoint in complete}


def _wait_for_a_checkpoint(out: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        if _checkpoints(out):
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint appeared: {log.read_text()[-2000:]}")


def _listening_addresses(process: subprocess.Popen[bytes]) -> set[str]:
    """``address name`` of everything below a process that accepts connections."""
    found = set()
    for member in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            listening = [c for c in member.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            found |= {f"{c.laddr.ip.removeprefix('::ffff:')} {member.cmdline()[0]}" for c in listening}
    return found


@pytest.fixture(params=["an avatar", "new drivers"])
def settings(request, shards, tiny_training, tmp_path: Path) -> TrainRecipe:
    """Of the training that is killed."""
    tracking = TrackingConfig(uri=shards.tracking.uri, experiment="killed")
    recipe = tiny_training(tracking, steps=STEPS, register_as=None, checkpoint_every_steps=4)
    # All that may end in other weights if it is not kept: an average, and shares of which one is larger.
    recipe = recipe.model_copy(update={"ema_decay": 0.9, "precision": "bfloat16", "micro_batches": 3})
    if request.param == "an avatar":
        return recipe
    dam = AvatarConfig.model_validate(recipe.avatar.model_dump() | {"method": "dam"})
    save_avatar(Avatar(dam, context_of(ShardSet.open(shards.uri))), tmp_path / "dam")
    drivers = {"avatar": dam.model_dump(), "add_drivers": ("hmc", "keypoints"), "model": str(tmp_path / "dam")}
    return TrainRecipe.model_validate(recipe.model_dump() | drivers)


@pytest.mark.slow
def test_a_killed_training_continues_and_ends_in_the_same_weights(shards, settings: TrainRecipe, tmp_path: Path):
    out, recipe = tmp_path / "killed", tmp_path / "recipe.yaml"
    dump_recipe(settings, recipe)
    log = tmp_path / "killed.log"
    with log.open("wb") as output:
        killed = subprocess.Popen(
            _command(shards.uri, out, recipe),
            stdout=output,
            stderr=output,
            env=_environment(tmp_path),
            start_new_session=True,
        )
        try:
            _wait_for_a_checkpoint(out, killed, log)
            addresses = _listening_addresses(killed)
        finally:
            kill_family(killed)
    # A cluster of our own is nobody else's.
    assert addresses
    assert [address for address in addresses if not address.startswith("127.0.0.1 ")] == []
    assert not (out / "train.json").exists()
    assert max(_checkpoints(out)) < STEPS

    again = subprocess.run(
        _command(shards.uri, out, recipe),
        capture_output=True,
        text=True,
        env=_environment(tmp_path),
        timeout=200,
    )
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert 0 < summary["resumed_from_step"] < STEPS
    assert summary["resumed_from_step"] % 4 == 0

    undisturbed = train(shards.uri, str(tmp_path / "undisturbed"), settings)
    assert undisturbed.resumed_from_step == 0
    assert summary["validation_loss"] == undisturbed.validation_loss
    ends = [
        end_of(Training(settings, shards.uri, str(tmp_path / name)), tmp_path) for name in ("killed", "undisturbed")
    ]
    assert differing(*ends) == []
    assert ends[0]["step"] == STEPS
