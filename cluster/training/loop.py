"""What every training worker runs: a single-device loop over the model, with DDP put around it from outside.

The loop is a pure function of (recipe, shard set, :class:`~cluster.training.state.TrainingState`), which is what a
checkpoint holds. How many workers there are, and where they run (:class:`~cluster.training.worker.Worker`), changes
what it computes by no more than the order in which gradients are added up.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cluster.records.tracking import attached_run
from cluster.scores.scene import context_of
from cluster.training.checkpoints import CheckpointStore, CheckpointWriter
from cluster.training.micro_batches import MicroBatches, seed_of
from cluster.training.objective import Objective
from cluster.training.optimisation import descend, learning_rate_factor, parameter_groups, set_learning_rate
from cluster.training.pictures import comparison_sheet
from cluster.training.recipe import TrainRecipe
from cluster.training.reporting import Reporter
from cluster.training.state import AVATAR_FOLDER, TrainingState
from cluster.training.worker import Worker, ray_worker
from lipflow.checkpoint import load_avatar
from lipflow.losses import LossTerms
from lipflow.model.avatar import Avatar
from lipflow.model.extension import with_drivers
from lipflow.render.renderer import Renderer
from pipeline import storage
from pipeline.loading.loader import ShardSet
from pipeline.sharding.splits import spread

STATISTICS_FRAMES = 64
"""Training frames over which the driving images' statistics are taken."""


@dataclass(frozen=True)
class Training:
    """A training as its workers are given it.

    Attributes:
        recipe: all settings; not in the text of this object, which Ray keeps: an address may hold a password.
        shards: URI of the shard set.
        out: URI of the training, under which its checkpoints are.
        cache_dir: for copies of remote shards; None: a temporary folder.
        run_id: of the MLflow run; None: nothing is logged.
        board: the progress actor, if there is one.
        model: URI of the avatar that is given drivers; None: a fresh one is trained.
    """

    recipe: TrainRecipe = field(repr=False)
    shards: str
    out: str
    cache_dir: str | None = None
    run_id: str | None = None
    board: Any | None = None
    model: str | None = None


def train_worker(settings: dict[str, Any]) -> int:
    """The function that Ray Train runs on every worker, with ``settings["training"]``; returns the steps done."""
    return train_loop(settings["training"], ray_worker())


def train_loop(training: Training, worker: Worker) -> int:
    """Train until all steps are done, or until a worker is asked to leave, from the latest checkpoint on.

    Returns:
        The steps that are done, and covered by a checkpoint.

    Raises:
        NonFiniteLossError: a loss or a gradient is not finite.
        StorageError: shards cannot be read, or checkpoints not be written.
    """
    recipe, device = training.recipe, worker.device
    shards = ShardSet.open(training.shards)
    avatar = untrained_avatar(shards, recipe, training.model).to(device)
    if recipe.channels_last:
        avatar.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = TrainingState(avatar, torch.optim.Adam(parameter_groups(avatar, recipe), fused=True), recipe.ema_decay)
    store = CheckpointStore(training.out, recipe.keep_checkpoints)
    _restore(state, store, worker)
    if state.step == 0:
        _measure_driving(avatar, shards, recipe.add_drivers or avatar.signals)
    render = recipe.render
    renderer = Renderer(shards.topology, render.backend, filter=render.filter, antialias=render.antialias).to(device)
    if recipe.compile:
        avatar.encoder.compile()
        avatar.decoder.compile()
    objective = Objective(
        avatar, renderer, recipe.loss, recipe.add_drivers,
        validation_loss=recipe.validation_loss, validation_signals=recipe.validation_signals,
        bfloat16=recipe.precision == "bfloat16",
    )  # fmt: skip
    step = _Step(objective, state.optimizer, recipe, worker)
    batches = MicroBatches(
        shards, recipe.loader, micro_batches=recipe.pieces, rank=worker.rank, world_size=worker.world_size,
        cache_dir=training.cache_dir, step=state.step,
    )  # fmt: skip
    validation = _Validation(shards, recipe, worker)
    first = worker.rank == 0
    logged = first and training.run_id is not None
    tracking = attached_run(recipe.tracking, training.run_id or "") if logged else nullcontext()
    writer = CheckpointWriter(store)
    with tracking as run:
        reporter = Reporter(recipe, device, run, training.board if first else None)
        reporter.started(state.step)
        leaving = False
        while state.step < recipe.steps and not leaving:
            norm, losses, waited_s = step.take(batches, state.step)
            rate = recipe.learning_rate * learning_rate_factor(state.step, recipe)
            state.advance()
            if first:
                reporter.stepped(state.step, losses, norm, rate, waited_s)
            leaving = worker.anyone_asked_to_leave()
            due = state.step % recipe.checkpoint_every_steps == 0 or state.step == recipe.steps
            pictured = recipe.pictures_every_steps is not None and state.step % recipe.pictures_every_steps == 0
            # Who has to leave may not have the time to validate.
            loss = validation.loss(objective, state.exported) if due else None
            if first and loss is not None:
                reporter.validated(state.step, loss)
            if first and (due or leaving):
                writer.write(state.copy, state.step, loss)
            # Last, as it may have to wait for all workers and for the one before.
            if loss is not None:
                worker.report({"step": state.step, "val_loss": loss})
            if pictured and first and validation.batches:
                sheet = comparison_sheet(state.exported, renderer, validation.batches, f"step {state.step}")
                reporter.pictured(state.step, sheet)
            if due or pictured:
                reporter.restart_clock()
        writer.close()
    return state.step


