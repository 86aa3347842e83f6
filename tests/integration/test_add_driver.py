"""Drivers are added to a trained avatar by the training job: one call after another, tracked and registered."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cluster.records.registry import download_model
from cluster.records.tracking import PARENT_RUN_TAG, TrackingConfig, open_client
from cluster.scores.scene import context_of
from cluster.train import TrainSummary, train
from cluster.training.recipe import TrainRecipe
from lipflow.checkpoint import load_avatar, save_avatar
from lipflow.config import AvatarConfig, LossConfig
from lipflow.errors import ConfigError
from lipflow.losses import PosteriorCollapseError
from lipflow.model.avatar import Avatar
from pipeline import storage
from pipeline.loading.loader import ShardSet

# Raised inside MLflow, about its own use of SQLAlchemy and pandas.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
]


@dataclass(frozen=True)
class Added:
    """A DAM, and what two calls made of it."""

    out: Path
    tracking: TrackingConfig
    dam: Path
    recipe: TrainRecipe
    keypoints: TrainSummary
    hmc: TrainSummary


@pytest.fixture(scope="module")
def added(shards, tiny_training, tmp_path_factory: pytest.TempPathFactory) -> Added:
    out = tmp_path_factory.mktemp("drivers")
    tracking = TrackingConfig(uri=shards.tracking.uri, experiment="drivers")
    config = AvatarConfig.model_validate(tiny_training(tracking).avatar.model_dump() | {"method": "dam"})
    save_avatar(Avatar(config, context_of(ShardSet.open(shards.uri))), out / "dam")
    settings = {"steps": 4, "checkpoint_every_steps": 2, "register_as": "driven-dam"}
    recipe = tiny_training(tracking, add_drivers=("keypoints",), model=str(out / "dam"), **settings)
    keypoints = train(shards.uri, str(out / "keypoints"), recipe)
    # One worker, after two: DDP is not what this call is about.
    hmc = tiny_training(tracking, add_drivers=("hmc",), model="models:/driven-dam@challenger", workers=1, **settings)
    return Added(out, tracking, out / "dam", recipe, keypoints, train(shards.uri, str(out / "hmc"), hmc))


def _avatar(summary: TrainSummary) -> Avatar:
    return load_avatar(storage.local_path(summary.avatar))


def test_each_call_adds_its_driver_and_changes_nothing_else(added: Added):
    dam, first, second = load_avatar(added.dam), _avatar(added.keypoints), _avatar(added.hmc)
    assert [avatar.config.method for avatar in (dam, first, second)] == ["dam", "dam-regressor", "dam-regressor"]
    assert [avatar.signals for avatar in (dam, first, second)] == [(), ("keypoints",), ("keypoints", "hmc")]
    for before, after in ((dam, first), (first, second)):
        weights = after.state_dict()
        for name, value in before.state_dict().items():
            assert torch.equal(weights[name], value), name
    # The images' statistics were measured, those of untrained drivers are 127.5.
    assert second.drivers["hmc"].normalize.mean.std() > 1


def test_the_avatar_is_registered_and_its_run_is_linked_to_the_models(added: Added, tmp_path: Path):
    assert (added.keypoints.model, added.hmc.model) == ("models:/driven-dam/1", "models:/driven-dam/2")
    client = open_client(added.tracking)
    assert client.get_run(added.hmc.run_id).data.tags[PARENT_RUN_TAG] == added.keypoints.run_id
    registered = load_avatar(download_model("models:/driven-dam@challenger", tmp_path, added.tracking))
    assert registered.signals == ("keypoints", "hmc")


def test_terms_and_guards_are_tracked(added: Added):
    metrics = open_client(added.tracking).get_run(added.keypoints.run_id).data.metrics
    terms = {name for name in metrics if name.startswith("train/")}
    assert terms == {
        f"train/{name}"
        for name in (
            *("latent", "latent_keypoints", "prior_image", "prior_geometry"),
            *("posterior_std", "total", "gradient_norm", "learning_rate"),
        )
    }


def test_a_training_continues_with_the_same_model_wherever_it_lies_and_with_no_other(
    added: Added, shards, tiny_training, tmp_path: Path
):
    out = str(added.out / "keypoints")
    shutil.copytree(added.dam, tmp_path / "copy")
    moved = added.recipe.model_copy(update={"model": str(tmp_path / "copy")})
    assert train(shards.uri, out, moved) == added.keypoints

    other = load_avatar(added.dam)
    with torch.no_grad():
        other.decoder.mesh_fc.bias[0] += 1e-3
    save_avatar(other, tmp_path / "other")
    changed = added.recipe.model_copy(update={"model": str(tmp_path / "other")})
    with pytest.raises(ConfigError, match="holds a training with another model: give the same settings"):
        train(shards.uri, out, changed)
    with pytest.raises(ConfigError, match="another model"):
        train(shards.uri, out, tiny_training(added.tracking))


def test_a_posterior_that_shrinks_ends_the_training_at_once(shards, tiny_training, tmp_path: Path):
    tracking = TrackingConfig(uri=shards.tracking.uri, experiment="collapse")
    recipe = tiny_training(tracking, workers=1, loss=LossConfig(min_posterior_std=100.0), max_failures=3)
    with pytest.raises(PosteriorCollapseError, match="expected at least 100"):
        train(shards.uri, str(tmp_path / "out"), recipe)
