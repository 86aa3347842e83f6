"""Trainings of seconds in plain processes: the loop as it is, without Ray and MLflow."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing

from cluster.ports import free_port
from cluster.training.checkpoints import CheckpointStore
from cluster.training.loop import Training, train_loop
from cluster.training.recipe import TrainRecipe
from cluster.training.state import STATE_FILE
from cluster.training.worker import Worker, listen_for_sigterm, sigterm_came
from lipflow.checkpoint import load_avatar
from lipflow.config import AvatarConfig
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.loading.loader import LoaderConfig
from pipeline.sharding.shards import ShardConfig, write_shards

LEFT_EARLY = 3

AVATAR = AvatarConfig.small(
    texture_size=32,
    latent_size=6,
    hidden_size=12,
    encoder_channels=(6, 5, 4),
    decoder_channels=(6, 5, 4),
    driver_image_size=16,
    driver_channels=(5, 4),
    driver_hidden_size=12,
    flow_hidden_size=8,
)


DOME = DomeConfig(
    cameras=4,
    image_size_hw=(24, 18),
    texture_size=32,
    segments=5,
    frames_per_segment=3,
    headset_image_size_hw=(8, 8),
    supersampling=1,
)


def write_tiny_shards(folder: Path) -> str:
    """A shard set of 15 frames in ``folder``; returns its URI."""
    write_dome(DOME, str(folder / "dome"))
    write_shards(open_capture(str(folder / "dome")), ShardConfig(frames_per_shard=3), str(folder / "shards"))
    return str(folder / "shards")


def tiny(**changes: Any) -> TrainRecipe:
    """Six steps of a LiP-Flow, with a validation after the third and the last."""
    settings: dict[str, Any] = {
        "avatar": AVATAR,
        "loader": LoaderConfig(frames_per_batch=1, views_per_frame=2, decode_threads=1),
        "steps": 6,
        "warmup_steps": 2,
        "checkpoint_every_steps": 3,
        "log_every_steps": 1,
        "validation_frames": 3,
        "validation_cameras": 2,
        "micro_batches": 2,
    }
    return TrainRecipe(**(settings | changes))


class Leaves:
    """Asks to leave after so many steps."""

    def __init__(self, after_steps: int | None = None):
        self._left = after_steps

    def __call__(self) -> bool:
        if self._left is None:
            return False
        self._left -= 1
        return self._left <= 0


def train_alone(training: Training, leaves: Callable[[], bool] | None = None) -> tuple[int, list[Mapping[str, float]]]:
    """Train in this process; returns the steps done and what was reported."""
    reports: list[Mapping[str, float]] = []
    worker = Worker(0, 1, torch.device("cpu"), reports.append, leaves or Leaves())
    return train_loop(training, worker), reports


def train_together(training: Training, workers: int, last_asks_to_leave_after: int | None = None) -> None:
    """Train in ``workers`` processes of their own, connected by gloo; the last one may be asked to leave."""
    multiprocessing.spawn(_run, (training, workers, free_port(), last_asks_to_leave_after), workers)


def _run(rank: int, training: Training, workers: int, port: int, last_leaves_after: int | None) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    leaves = Leaves(last_leaves_after if rank == workers - 1 else None)
    train_loop(training, Worker(rank, workers, torch.device("cpu"), lambda metrics: None, leaves))
    torch.distributed.destroy_process_group()


def train_as_a_ray_worker_does(training: Training) -> None:
    """Train in a thread, with the signals in the main one; exits with LEFT_EARLY if steps are left to do."""
    listen_for_sigterm()
    worker = Worker(0, 1, torch.device("cpu"), lambda metrics: None, sigterm_came)
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(train_loop(training, worker)))
    thread.start()
    thread.join()
    sys.exit(0 if done == [training.recipe.steps] else LEFT_EARLY)


def end_of(training: Training, folder: Path) -> dict[str, Tensor]:
    """Everything in the latest checkpoint, by name, and its validation loss."""
    store = CheckpointStore(training.out)
    checkpoint = store.complete()[-1]
    store.fetch(checkpoint, folder / checkpoint.name)
    values = {f"avatar.{name}": value for name, value in _state(folder / checkpoint.name / "avatar").items()}
    saved = torch.load(folder / checkpoint.name / STATE_FILE, weights_only=True)
    values |= {f"weights.{name}": value for name, value in saved.get("weights", {}).items()}
    for number, state in saved["optimizer"]["state"].items():
        values |= {f"adam.{number}.{name}": value for name, value in state.items()}
    values["step"] = torch.tensor(saved["step"])
    if checkpoint.validation_loss is not None:
        values["validation_loss"] = torch.tensor(checkpoint.validation_loss, dtype=torch.float64)
    return values


def _state(folder: Path) -> dict[str, Tensor]:
    return load_avatar(folder).state_dict()


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Names whose values are not the same bit for bit."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], prefix: str = "avatar.") -> float:
    """Of values in units of their tensor's largest."""
    return max(
        ((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-12)).item()
        for name in ours
        if name.startswith(prefix) and ours[name].is_floating_point() and ours[name].numel()
    )
