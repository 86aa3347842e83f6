"""The training job: ``lipflow train SHARDS OUT`` runs :mod:`cluster.training.loop` under Ray Train.

The state of a training is its weights, its optimiser and a step number, so a run that was killed goes on exactly
where its last checkpoint stands: submit the same command again. ``OUT`` holds::

    recipe.yaml     the settings; a second run with other settings is refused
    run.json        the MLflow run that is continued, and the digests of the shard set and of MODEL
    model/          with --add-driver: a copy of MODEL, which the workers read
    checkpoints/    the latest ones and the best (:mod:`cluster.training.checkpoints`)
    ray/            Ray Train's own notes
    avatar/         the best avatar by validation loss
    train.json      the summary, written last: a training without it is not finished
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow.fs
import ray
import typer
import yaml
from ray.train import (
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.recipe import load_recipe
from cluster.records.card import TrainingData
from cluster.records.redaction import redact
from cluster.records.registry import register_avatar
from cluster.records.run import Run
from cluster.records.tracking import initialise, tracked_run
from cluster.runtime import progress_bar, ray_cluster, unwrapped
from cluster.training.board import ProgressBoard
from cluster.training.checkpoints import CheckpointStore
from cluster.training.failures import FailAtOnce, worker_error
from cluster.training.loop import Training, train_worker
from cluster.training.process_group import NodeTorchConfig
from cluster.training.recipe import TrainRecipe
from cluster.training.state import AVATAR_FOLDER
from cluster.training.trained_model import TrainedModel, fetched, resolved
from lipflow.checkpoint import load_avatar
from lipflow.errors import ConfigError, StorageError
from pipeline import storage
from pipeline.loading.loader import ShardSet

RECIPE_FILE = "recipe.yaml"
RUN_FILE = "run.json"
SUMMARY_FILE = "train.json"

MODEL_FOLDER = "model"

FREE_TO_CHANGE = {
    "workers", "min_workers", "cpus_per_worker", "use_gpu", "max_failures", "tracking", "log_every_steps",
    "pictures_every_steps", "keep_checkpoints", "model",
}  # fmt: skip
"""Settings that may differ when a training is continued: they say where it runs and what is told, not what it computes.

