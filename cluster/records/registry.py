"""The model registry: avatars go in as MLflow model versions, and come out as folders.

A version holds the avatar's safetensors and JSON, the source of ``lipflow``, a signature, an input example and its
model card, and nothing pickled. What it was measured to do is kept by :mod:`cluster.records.evaluations`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lipflow
from cluster.records.card import CARD_FILE, MODEL_FOLDER, TrainingData, model_card, shortened
from cluster.records.redaction import redact_text
from cluster.records.run import Run
from cluster.records.tracking import SHARDS_DIGEST_TAG, TrackingConfig, open_client
from lipflow.checkpoint import RECORD_FILE
from lipflow.errors import LipflowError
from lipflow.types import DrivingSignals
from pipeline import storage

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

DEFAULT_NAME = "lipflow"
CHALLENGER = "challenger"
CHAMPION = "champion"

_MLFLOW_FILE = "MLmodel"
# What lipflow/ imports, and what loads the model.
_REQUIREMENTS = ("mlflow", "torch", "numpy", "numba", "zuko", "safetensors", "pydantic")


class RegistryError(LipflowError):
    """A model, version, alias or run that the registry does not hold."""


@dataclass(frozen=True)
class AvatarVersion:
    """A version in the registry, and the run that made it."""

    name: str
    version: str
    run_id: str | None

    @property
    def uri(self) -> str:
        """MODEL, as the commands and ``mlflow.pyfunc.load_model`` take it."""
        return f"models:/{self.name}/{self.version}"


def register_avatar(
    model_dir: str | Path,
    run: Run,
    *,
    example: DrivingSignals,
    shards_digest: str,
    data: TrainingData | None = None,
    name: str = DEFAULT_NAME,
    tags: Mapping[str, str] | None = None,
) -> AvatarVersion:
    """Log an avatar as a model of ``run`` and register it with the alias ``challenger``.

    Args:
        model_dir: a folder written by ``lipflow.checkpoint.save_avatar``.
        run: the run that made it.
        example: driving signals of at least one frame, with all signals of the avatar; the first frame becomes the
            model's input example.
        shards_digest: of the shard set that it was trained on.
        data: of that shard set, for the model card.
        name: of the registered model.
        tags: further tags of the version.

    Raises:
        LipflowError: the folder holds no avatar, or one that nothing drives.
        RegistryError: the registry refused.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    from cluster.records import pyfunc_model
    from lipflow.checkpoint import load_avatar

    avatar = load_avatar(model_dir)
    if not avatar.signals:
        raise RegistryError(
            f"{model_dir} is an avatar of method {avatar.config.method} without drivers, which cannot be served: "
            "register one of method lipflow or conditional"
        )
    view_vector = torch.tensor([[0.0, 0.0, 1.0]])
    arrays = {key: array[:1] for key, array in pyfunc_model.input_arrays(example, view_vector, avatar.signals).items()}
    card = model_card(name, avatar.config, avatar.signals, shards_digest, data)
    with tempfile.TemporaryDirectory() as folder, registry_errors(name):
        packaged = Path(folder) / MODEL_FOLDER
        mlflow.pyfunc.save_model(
            packaged,
            mlflow_model=Model(artifact_path=MODEL_FOLDER, run_id=run.run_id),
            python_model=pyfunc_model.__file__,
            artifacts={"avatar": str(Path(model_dir).absolute())},
            code_paths=[str(Path(lipflow.__file__).parent)],
            signature=_signature(arrays, avatar),
            input_example=arrays,
            pip_requirements=[f"{package}=={_public_version(package)}" for package in _REQUIREMENTS],
            metadata={"signals": list(avatar.signals), "method": avatar.config.method},
        )
        (packaged / CARD_FILE).write_text(card)
        run.log_artifacts(packaged, MODEL_FOLDER)
    client = run.client
    with registry_errors(name):
        try:
            client.create_registered_model(name, description="Driven face avatars made by LiP-Flow.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source_uri = f"{client.get_run(run.run_id).info.artifact_uri}/{MODEL_FOLDER}"
        all_tags = {**(tags or {}), SHARDS_DIGEST_TAG: shards_digest}
        created = client.create_model_version(name, source_uri, run.run_id, all_tags, description=shortened(card))
        client.set_registered_model_alias(name, CHALLENGER, created.version)
    return AvatarVersion(name, str(created.version), run.run_id)


def find_version(client: MlflowClient, name: str, version_or_alias: str) -> ModelVersion:
    """The version ``"3"`` or ``"challenger"`` of a registered model.

    Raises:
        RegistryError: there is no such model, version or alias; says which there are.
    """
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        known = sorted(model.name for model in client.search_registered_models(max_results=20))
        raise RegistryError(
            f"no model {name!r} in the registry, which holds {known}: train and register one first"
        ) from error
    wanted = aliases.get(version_or_alias, version_or_alias)
    try:
        if not str(wanted).isdecimal():
            raise RegistryError(
                f"model {name!r} has no alias {version_or_alias!r}, it has {sorted(aliases)}: use one of them "
                "or a version number"
            )
        return client.get_model_version(name, str(wanted))
    except MlflowException as error:
        known = sorted(int(found.version) for found in client.search_model_versions(f"name = '{name}'"))
        raise RegistryError(f"model {name!r} has no version {wanted}, it has {known}: use one of them") from error


def parse_model_uri(model: str) -> tuple[str, str]:
    """``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` as (name, alias or version).

    Raises:
        RegistryError: ``model`` is neither.
    """
    rest = model.removeprefix("models:/").strip("/")
    name, _, which = rest.partition("@") if "@" in rest else rest.partition("/")
    if not (model.startswith("models:/") and name and which):
        raise RegistryError(f"{model} names no version: write models:/NAME@ALIAS or models:/NAME/VERSION")
    return name, which


def run_of(model: str) -> str:
    """The run's id in ``runs:/RUN_ID[/PATH]``."""
    return model.removeprefix("runs:/").strip("/").partition("/")[0]


def registered_version(model: str, config: TrackingConfig) -> AvatarVersion:
    """The version that a ``models:/`` URI names now.

    Raises:
        RegistryError: the registry does not hold it.
    """
    name, which = parse_model_uri(model)
    found = find_version(open_client(config), name, which)
    return AvatarVersion(name, str(found.version), found.run_id)


def download_model(model: str, local_dir: str | Path, config: TrackingConfig | None = None) -> Path:
    """The folder with the avatar that ``model`` names, for ``lipflow.checkpoint.load_avatar``.

    Args:
        model: a path, ``file://…`` or ``s3://…`` of an avatar or of a training's OUT, ``models:/name@alias``,
            ``models:/name/version`` or ``runs:/RUN_ID[/PATH]``.
        local_dir: where remote files are put; a local model stays where it is.
        config: the tracking store, for ``models:/`` and ``runs:/``.

    Raises:
        RegistryError: the registry or the store does not hold it.
        StorageError: the storage cannot be read.
    """
    local_dir = Path(local_dir)
    if model.startswith("models:/"):
        client = open_client(config or TrackingConfig())
        name, which = parse_model_uri(model)
        version = find_version(client, name, which)
        uri = client.get_model_version_download_uri(name, version.version)
        return _avatar_folder(_download_artifacts(client, uri, local_dir, model), model)
    if model.startswith("runs:/"):
        client = open_client(config or TrackingConfig())
        run_id, _, path = model.removeprefix("runs:/").strip("/").partition("/")
        uri = f"runs:/{run_id}/{path or MODEL_FOLDER}"
        return _avatar_folder(_download_artifacts(client, uri, local_dir, model), model)
    if storage.is_local(model):
        folder = storage.local_path(model)
        if not folder.is_dir():
            raise RegistryError(f"no model folder at {folder}: give the OUT of a training, or models:/NAME@ALIAS")
        return _avatar_folder(folder, model)
    if not storage.listdir(model):
        raise RegistryError(f"nothing is stored under {model}: give the OUT of a training, or models:/NAME@ALIAS")
    inside = storage.join(model, MODEL_FOLDER)
    # The rest of a training's OUT is checkpoints, which nobody wants to wait for.
    storage.download_dir(inside if storage.exists(storage.join(inside, RECORD_FILE)) else model, local_dir)
    return _avatar_folder(local_dir, model)


def _download_artifacts(client: MlflowClient, uri: str, local_dir: Path, model: str) -> Path:
    import mlflow
    from mlflow.exceptions import MlflowException

    local_dir.mkdir(parents=True, exist_ok=True)
    try:
        found = mlflow.artifacts.download_artifacts(
            artifact_uri=uri, dst_path=str(local_dir), tracking_uri=client.tracking_uri
        )
    except (MlflowException, OSError) as error:
        reason = redact_text(str(error)).strip().splitlines()[0]
        raise RegistryError(f"{model} cannot be fetched: {reason}") from error
    return Path(found)


def _avatar_folder(folder: Path, model: str) -> Path:
    """The avatar inside a packaged MLflow model or a training's OUT, or the folder itself if it is neither."""
    if not (folder / _MLFLOW_FILE).is_file():
        inside = folder / MODEL_FOLDER
        return inside if (inside / RECORD_FILE).is_file() and not (folder / RECORD_FILE).is_file() else folder
    from mlflow.models import Model

    try:
        relative = Model.load(folder).flavors["python_function"]["artifacts"]["avatar"]["path"]
    except KeyError as error:
        raise RegistryError(
            f"{model} is an MLflow model, but not of an avatar: give one that lipflow registered"
        ) from error
    return folder / relative


def _signature(arrays, avatar):
    """Named tensors with a free first axis; outputs and params as ``cluster.records.pyfunc_model`` states them."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types.schema import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    from cluster.records.pyfunc_model import PARAMS

    num_vertices, size = avatar.context.topology.num_vertices, avatar.config.texture_size
    latent = (-1, avatar.config.latent_size)
    return ModelSignature(
        inputs=Schema([TensorSpec(array.dtype, (-1, *array.shape[1:]), name) for name, array in arrays.items()]),
        outputs=Schema(
            [
                TensorSpec(np.dtype(np.float32), (-1, num_vertices, 3), "vertices"),
                TensorSpec(np.dtype(np.uint8), (-1, 3, size, size), "textures"),
                TensorSpec(np.dtype(np.float32), latent, "latent_mean"),
                TensorSpec(np.dtype(np.float32), latent, "latent_std"),
                TensorSpec(np.dtype(np.float32), (-1, num_vertices), "vertex_std_mm"),
            ]
        ),
        params=ParamSchema([ParamSpec(name, DataType.long, default) for name, default in PARAMS.items()]),
    )


def _public_version(package: str) -> str:
    """Without a local part: ``2.13.0+cpu`` cannot be installed from PyPI."""
    return metadata.version(package).partition("+")[0]


@contextmanager
def registry_errors(name: str) -> Iterator[None]:
    """What MLflow raises, as a one-line :class:`RegistryError` about the model ``name``."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        reason = redact_text(str(error)).strip().splitlines()[0]
        raise RegistryError(f"the registry refused model {name!r}: {reason}") from error