class _Step:
    """The optimiser's step over a worker's micro-batches; the gradients are the mean over those of all workers."""

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, recipe: TrainRecipe, worker: Worker):
        self._optimizer, self._recipe, self._worker = optimizer, recipe, worker
        self._model = _distributed(objective, worker) if worker.world_size > 1 else objective
        # DDP takes the mean over workers, and here it is that over micro-batches which is wanted.
        self._share = worker.world_size / recipe.pieces
        self._generator = torch.Generator(worker.device)

    def take(self, batches: MicroBatches, step: int) -> tuple[Tensor, list[LossTerms], float]:
        """Step number ``step``.

        Returns:
            The gradient's norm before it was clipped, the losses of this worker's micro-batches, and the seconds that
            went by until these were there.
        """
        set_learning_rate(self._optimizer, step, self._recipe)
        self._optimizer.zero_grad(set_to_none=True)
        losses, frame_ids, waited_s = [], [], 0.0
        pieces = batches.of_step()
        for number in batches.numbers:
            asked = time.perf_counter()
            batch = next(pieces).to(self._worker.device)
            waited_s += time.perf_counter() - asked
            self._generator.manual_seed(seed_of(self._recipe.seed, step, number))
            with self._reduction(last=number == batches.numbers[-1]):
                terms: LossTerms = self._model(batch, self._generator)
                (terms.total * self._share).backward()
            losses.append(terms)
            frame_ids += batch.frame_ids
        return descend(self._optimizer, self._recipe.gradient_clip_norm, step, frame_ids), losses, waited_s

    def _reduction(self, *, last: bool) -> AbstractContextManager[None]:
        """Workers add up their gradients with those of the last micro-batch."""
        if last or not isinstance(self._model, DistributedDataParallel):
            return nullcontext()
        return self._model.no_sync()


def _distributed(objective: Objective, worker: Worker) -> DistributedDataParallel:
    # Buffers are constants, and need not be sent before every step. The setting's name is newer than the oldest torch.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    settings: dict[str, Any] = {"find_unused_parameters": True, buffers: False}
    if worker.device.type == "cuda":
        settings["device_ids"] = [worker.device]
    return DistributedDataParallel(objective, **settings)


class _Validation:
    """The validation frames, evenly spread over the split and shared by the workers.

    Attributes:
        batches: this worker's, of one frame each.
    """

    def __init__(self, shards: ShardSet, recipe: TrainRecipe, worker: Worker):
        frame_ids = spread(shards.frame_ids("val"), recipe.validation_frames)
        camera_ids = spread(shards.train_camera_ids, recipe.validation_cameras)
        self._worker, self._frames = worker, len(frame_ids)
        self.batches = [
            shards.frames([frame_id], camera_ids).to(worker.device)
            for frame_id in frame_ids[worker.rank :: worker.world_size]
        ]

    def loss(self, objective: Objective, avatar: Avatar) -> float:
        """The mean over frames; bit for bit the same with any number of workers."""
        losses = torch.zeros(self._frames, dtype=torch.float64, device=self._worker.device)
        for place, batch in enumerate(self.batches):
            losses[self._worker.rank + place * self._worker.world_size] = objective.validate([batch], avatar)[0]
        if self._worker.world_size > 1:
            torch.distributed.all_reduce(losses)
        return losses.mean().item()


def untrained_avatar(shards: ShardSet, recipe: TrainRecipe, model_uri: str | None) -> Avatar:
    """What a training starts with: a fresh avatar, or the one at ``model_uri`` with new drivers."""
    if model_uri is None:
        return Avatar(recipe.avatar, context_of(shards))
    with tempfile.TemporaryDirectory() as folder:
        storage.download_dir(model_uri, Path(folder, AVATAR_FOLDER))
        return with_drivers(load_avatar(Path(folder, AVATAR_FOLDER)), recipe.avatar, context_of(shards))


def _measure_driving(avatar: Avatar, shards: ShardSet, signals: Sequence[str]) -> None:
    """The statistics of the driving images, over the same training frames on every rank."""
    frame_ids = spread(shards.frame_ids("train"), STATISTICS_FRAMES)
    avatar.measure_driving(shards.frames(frame_ids, shards.train_camera_ids[:1]).driving, signals)


def _restore(state: TrainingState, store: CheckpointStore, worker: Worker) -> None:
    """The latest checkpoint, if there is one: the first worker chooses it, and the others take the same."""
    checkpoint = store.read_latest(state.restore) if worker.rank == 0 else None
    name = worker.from_first(None if checkpoint is None else checkpoint.name)
    if worker.rank > 0 and name is not None:
        store.read(name, state.restore)
