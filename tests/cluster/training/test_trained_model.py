"""What a recipe comes to when its drivers are added to a trained avatar."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster import train as train_job
from cluster.training import trained_model
from cluster.training.recipe import TrainRecipe
from cluster.training.trained_model import fetched, resolved
from lipflow.checkpoint import CheckpointError, save_avatar
from lipflow.config import AvatarConfig
from lipflow.errors import ConfigError
from lipflow.model.avatar import Avatar
from lipflow.model.context import AvatarContext
from lipflow.types import Normalization, Topology


def _context() -> AvatarContext:
    """A single triangle."""
    topology = Topology(
        faces=np.array([[0, 1, 2]]),
        uvs=np.array([[0, 0], [1, 0], [0, 1]], np.float32),
        uv_faces=np.array([[0, 1, 2]]),
        weight_mask=np.ones((4, 4), np.float32),
        landmarks={"nose": 0},
        num_vertices=3,
    )
    statistics = Normalization(np.zeros((3, 32, 32), np.float32), 1.0, np.eye(3, dtype=np.float32), 1.0)
    return AvatarContext(topology, statistics, ("a",), ("a",), (), "a", (32, 32), ("nose",))


CONFIG = AvatarConfig.small(method="dam", texture_size=32, latent_size=4, driver_image_size=16)


@pytest.fixture
def model(tmp_path: Path, monkeypatch) -> str:
    monkeypatch.setattr(trained_model, "context_of", lambda shards: _context())
    save_avatar(Avatar(CONFIG, _context()), tmp_path / "model")
    return str(tmp_path / "model")


def _resolved(model: str, **settings) -> TrainRecipe:
    recipe = TrainRecipe.model_validate({"add_drivers": ["keypoints"], "model": model} | settings)
    with fetched(recipe) as found:
        return resolved(recipe, found, None)


def test_the_avatars_settings_are_the_models_but_for_its_drivers(model: str):
    recipe = _resolved(model, steps=7)
    assert recipe.avatar == CONFIG.model_copy(update={"method": "dam-regressor", "signals": ("keypoints",)})
    assert recipe.steps == 7
    assert _resolved(model, avatar={"driver_hidden_size": 36}).avatar.driver_hidden_size == 36
    # Both what the model was trained with and what was recorded can be given.
    assert _resolved(model, avatar=CONFIG.model_dump(), steps=7) == recipe
    assert _resolved(model, avatar=recipe.avatar.model_dump(), steps=7) == recipe


def test_settings_that_would_change_the_model_are_refused(model: str):
    with pytest.raises(ConfigError, match=r"avatar\.latent_size is that of the trained avatar"):
        _resolved(model, avatar={"latent_size": 8})
    with pytest.raises(ConfigError, match="dam-regressor, whose KL"):
        _resolved(model, loss={"latent_estimate": "likelihood"})


def test_a_training_without_drivers_has_no_model_and_stays_as_it_is():
    recipe = TrainRecipe()
    with fetched(recipe) as found:
        assert found is None
        assert resolved(recipe, found, None) is recipe


def test_the_digest_tells_avatars_apart_and_not_places(model: str, tmp_path: Path):
    def digest(uri: str) -> str:
        with fetched(TrainRecipe(add_drivers=("keypoints",), model=uri)) as found:
            assert found is not None
            return found.digest

    avatar = Avatar(CONFIG, _context())
    save_avatar(avatar, tmp_path / "copy")
    with torch.no_grad():
        avatar.encoder.mesh_fc.bias[0] += 1e-6
    save_avatar(avatar, tmp_path / "other")
    assert digest(model) == digest(str(tmp_path / "copy")) == digest(f"file://{tmp_path}/copy")
    assert digest(model) != digest(str(tmp_path / "other"))


def test_a_folder_without_an_avatar_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    recipe = TrainRecipe(add_drivers=("keypoints",), model=str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="holds no avatar"), fetched(recipe):
        pass


def test_the_command_takes_several_signals_and_a_recipe_may_name_them(monkeypatch, tmp_path: Path):
    asked = []

    def noted(shards: str, out: str, recipe: TrainRecipe):
        asked.append(recipe)
        raise ConfigError("enough")

    monkeypatch.setattr(train_job, "train", noted)
    preset = tmp_path / "recipe.yaml"
    preset.write_text("add_drivers: [frontal]\nsteps: 3\n")
    uri = "models:/lipflow@champion"
    for arguments in (
        {"add_driver": ["hmc", "keypoints"]},
        {"recipe": str(preset)},
        {"recipe": str(preset), "add_driver": ["hmc"]},
    ):
        with pytest.raises(ConfigError, match="enough"):
            train_job.train_command("shards", "out", model=uri, **arguments)
    assert [recipe.add_drivers for recipe in asked] == [("hmc", "keypoints"), ("frontal",), ("hmc",)]
    assert {recipe.model for recipe in asked} == {uri}
    assert [recipe.steps for recipe in asked] == [2000, 3, 3]
    with pytest.raises(ConfigError, match="give both"):
        train_job.train_command("shards", "out", add_driver=["hmc"])
