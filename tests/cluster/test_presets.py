"""The recipes under infra/recipes: each is valid for its job, and methods differ in nothing but the method."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cluster.evaluate import EvaluateRecipe
from cluster.recipe import load_recipe
from cluster.shard import ShardRecipe
from cluster.training.recipe import TrainRecipe
from cluster.tuning.recipe import TuneRecipe
from cluster.tuning.space import base_point
from lipflow.config import StrictConfig
from pipeline.dome.motion import segment_names
from pipeline.dome.writer import DomeConfig
from pipeline.sharding.splits import split_segments

FOLDER = Path(__file__).parents[2] / "infra" / "recipes"
RECIPES = sorted(path.name for path in FOLDER.iterdir())
TRAININGS = ("dam", "flow-gaussian", "conditional", "conditional-prior-rec", "lipflow")
SIZES = ("small", "full")
CLASSES: dict[str, type[StrictConfig]] = {
    "synth": DomeConfig,
    "shard": ShardRecipe,
    "evaluate": EvaluateRecipe,
    "tune": TuneRecipe,
}


def load(name: str) -> Any:
    job = name.removesuffix(".yaml").split("-", 1)[1]
    overrides = ["model=models:/lipflow@champion"] if job == "drivers" else []
    return load_recipe(CLASSES.get(job, TrainRecipe), str(FOLDER / name), overrides)


def test_every_job_has_its_recipes():
    jobs = ("shard", *TRAININGS, "drivers", "evaluate", "tune")
    assert sorted([f"{size}-{job}.yaml" for size in SIZES for job in jobs] + ["small-synth.yaml"]) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_takes_effect(name: str):
    """Known keys, good values, nothing lost on the way; and the command in its first line names the file itself."""
    text = (FOLDER / name).read_text()
    command = text.splitlines()[0]
    assert command.startswith("# lipflow ")
    assert f"--recipe infra/recipes/{name}" in command
    loaded = load(name).model_dump(mode="json")

    def contains(settings: dict[str, Any], found: dict[str, Any]) -> None:
        for key, value in settings.items():
            if isinstance(value, dict):
                contains(value, found[key])
            else:
                assert found[key] == value, key

    contains(yaml.safe_load(text), loaded)


@pytest.mark.parametrize("size", SIZES)
def test_methods_have_the_same_decoder_data_and_budget(size: str):
    recipes = {job: load(f"{size}-{job}.yaml").model_dump() for job in TRAININGS}
    switches = {}
    for job, recipe in recipes.items():
        switches[job] = (recipe["avatar"].pop("method"), recipe["loss"].pop("prior_weight"))
        if job in ("dam", "flow-gaussian"):
            # What they do not look at is not decoded.
            assert recipe["loader"].pop("signals") == ()
        else:
            recipe["loader"].pop("signals")
        assert recipe == recipes["dam"], job
    assert switches["conditional"] == ("conditional", 0.0)
    assert switches["conditional-prior-rec"] == ("conditional", 1.0)
    assert switches["lipflow"] == ("lipflow", 1.0)
    assert switches["dam"][0] == "dam"


@pytest.mark.parametrize("size", SIZES)
def test_a_sweep_starts_at_the_lipflow_recipe_and_searches_around_it(size: str):
    sweep = load(f"{size}-tune.yaml")
    assert sweep.train == load(f"{size}-lipflow.yaml")
    point = base_point(sweep.train, sweep.searched)
    assert [key for key, dimension in sweep.searched.items() if not dimension.holds(point[key])] == []


def test_small_is_small_and_full_is_the_papers_size():
    dome, shard, dam = load("small-synth.yaml"), load("small-shard.yaml").shard, load("small-dam.yaml")
    assert dome.image_size_hw == shard.image_size_hw == (192, 128)
    assert dome.texture_size == shard.texture_size == dam.avatar.texture_size == 128
    capture = SimpleNamespace(segments=dict.fromkeys(segment_names(dome.segments), ()))
    splits = split_segments(capture, shard.splits)
    assert 3000 < len(splits["train"]) * dome.frames_per_segment * dome.cameras < 6000
    # Whole expressions are held out, whatever their number.
    held_out = {name.split(".")[0] for name in splits["test"] + splits["val"]}
    assert not held_out & {name.split(".")[0] for name in splits["train"]}
    shard, dam = load("full-shard.yaml").shard, load("full-dam.yaml")
    assert shard.image_size_hw == (2048, 1334)
    assert shard.texture_size == dam.avatar.texture_size == 1024
    # The public architecture's widths.
    assert dam.avatar.encoder_channels == dam.avatar.decoder_channels == (128, 128, 64, 64, 32, 32, 16, 16)
