"""The arithmetic of infra/SCALE.md: every figure follows from the ones above it, and the counted ones from the code."""

from __future__ import annotations

import re

import pytest

from cluster.recipe import load_recipe
from cluster.shard import ShardRecipe
from cluster.train import TrainRecipe
from tests.infra.manifests import INFRA

TEXT = (INFRA / "SCALE.md").read_text()
GIVEN = re.compile(r"^\| `(\w+)` \| ([\d.e+-]+) \| [mca] \|", re.MULTILINE)
DERIVED = re.compile(r"^\| `(\w+)` \| ([\d.e+-]+) \| `([^`]+)` \|", re.MULTILINE)


def figures() -> dict[str, float]:
    known = {name: float(value) for name, value in GIVEN.findall(TEXT)}
    for name, _, formula in DERIVED.findall(TEXT):
        assert re.fullmatch(r"[\w\s.+*/()-]+", formula), formula
        known[name] = eval(formula, {"__builtins__": {}}, known)  # of names and numbers alone
    return known


def test_every_row_is_read():
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    assert len(rows) == len(GIVEN.findall(TEXT)) + len(DERIVED.findall(TEXT)) >= 70


@pytest.mark.parametrize(("name", "value"), [(name, float(value)) for name, value, _ in DERIVED.findall(TEXT)])
def test_figure_follows_from_those_above_it(name: str, value: float):
    assert figures()[name] == pytest.approx(value, rel=0.02)


def test_settings_are_those_of_the_full_recipes():
    known = figures()
    train = load_recipe(TrainRecipe, str(INFRA / "recipes" / "full-lipflow.yaml"))
    shard = load_recipe(ShardRecipe, str(INFRA / "recipes" / "full-shard.yaml")).shard
    assert known["views_per_step"] == train.loader.frames_per_batch * train.loader.views_per_frame
    assert known["cores_per_gpu"] == train.cpus_per_worker
    assert (known["steps"], known["log_steps"]) == (train.steps, train.log_every_steps)
    assert known["checkpoint_steps"] == train.checkpoint_every_steps
    assert known["shard_bytes"] == pytest.approx(shard.target_shard_bytes, rel=1e-3)
    assert train.workers == 8
