"""What every training worker runs: a single-device loop over the model, with DDP put around it from outside.

The loop is a pure function of (recipe, shard set, step, rank, world size) but for the weights and the optimiser,
which are what a checkpoint holds.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from pyarrow.fs import LocalFileSystem
from pydantic import Field, model_validator
from ray.train import Checkpoint
from torch import Tensor, nn

from cluster.records.tracking import TrackingConfig, attached_run
from cluster.scores.scene import context_of
from cluster.training.objective import Objective
from lipflow.checkpoint import load_avatar, save_avatar
from lipflow.config import AvatarConfig, LossConfig, RenderConfig, Signal, StrictConfig
from lipflow.losses import LossTerms, NonFiniteLossError
from lipflow.model.avatar import Avatar
from lipflow.model.extension import with_drivers
from lipflow.render.renderer import Renderer
from lipflow.types import FrameBatch
from pipeline import storage
from pipeline.loading.loader import LoaderConfig, ShardLoader, ShardSet
from pipeline.sharding.splits import spread

OPTIMIZER_FILE = "optimizer.pt"
AVATAR_FOLDER = "avatar"
STATISTICS_FRAMES = 64
"""Training frames over which the driving images' statistics are taken."""


class TrainRecipe(StrictConfig):
    """All settings of a training.

    Attributes:
        avatar: the model; with ``add_drivers`` the trained avatar's own, of which driver settings alone may be given.
        add_drivers: signals whose drivers are trained for ``model``, all the rest of which is frozen; empty: a new
            avatar is trained.
        model: a trained avatar: a path, ``file://``, ``s3://``, ``models:/`` or ``runs:/`` URI.
        loss: the objective.
        render: how images are drawn.
        loader: batches of one worker.
        steps: optimiser steps; a step sees ``workers x frames_per_batch x views_per_frame`` views.
        learning_rate: Adam's, after ``warmup_steps`` of linear warm-up, then cosine decay to a twentieth.
        color_learning_rate_factor: how much faster the cameras' gains and biases are learned: they have few
            parameters and a long way to go.
        gradient_clip_norm: largest global gradient norm.
        validation_frames: frames of the validation split on which checkpoints are compared.
        validation_cameras: training cameras on which they are compared, evenly spread.
        validation_loss: weights of the reconstruction by which they are compared; None: those of ``loss``. Trainings
            with other weights have comparable validation losses only if this is the same for all.
        validation_signals: signals whose drivers' answers are judged beside the encoder's; None: all of the avatar's;
            empty: the encoder's reconstruction alone, which is what avatars with and without drivers have in common.
        seed: of latent samples and input dropout; that of the weights is ``avatar.init_seed``.
        workers: processes, each with ``cpus_per_worker`` CPUs, and one GPU if ``use_gpu``.
        max_failures: how often the workers are started again from the last checkpoint.
        register_as: name in the model registry under which an avatar with drivers is registered; None: it is not.
        tracking: where MLflow keeps the run.
    """

    avatar: AvatarConfig = AvatarConfig()
    add_drivers: tuple[Signal, ...] = ()
    model: str | None = None
    loss: LossConfig = LossConfig()
    render: RenderConfig = RenderConfig()
    loader: LoaderConfig = LoaderConfig()
    steps: int = Field(2000, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    color_learning_rate_factor: float = Field(10.0, gt=0)
    gradient_clip_norm: float = Field(1.0, gt=0)
    checkpoint_every_steps: int = Field(200, gt=0)
    log_every_steps: int = Field(10, gt=0)
    validation_frames: int = Field(8, gt=0)
    validation_cameras: int = Field(4, gt=0)
    validation_loss: LossConfig | None = None
    validation_signals: tuple[Signal, ...] | None = None
    seed: int = 0
    workers: int = Field(2, gt=0)
    cpus_per_worker: float = Field(1, gt=0)
    use_gpu: bool = False
    max_failures: int = Field(2, ge=0)
    register_as: str | None = "lipflow"
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> TrainRecipe:
        gaussian = self.avatar.method == "dam-regressor" or (self.avatar.method == "dam" and not self.add_drivers)
        if gaussian and self.loss.latent_estimate != "kl":
            raise ValueError(
                f"avatar.method is {self.avatar.method}, whose KL to N(0, I) is no estimate: leave "
                "loss.latent_estimate out, or set avatar.method=conditional, lipflow or flow-gaussian"
            )
        if (gaussian or self.avatar.method == "flow-gaussian") and self.loss.reverse_weight > 0:
            raise ValueError(
                f"avatar.method is {self.avatar.method}, whose prior is N(0, I): loss.reverse_weight needs a driven "
                "prior; leave it out, or set avatar.method=conditional or lipflow"
            )
        if self.avatar.method == "dam-regressor" and not self.add_drivers:
            raise ValueError(
                "avatar.method is dam-regressor, which is a trained dam with drivers: train one with"
                " avatar.method=dam, then give it drivers with --add-driver and --model"
            )
        if self.loss.no_signal_weight > 0 and not (self.avatar.has_driven_prior or self.add_drivers):
            raise ValueError(
                f"avatar.method is {self.avatar.method}, which has no driven prior to teach what faces are like without"
                " a signal: leave loss.no_signal_weight out, or set avatar.method=conditional or lipflow"
            )
        self._check_drivers()
        self._check_validation()
        if self.render.backend == "cuda" and not self.use_gpu:
            raise ValueError("render.backend is cuda and use_gpu is false: set use_gpu=true, or render.backend=auto")
        return self

    def _check_validation(self) -> None:
        judged = self.validation_loss or self.loss
        if judged.image_weight == judged.geometry_weight == judged.average_texture_weight == 0:
            named = "loss" if self.validation_loss is None else "validation_loss"
            raise ValueError(
                f"{named} has no weight on the reconstruction, by which checkpoints are compared: raise "
                "validation_loss.image_weight or validation_loss.geometry_weight"
            )
        if self.validation_signals and self.add_drivers:
            raise ValueError("with add_drivers the new drivers alone are judged: leave validation_signals out")
        if self.validation_signals and not self.avatar.has_drivers:
            raise ValueError(
                f"avatar.method is {self.avatar.method}, which has no drivers to be judged: "
                "leave validation_signals out"
            )
        unknown = set(self.validation_signals or ()) - set(self.avatar.signals or self.validation_signals or ())
        if unknown:
            raise ValueError(f"validation_signals names {min(unknown)}, which avatar.signals leaves out: add it there")

    def _check_drivers(self) -> None:
        if bool(self.add_drivers) != (self.model is not None):
            raise ValueError(
                f"add_drivers is {list(self.add_drivers)} and model is {self.model}: give both (--add-driver SIGNAL"
                " --model MODEL), or neither"
            )
        if not self.add_drivers:
            return
        if len(set(self.add_drivers)) != len(self.add_drivers):
            raise ValueError(f"add_drivers names a signal twice: {list(self.add_drivers)}")
        unread = [signal for signal in self.add_drivers if signal not in self.loader.signals]
        if unread:
            raise ValueError(f"loader.signals lacks {unread[0]}, for which a driver is to be trained: add it")
        if self.loss.latent_weight == self.loss.prior_weight == self.loss.reverse_weight == 0:
            raise ValueError("loss has no term for the new drivers: raise loss.latent_weight or loss.prior_weight")
        if self.loss.no_signal_weight > 0:
            raise ValueError(
                "loss.no_signal_weight teaches an avatar's flow and encoder, and with add_drivers the drivers alone are"
                " trained: leave it out"
            )


def untrained_avatar(shards: ShardSet, recipe: TrainRecipe, model_uri: str | None) -> Avatar:
    """What a training starts with: a fresh avatar, or the one at ``model_uri`` with new drivers."""
    if model_uri is None:
        return Avatar(recipe.avatar, context_of(shards))
    with tempfile.TemporaryDirectory() as folder:
        storage.download_dir(model_uri, Path(folder, AVATAR_FOLDER))
        return with_drivers(load_avatar(Path(folder, AVATAR_FOLDER)), recipe.avatar, context_of(shards))


def parameter_groups(avatar: Avatar, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """Adam's groups: colour correction, and everything else that is not frozen."""
    trained = {name: parameter for name, parameter in avatar.named_parameters() if parameter.requires_grad}
    color = [parameter for name, parameter in trained.items() if name.startswith("color.")]
    rest = [parameter for name, parameter in trained.items() if not name.startswith("color.")]
    rates = (recipe.learning_rate, recipe.learning_rate * recipe.color_learning_rate_factor)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate}
        for parameters, rate in zip((rest, color), rates, strict=True)
        if parameters
    ]