Of the model its digest is compared, whatever its address. The number of micro-batches is that of the first submission.
"""


@dataclass(frozen=True)
class TrainSummary:
    """What a finished training came to.

    Attributes:
        avatar: URI of the best avatar's folder.
        method: the avatar's method.
        steps: optimiser steps done.
        best_step: the step whose checkpoint had the lowest validation loss.
        validation_loss: that loss.
        run_id: the MLflow run.
        shards_digest: digest of the shard set it was trained on.
        seconds: wall-clock time of the last submission.
        model: ``models:/`` URI of the registered version; None if it was not registered.
        resumed_from_step: where the last submission found the training; 0 for a fresh one.
    """

    avatar: str
    method: str
    steps: int
    best_step: int
    validation_loss: float
    run_id: str
    shards_digest: str
    seconds: float
    resumed_from_step: int
    model: str | None


def train(
    shards_uri: str,
    out_uri: str,
    recipe: TrainRecipe,
    *,
    callbacks: Sequence[UserCallback] = (),
    parent_run: str | None = None,
) -> TrainSummary:
    """Train an avatar or new drivers of one, or continue a training, or return the summary of a finished one.

    Args:
        shards_uri: the shard set.
        out_uri: where checkpoints and the avatar go.
        recipe: the settings.
        callbacks: run in Ray Train's controller, after those of this job.
        parent_run: MLflow run that this training is part of; None: that of the model that drivers are added to.

    Raises:
        ShardSetError: no usable shard set at ``shards_uri``.
        StorageError: ``out_uri`` cannot be written.
        RegistryError: there is no such model to add drivers to.
        ConfigError: ``out_uri`` holds a training with other settings, another shard set or another model; or the model
            cannot be given these drivers.
        LipflowError: what a worker raised, such as a non-finite loss.
    """
    shards = ShardSet.open(shards_uri)
    if not shards.frame_ids("val"):
        raise ConfigError(f"{shards_uri} has no validation frames, on which checkpoints are chosen: shard with some")
    out_uri = storage.normalize_uri(out_uri)
    storage.check_writable(out_uri)
    with fetched(recipe) as model:
        recipe = with_micro_batches(out_uri, resolved(recipe, model, shards))
        if parent_run is None and model is not None:
            parent_run = model.run_id
        return _train(shards_uri, shards, out_uri, recipe, model, callbacks, parent_run)


def _train(
    shards_uri: str,
    shards: ShardSet,
    out_uri: str,
    recipe: TrainRecipe,
    model: TrainedModel | None,
    callbacks: Sequence[UserCallback],
    parent_run: str | None,
) -> TrainSummary:
    previous_run = _check_same_training(out_uri, recipe, shards.digest, model)
    if storage.exists(storage.join(out_uri, SUMMARY_FILE)):
        return TrainSummary(**json.loads(storage.read_text(storage.join(out_uri, SUMMARY_FILE))))
    began = time.perf_counter()
    if recipe.tracking.unsent_dir is None:
        tracking = recipe.tracking.model_copy(update={"unsent_dir": out_uri})
        recipe = recipe.model_copy(update={"tracking": tracking})
    initialise(recipe.tracking)
    with (
        tracked_run(
            "train",
            f"train-{recipe.avatar.method}",
            config=recipe.tracking,
            recipe=recipe,
            shards_digest=shards.digest,
            parent_run=parent_run,
            run_id=previous_run,
        ) as run,
        ray_cluster(),
    ):
        text = yaml.safe_dump(redact(recipe.model_dump(mode="json")), sort_keys=False)
        storage.write_bytes(storage.join(out_uri, RECIPE_FILE), text.encode())
        model_uri = None if model is None else storage.join(out_uri, MODEL_FOLDER)
        if model is not None and model_uri is not None:
            storage.upload_dir(model.folder, model_uri)
        run_facts = {"run_id": run.run_id, "shards_digest": shards.digest, "model_digest": model and model.digest}
        storage.write_bytes(storage.join(out_uri, RUN_FILE), json.dumps(run_facts).encode())
        # Beside this process: the node of a worker may be lost.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote_board: Any = ray.remote(num_cpus=0)(ProgressBoard)
        board = remote_board.options(scheduling_strategy=here).remote()
        tracking = recipe.tracking
        if run.uri.startswith("sqlite:"):
            # Workers have working folders of their own. Other addresses reach them by recipe or environment: one
            # from the environment may hold credentials, which must not enter Ray's job records.
            tracking = tracking.model_copy(update={"uri": run.uri})
        training = Training(
            recipe.model_copy(update={"tracking": tracking}),
            shards=storage.normalize_uri(shards_uri),
            out=out_uri,
            cache_dir=str(Path(tempfile.gettempdir(), "lipflow-shards")),
            run_id=run.run_id,
            board=board,
            model=model_uri,
        )
        _fit(training, board, callbacks)
        store = CheckpointStore(out_uri)
        best = store.best()
        if best is None or best.validation_loss is None:
            raise StorageError(f"{out_uri} has lost its checkpoints: train again to another OUT")
        with tempfile.TemporaryDirectory() as folder:
            store.fetch(best, Path(folder))
            avatar_uri = storage.join(out_uri, AVATAR_FOLDER)
            storage.upload_dir(Path(folder, AVATAR_FOLDER), avatar_uri)
            version = _register(Path(folder, AVATAR_FOLDER), run, recipe, shards)
        summary = TrainSummary(
            avatar=avatar_uri,
            method=recipe.avatar.method,
            steps=recipe.steps,
            best_step=best.step,
            validation_loss=best.validation_loss,
            run_id=run.run_id,
            shards_digest=shards.digest,
            seconds=time.perf_counter() - began,
            resumed_from_step=ray.get(board.read.remote())[2] or 0,
            model=version,
        )
        run.log_metrics({"best/val_loss": summary.validation_loss, "best/step": summary.best_step}, recipe.steps)
    storage.write_bytes(storage.join(out_uri, SUMMARY_FILE), json.dumps(asdict(summary), indent=2).encode())
    return summary


def _fit(training: Training, board: Any, callbacks: Sequence[UserCallback]) -> None:
    """Train until all steps are done; workers that had to leave are started again."""
    recipe = training.recipe
    finished = threading.Event()
    with progress_bar() as progress:
        bar = progress.add_task(f"train {recipe.avatar.method}", total=recipe.steps, note="starting workers")

        def follow() -> None:
            while not finished.wait(1.0):
                step, note, _ = ray.get(board.read.remote())
                progress.update(bar, completed=step, note=note)

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            while (steps_done := _steps_done(_trainer(training, callbacks).fit())) < recipe.steps:
                board.update.remote(steps_done, "a worker had to leave, starting again")
        except TrainingFailedError as error:
            raise unwrapped(worker_error(error)) from error
        finally:
            finished.set()
            follower.join()
        progress.update(bar, completed=recipe.steps)


def _steps_done(result: Any) -> int:
    """What the training function returned; Ray's type stubs are those of its first version."""
    return result.return_value


