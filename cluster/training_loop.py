"""What every training worker runs: a single-device loop over the model, with DDP put around it from outside.

The loop is a pure function of (recipe, shard set, step, rank, world size) but for the weights and the optimiser,
which are what a checkpoint holds.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
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
from torch import nn

from cluster.tracking import TrackingConfig, attached_run
from lipflow.checkpoint import load_avatar, save_avatar
from lipflow.config import AvatarConfig, LossConfig, RenderConfig, StrictConfig
from lipflow.losses import LossTerms, NonFiniteLossError, reconstruction_loss, training_loss
from lipflow.model.avatar import Avatar
from lipflow.model.context import AvatarContext
from lipflow.render.renderer import Renderer
from lipflow.types import FrameBatch
from pipeline.loading.loader import LoaderConfig, ShardLoader, ShardSet
from pipeline.sharding.splits import spread

OPTIMIZER_FILE = "optimizer.pt"
AVATAR_FOLDER = "avatar"
STATISTICS_FRAMES = 64
"""Training frames over which the driving images' statistics are taken."""


class TrainRecipe(StrictConfig):
    """All settings of a training.

    Attributes:
        avatar: the model.
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
        seed: of latent samples and input dropout; that of the weights is ``avatar.init_seed``.
        workers: processes, each with ``cpus_per_worker`` CPUs, and one GPU if ``use_gpu``.
        max_failures: how often the workers are started again from the last checkpoint.
        register_as: name in the model registry under which an avatar with drivers is registered; None: it is not.
        tracking: where MLflow keeps the run.
    """

    avatar: AvatarConfig = AvatarConfig()
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
    seed: int = 0
    workers: int = Field(2, gt=0)
    cpus_per_worker: float = Field(1, gt=0)
    use_gpu: bool = False
    max_failures: int = Field(2, ge=0)
    register_as: str | None = "lipflow"
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> TrainRecipe:
        if self.avatar.method == "dam" and (self.loss.latent_estimate != "kl" or self.loss.reverse_weight > 0):
            raise ValueError(
                "avatar.method is dam, whose prior is N(0, I): loss.latent_estimate and loss.reverse_weight need a"
                " driven prior; leave them out, or set avatar.method=conditional or lipflow"
            )
        if self.render.backend == "cuda" and not self.use_gpu:
            raise ValueError("render.backend is cuda and use_gpu is false: set use_gpu=true, or render.backend=auto")
        return self


class Objective(nn.Module):
    """The training loss as one module, so that DDP's hooks see every gradient."""

    def __init__(self, avatar: Avatar, renderer: Renderer, config: LossConfig):
        super().__init__()
        self.avatar = avatar
        self._renderer = renderer
        self._config = config

    def forward(self, batch: FrameBatch, generator: torch.Generator) -> LossTerms:
        """Loss of one batch; see :func:`lipflow.losses.training_loss`."""
        return training_loss(self.avatar, self._renderer, batch, self._config, generator)


def avatar_for(shards: ShardSet, config: AvatarConfig) -> Avatar:
    """A fresh avatar for the faces, cameras and driving signals of a shard set."""
    frontal = {camera.camera_id: camera.image_size_hw for camera in shards.cameras}.get(shards.frontal_camera_id or "")
    context = AvatarContext(
        topology=shards.topology,
        normalization=shards.normalization,
        camera_ids=tuple(camera.camera_id for camera in shards.cameras),
        train_camera_ids=tuple(shards.train_camera_ids),
        headset_cameras=tuple(shards.headset_cameras),
        frontal_camera_id=shards.frontal_camera_id,
        frontal_image_hw=frontal,
        keypoint_names=tuple(shards.keypoint_names),
    )
    return Avatar(config, context)


def parameter_groups(avatar: Avatar, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """Adam's two groups: colour correction, and everything else."""
    color = list(avatar.color.parameters())
    rest = [parameter for name, parameter in avatar.named_parameters() if not name.startswith("color.")]
    rates = (recipe.learning_rate, recipe.learning_rate * recipe.color_learning_rate_factor)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate}
        for parameters, rate in zip((rest, color), rates, strict=True)
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


@torch.no_grad()
def validation_loss(
    avatar: Avatar, renderer: Renderer, batches: list[FrameBatch], config: LossConfig
) -> tuple[float, int]:
    """Sum over frames of the mean reconstruction loss, and the number of frames.

    The latents are the posterior mean and, for each driving signal, the prior's start ``f^-1(mu)``: the best
    avatar is one that is both accurate and drivable.
    """
    avatar.eval()
    total, frames = 0.0, 0
    for batch in batches:
        latents = [avatar.encode(batch.vertices, batch.average_texture).mean]
        latents += [
            avatar.start_from([signal], batch.driving)
            for signal in batch.driving.available()
            if signal in avatar.signals
        ]
        losses = [reconstruction_loss(avatar, renderer, z, batch, config).total.item() for z in latents]
        total += sum(losses) / len(losses) * len(batch.frame_ids)
        frames += len(batch.frame_ids)
    avatar.train()
    return total, frames


def train_worker(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker.

    Args:
        settings: ``recipe`` (a :class:`TrainRecipe` as a dictionary), ``shards`` (URI), ``cache_dir``,
            ``run_id`` of the MLflow run, ``board`` (progress actor).
    """
    recipe = TrainRecipe.model_validate(settings["recipe"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    shards = ShardSet.open(settings["shards"])
    avatar = avatar_for(shards, recipe.avatar)
    render = recipe.render
    renderer = Renderer(shards.topology, render.backend, filter=render.filter, antialias=render.antialias).to(device)
    model = ray.train.torch.prepare_model(
        Objective(avatar, renderer, recipe.loss), parallel_strategy_kwargs={"find_unused_parameters": True}
    )
    optimizer = torch.optim.Adam(parameter_groups(avatar, recipe), fused=True)
    step = _restore(avatar, optimizer)
    if step == 0:
        _measure_driving(avatar, shards)
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
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            norm = nn.utils.clip_grad_norm_(avatar.parameters(), recipe.gradient_clip_norm)
            if not torch.isfinite(norm):
                raise NonFiniteLossError(
                    f"the gradient is not finite at step {step}, frames {', '.join(batch.frame_ids)}: "
                    "lower the learning rate, or look at these frames"
                )
            optimizer.step()
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
                loss = _reduced_validation_loss(avatar, renderer, validation, recipe.loss, device)
                if run is not None:
                    run.log_metrics({"val/loss": loss}, step)
                    # What a checkpoint covers is not computed again, so it must not wait in memory.
                    run.try_flush()
                _report(avatar, optimizer, step, loss, rank)
                began = time.perf_counter()


def _measure_driving(avatar: Avatar, shards: ShardSet) -> None:
    """The statistics of the driving images, over the same training frames on every rank."""
    frame_ids = spread(shards.frame_ids("train"), STATISTICS_FRAMES)
    avatar.measure_driving(shards.frames(frame_ids, shards.train_camera_ids[:1]).driving)


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


def _reduced_validation_loss(
    avatar: Avatar, renderer: Renderer, batches: list[FrameBatch], config: LossConfig, device: torch.device
) -> float:
    sums = torch.tensor(validation_loss(avatar, renderer, batches, config), dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return (sums[0] / sums[1]).item()