def learning_rate_factor(step: int, recipe: TrainRecipe) -> float:
    """Linear warm-up, then cosine decay to 0.05; depends on nothing but the step."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def seed_of(*parts: int) -> int:
    """One well-mixed seed for a tuple of integers such as (seed, step, rank)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batches_from(loader: ShardLoader, step: int) -> Iterator[FrameBatch]:
    """Batches for ``step`` and all later steps, epoch after epoch."""
    epoch, start = divmod(step, loader.batches_per_epoch)
    while True:
        yield from loader.epoch(epoch, start_batch=start)
        epoch, start = epoch + 1, 0


def descend(
    loss: Tensor, optimizer: torch.optim.Optimizer, clip_norm: float, step: int, frame_ids: Sequence[str]
) -> Tensor:
    """One optimiser step; returns the gradient's norm before it was clipped to ``clip_norm``.

    Raises:
        NonFiniteLossError: the gradient is not finite; nothing has changed then.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, clip_norm)
    if not torch.isfinite(norm):
        raise NonFiniteLossError(
            f"the gradient is not finite at step {step}, frames {', '.join(frame_ids)}: "
            "lower the learning rate, or look at these frames"
        )
    optimizer.step()
    return norm


def train_worker(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker.

    Args:
        settings: ``recipe`` (a :class:`TrainRecipe` as a dictionary), ``shards`` (URI), ``cache_dir``,
            ``run_id`` of the MLflow run, ``board`` (progress actor), ``model`` (URI of the avatar that is given
            drivers, or None).
    """
    recipe = TrainRecipe.model_validate(settings["recipe"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    shards = ShardSet.open(settings["shards"])
    avatar = untrained_avatar(shards, recipe, settings["model"])
    render = recipe.render
    renderer = Renderer(shards.topology, render.backend, filter=render.filter, antialias=render.antialias).to(device)
    objective = Objective(
        avatar, renderer, recipe.loss, recipe.add_drivers,
        validation_loss=recipe.validation_loss, validation_signals=recipe.validation_signals,
    )  # fmt: skip
    model = ray.train.torch.prepare_model(objective, parallel_strategy_kwargs={"find_unused_parameters": True})
    optimizer = torch.optim.Adam(parameter_groups(avatar, recipe), fused=True)
    step = _restore(avatar, optimizer)
    if step == 0:
        _measure_driving(avatar, shards, recipe.add_drivers or avatar.signals)
    if rank == 0:
        settings["board"].started.remote(step)

    loader = ShardLoader(
        shards, "train", shards.train_camera_ids, recipe.loader, rank=rank, world_size=world_size,
        cache_dir=settings["cache_dir"],
    )  # fmt: skip
    validation = _validation_batches(shards, recipe, rank, world_size, device)
    generator = torch.Generator(device)
    tracking = attached_run(recipe.tracking, settings["run_id"]) if rank == 0 else nullcontext()
    with tracking as run:
        waited_s, began = 0.0, time.perf_counter()
        batches = batches_from(loader, step)
        while step < recipe.steps:
            asked = time.perf_counter()
            batch = next(batches).to(device)
            waited_s += time.perf_counter() - asked
            generator.manual_seed(seed_of(recipe.seed, step, rank))
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * learning_rate_factor(step, recipe)
            losses: LossTerms = model(batch, generator)
            norm = descend(losses.total, optimizer, recipe.gradient_clip_norm, step, batch.frame_ids)
            step += 1
            if run is not None and (step % recipe.log_every_steps == 0 or step == recipe.steps):
                elapsed_s = time.perf_counter() - began
                views = world_size * batch.images.shape[0] * batch.images.shape[1] * recipe.log_every_steps
                reported = losses.terms | losses.diagnostics
                metrics = {f"train/{name}": value.item() for name, value in reported.items()}
                metrics |= {
                    "train/total": losses.total.item(),
                    "train/gradient_norm": norm.item(),
                    "speed/views_per_s": views / elapsed_s,
                    "speed/data_wait_share": waited_s / elapsed_s,
                }
                run.log_metrics(metrics, step)
                settings["board"].update.remote(step, f"loss {metrics['train/total']:.4f}")
                waited_s, began = 0.0, time.perf_counter()
            if step % recipe.checkpoint_every_steps == 0 or step == recipe.steps:
                loss = _reduced_validation_loss(objective, validation, device)
                if run is not None:
                    run.log_metrics({"val/loss": loss}, step)
                    # What a checkpoint covers is not computed again, so it must not wait in memory.
                    run.try_flush()
                _report(avatar, optimizer, step, loss, rank)
                began = time.perf_counter()


def _measure_driving(avatar: Avatar, shards: ShardSet, signals: Sequence[str]) -> None:
    """The statistics of the driving images, over the same training frames on every rank."""
    frame_ids = spread(shards.frame_ids("train"), STATISTICS_FRAMES)
    avatar.measure_driving(shards.frames(frame_ids, shards.train_camera_ids[:1]).driving, signals)


@contextmanager
def checkpoint_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """The files of a checkpoint, in a folder of this process alone where they have to be fetched.

    Ray's own ``as_directory`` gives all processes of a node one folder, and one that is done with it may remove it
    while another one is still filling it.
    """
    if isinstance(checkpoint.filesystem, LocalFileSystem):
        yield Path(checkpoint.path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(checkpoint.to_directory(folder))


def _restore(avatar: Avatar, optimizer: torch.optim.Optimizer) -> int:
    """Load the latest checkpoint, if there is one; returns the number of steps that are done."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint_folder(checkpoint) as folder:
        avatar.load_state_dict(load_avatar(Path(folder, AVATAR_FOLDER)).state_dict())
        saved = torch.load(Path(folder, OPTIMIZER_FILE), weights_only=True, map_location="cpu")
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def _report(avatar: Avatar, optimizer: torch.optim.Optimizer, step: int, loss: float, rank: int) -> None:
    """A barrier on all ranks; rank 0 brings the checkpoint."""
    metrics = {"step": step, "val_loss": loss}
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_avatar(avatar, Path(folder, AVATAR_FOLDER))
        torch.save({"optimizer": optimizer.state_dict(), "step": step}, Path(folder, OPTIMIZER_FILE))
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _validation_batches(
    shards: ShardSet, recipe: TrainRecipe, rank: int, world_size: int, device: torch.device
) -> list[FrameBatch]:
    """This rank's share of the validation frames, one batch each, evenly spread over the split."""
    frame_ids = spread(shards.frame_ids("val"), recipe.validation_frames)
    camera_ids = spread(shards.train_camera_ids, recipe.validation_cameras)
    return [shards.frames([frame_id], camera_ids).to(device) for frame_id in frame_ids[rank::world_size]]


def _reduced_validation_loss(objective: Objective, batches: list[FrameBatch], device: torch.device) -> float:
    sums = torch.tensor(objective.validate(batches), dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return (sums[0] / sums[1]).item()
