"""What the first worker tells of a training: losses and speeds to MLflow and Prometheus, progress to the submitter."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.util.metrics import Gauge
from torch import Tensor

from cluster.records.run import Run, TrackingError
from cluster.training.recipe import TrainRecipe
from lipflow.losses import LossTerms

GAUGES = {
    "train/total": ("lipflow_train_loss", "The training loss of the first worker's part of the latest logged step."),
    "val/loss": ("lipflow_train_validation_loss", "The latest validation loss."),
    "speed/views_per_s": ("lipflow_train_views_per_s", "Views that all workers learned from in a second."),
    "speed/data_wait_share": (
        "lipflow_train_data_wait_share",
        "The share of its time that the first worker waited for data.",
    ),
}
"""What Ray's metrics endpoint shows, besides ``lipflow_train_step``, by the metric's name in MLflow."""

_logger = logging.getLogger(__name__)


class Reporter:
    """The first worker's reports. A tracking server that is away costs a warning, never the training.

    Args:
        recipe: of the training.
        device: whose memory is told.
        run: the MLflow run; None: nothing is logged.
        board: the actor that the submitter's terminal reads; None: there is none.
    """

    def __init__(self, recipe: TrainRecipe, device: torch.device, run: Run | None, board: Any | None):
        self._recipe, self._device, self._run, self._board = recipe, device, run, board
        self._gauges: dict[str, Gauge] = {}
        if run is not None and ray.is_initialized():
            told = {"step": ("lipflow_train_step", "Optimiser steps done."), **GAUGES}
            for metric, (name, description) in told.items():
                self._gauges[metric] = Gauge(name, description, tag_keys=("run",)).set_default_tags({"run": run.run_id})
        self.restart_clock()

    def started(self, step: int) -> None:
        """The loop begins, or goes on, after ``step`` steps."""
        if self._board is not None:
            self._board.started.remote(step)
        self.restart_clock()

    def stepped(
        self, step: int, losses: Sequence[LossTerms], gradient_norm: Tensor, learning_rate: float, waited_s: float
    ) -> None:
        """A step was done; it is told if its turn has come.

        Args:
            step: steps done.
            losses: of this worker's micro-batches.
            gradient_norm: of the whole step, before it was clipped.
            learning_rate: of this step.
            waited_s: until this worker had its micro-batches.
        """
        self._waited_s += waited_s
        self._steps += 1
        if step % self._recipe.log_every_steps and step != self._recipe.steps:
            return
        metrics = {f"train/{name}": value for name, value in _means(losses).items()}
        metrics |= {"train/gradient_norm": gradient_norm.item(), "train/learning_rate": learning_rate}
        self._tell(metrics | self._speeds(), step)
        if self._board is not None:
            self._board.update.remote(step, f"loss {metrics['train/total']:.4f}")
        self.restart_clock()

    def validated(self, step: int, loss: float) -> None:
        """The exported avatar was validated. What a checkpoint covers is not computed again, so it is sent now."""
        self._tell({"val/loss": loss}, step)
        if self._run is not None:
            self._run.try_flush()

    def pictured(self, step: int, sheet: np.ndarray) -> None:
        """A sheet of pictures of the exported avatar."""
        if self._run is None:
            return
        try:
            self._run.log_image(sheet, f"pictures/step-{step:08d}.png")
        except TrackingError as error:
            _logger.warning("the pictures of step %d are not kept: %s", step, error)

    def restart_clock(self) -> None:
        """What went by since the last step was no training."""
        self._began, self._waited_s, self._steps = time.perf_counter(), 0.0, 0

    def _speeds(self) -> dict[str, float]:
        elapsed_s = time.perf_counter() - self._began
        loader = self._recipe.loader
        frames = self._steps * self._recipe.pieces * loader.frames_per_batch
        speeds = {
            "speed/frames_per_s": frames / elapsed_s,
            "speed/views_per_s": frames * loader.views_per_frame / elapsed_s,
            "speed/data_wait_share": self._waited_s / elapsed_s,
        }
        if self._device.type == "cuda":
            speeds["speed/gpu_peak_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            torch.cuda.reset_peak_memory_stats(self._device)
        return speeds

    def _tell(self, metrics: Mapping[str, float], step: int) -> None:
        if self._run is not None:
            self._run.log_metrics(metrics, step)
        for metric, value in {**metrics, "step": step}.items():
            if metric in self._gauges:
                self._gauges[metric].set(value)


def _means(losses: Sequence[LossTerms]) -> dict[str, float]:
    """Each term and diagnostic, and the total, averaged over the micro-batches that have it."""
    values: dict[str, list[float]] = {}
    for one in losses:
        for name, value in {**one.terms, **one.diagnostics, "total": one.total.detach()}.items():
            values.setdefault(name, []).append(value.item())
    return {name: sum(each) / len(each) for name, each in values.items()}
