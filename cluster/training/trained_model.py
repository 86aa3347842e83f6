"""The trained avatar that ``lipflow train --add-driver SIGNAL --model MODEL`` gives new drivers.

It is fetched once by the submitter and copied beside the checkpoints, from where the workers read it: an alias of the
registry may have moved on by then. Its digest says which one it was.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cluster.records.registry import download_model, registered_version
from cluster.scores.scene import context_of
from cluster.training.recipe import TrainRecipe
from lipflow.checkpoint import RECORD_FILE, load_avatar
from lipflow.config import AvatarConfig
from lipflow.errors import ConfigError
from lipflow.model.extension import config_with_drivers, with_drivers
from pipeline.loading.loader import ShardSet


@dataclass(frozen=True)
class TrainedModel:
    """MODEL, on this machine.

    Attributes:
        folder: of the avatar.
        digest: SHA-256 of its record, which holds those of its weights and of its context.
        run_id: the MLflow run that made it; None if its address does not say.
    """

    folder: Path
    digest: str
    run_id: str | None


@contextmanager
def fetched(recipe: TrainRecipe) -> Iterator[TrainedModel | None]:
    """The recipe's MODEL for the length of the ``with`` block; None if it adds no drivers.

    Raises:
        RegistryError: there is no such model.
        CheckpointError: it is no avatar, or damaged.
    """
    if recipe.model is None:
        yield None
        return
    run_id = None
    if recipe.model.startswith("models:/"):
        run_id = registered_version(recipe.model, recipe.tracking).run_id
    elif recipe.model.startswith("runs:/"):
        run_id = recipe.model.removeprefix("runs:/").strip("/").partition("/")[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = download_model(recipe.model, Path(temporary, "model"), recipe.tracking)
        load_avatar(folder)
        yield TrainedModel(folder, hashlib.sha256((folder / RECORD_FILE).read_bytes()).hexdigest(), run_id)


def resolved(recipe: TrainRecipe, model: TrainedModel | None, shards: ShardSet) -> TrainRecipe:
    """The recipe with the settings of the avatar that it will make, which are the model's but for its drivers.

    What ``recipe.avatar`` leaves at its default is the model's; what it sets must be the model's, or a setting of the
    drivers where the model has none yet.

    Raises:
        ConfigError: the model cannot be given these drivers, or not with this shard set.
    """
    if model is None:
        return recipe
    avatar = load_avatar(model.folder)
    known = [
        config.model_dump()
        for config in (AvatarConfig(), avatar.config, config_with_drivers(avatar, recipe.add_drivers))
    ]
    given = recipe.avatar.model_dump()
    changes = {name: value for name, value in given.items() if value not in [config[name] for config in known]}
    config = config_with_drivers(avatar, recipe.add_drivers, changes)
    with_drivers(avatar, config, context_of(shards))
    # Validated anew: some losses do not go with some methods.
    try:
        return TrainRecipe.model_validate(recipe.model_dump() | {"avatar": config.model_dump()})
    except ValidationError as error:
        raise ConfigError(
            f"with model {recipe.model}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        ) from error
