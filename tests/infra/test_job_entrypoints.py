"""The command lines in the manifests are ones that the jobs take, with recipes that exist and fit the nodes."""

from __future__ import annotations

import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

from cluster.cli import COMMANDS
from cluster.evaluate import EvaluateRecipe
from cluster.recipe import load_recipe
from cluster.shard import ShardRecipe
from cluster.train import TrainRecipe
from cluster.tuning.recipe import TuneRecipe
from tests.infra.manifests import INFRA, Document, ray_jobs

RECIPES = "/opt/lipflow/recipes/"
"""Where the images keep infra/recipes."""

CLASSES = {"shard": ShardRecipe, "train": TrainRecipe, "evaluate": EvaluateRecipe, "tune": TuneRecipe}


def job_name(job: Document) -> str:
    return job["metadata"]["generateName"].split("-")[1]


def parsed(job: Document) -> dict[str, Any]:
    """The values of its options and arguments, by the job's own command line; nothing is run."""
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["python", "-m"]
    module, function = COMMANDS[job_name(job)]
    assert words[2] == module
    app = typer.Typer()
    app.command()(getattr(import_module(module), function))
    return typer.main.get_command(app).make_context(module, words[3:]).params


def test_there_is_a_manifest_for_every_job_of_a_cluster():
    assert sorted(map(job_name, ray_jobs())) == ["evaluate", "shard", "train", "tune"]


@pytest.mark.parametrize("job", ray_jobs(), ids=job_name)
def test_entrypoint_is_a_command_line_of_its_job_and_its_recipe_is_valid(job: Document):
    recipe = parsed(job)["recipe"]
    if recipe.startswith("s3://"):
        return
    path = INFRA / "recipes" / recipe.removeprefix(RECIPES)
    assert recipe.startswith(RECIPES)
    load_recipe(CLASSES[job_name(job)], str(path))


def test_entrypoint_with_an_unknown_option_would_be_found():
    job = next(job for job in ray_jobs() if job_name(job) == "train")
    job["spec"]["entrypoint"] += " --worker 8"
    with pytest.raises(Exception, match="No such option"):
        parsed(job)


def test_training_workers_of_the_full_recipes_fill_a_node_and_fit_it():
    (group,) = next(job for job in ray_jobs() if job_name(job) == "train")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    for path in sorted(Path(INFRA, "recipes").glob("full-*.yaml")):
        if path.stem in ("full-shard", "full-evaluate"):
            continue
        if path.stem == "full-tune":
            recipe = load_recipe(TuneRecipe, str(path)).train
        else:
            recipe = load_recipe(TrainRecipe, str(path), ["model=m"] if path.stem == "full-drivers" else [])
        assert recipe.use_gpu
        on_a_node = int(limits["nvidia.com/gpu"])
        assert recipe.workers % on_a_node == 0
        assert on_a_node * recipe.cpus_per_worker <= int(limits["cpu"])
        assert recipe.workers <= on_a_node * group["maxReplicas"]