def _trainer(training: Training, callbacks: Sequence[UserCallback]) -> TorchTrainer:
    recipe = training.recipe
    filesystem, storage_path = ray_storage(storage.join(training.out, "ray"))
    workers: Any = recipe.workers if recipe.min_workers is None else (recipe.min_workers, recipe.workers)
    return TorchTrainer(
        train_worker,  # type: ignore[arg-type]
        train_loop_config={"training": training},
        torch_config=NodeTorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=recipe.use_gpu,
            resources_per_worker={"CPU": recipe.cpus_per_worker},
        ),
        run_config=RunConfig(
            name="train",
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=recipe.max_failures),
            callbacks=[FailAtOnce(), *callbacks],  # type: ignore[list-item]
        ),
    )


def _register(folder: Path, run: Run, recipe: TrainRecipe, shards: ShardSet) -> str | None:
    if recipe.register_as is None or not load_avatar(folder).signals:
        return None
    # Other than metrics, a version cannot be sent later: a server that is away is waited for, and then it is an error.
    run.flush(recipe.tracking.wait_s)
    example = shards.frames(shards.frame_ids("val")[:1], shards.train_camera_ids[:1]).driving
    version = register_avatar(
        folder,
        run,
        example=example,
        shards_digest=shards.digest,
        data=TrainingData.of(shards),
        name=recipe.register_as,
    )
    return version.uri


def ray_storage(uri: str) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """The (filesystem, path) pair by which Ray reaches ``uri``.

    On S3 it is the storage module's own s3fs inside pyarrow's adapter: pyarrow's S3 client makes folders in a way
    that some S3-compatible servers refuse. Credentials stay in the environment and out of the pickled object.
    """
    if storage.is_local(uri):
        return None, str(storage.local_path(uri))
    filesystem, path = storage.filesystem(uri)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


def with_micro_batches(out_uri: str, recipe: TrainRecipe) -> TrainRecipe:
    """The recipe with a number of micro-batches: its own, else that of the training that ``out_uri`` holds."""
    if recipe.micro_batches is not None:
        return recipe
    recipe_uri = storage.join(out_uri, RECIPE_FILE)
    found = yaml.safe_load(storage.read_text(recipe_uri)) if storage.exists(recipe_uri) else {}
    pieces = found.get("micro_batches") or recipe.workers
    if recipe.workers > pieces:
        raise ConfigError(
            f"workers is {recipe.workers}, and {out_uri} holds a training with {pieces} micro_batches, so that some"
            f" would have nothing to do: set workers to {pieces} or fewer, or give another OUT"
        )
    return recipe.model_copy(update={"micro_batches": pieces})


def _check_same_training(
    out_uri: str, recipe: TrainRecipe, shards_digest: str, model: TrainedModel | None
) -> str | None:
    """The MLflow run of the training that ``out_uri`` holds, if any; ConfigError if it is another training."""
    recipe_uri = storage.join(out_uri, RECIPE_FILE)
    run_uri = storage.join(out_uri, RUN_FILE)
    if not (storage.exists(recipe_uri) and storage.exists(run_uri)):
        return None
    found = yaml.safe_load(storage.read_text(recipe_uri))
    wanted = recipe.model_dump(mode="json")
    differing = [key for key in wanted if key not in FREE_TO_CHANGE and wanted[key] != found.get(key)]
    run_facts = json.loads(storage.read_text(run_uri))
    if run_facts["shards_digest"] != shards_digest:
        differing.insert(0, "shard set")
    if run_facts.get("model_digest") != (model and model.digest):
        differing.insert(0, "model")
    if differing:
        raise ConfigError(
            f"{out_uri} holds a training with another {', '.join(differing)}: "
            "give the same settings to continue it, or another OUT"
        )
    return run_facts["run_id"]


def train_command(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Shard set: path, file:// or s3:// URI.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where checkpoints and the avatar go.")],
    add_driver: Annotated[
        list[str] | None,
        typer.Option(metavar="SIGNAL", help="hmc, frontal or keypoints: train its driver for MODEL alone; repeatable."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="With --add-driver: the avatar; a path, s3://, models:/ or runs:/ URI."),
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train an avatar on a shard set, or a new driver of a trained one; run again to continue."""
    given = {"add_drivers": add_driver, "model": model}
    overrides = [f"{name}={json.dumps(value)}" for name, value in given.items() if value]
    summary = train(shards, out, load_recipe(TrainRecipe, recipe, [*overrides, *(set_ or ())]))
    command.emit(
        asdict(summary),
        as_json,
        f"{summary.avatar}: {summary.method}, {summary.steps} steps, best validation loss "
        f"{summary.validation_loss:.4f} at step {summary.best_step}, {summary.seconds:.0f} s",
    )


if __name__ == "__main__":
    command.run_job("cluster.train", "train_command")
