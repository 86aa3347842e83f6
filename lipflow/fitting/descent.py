"""Many frames go down at once, and each stops where it gets no further."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lipflow.config import FitConfig
from lipflow.errors import LipflowError
from lipflow.fitting.adam import BatchedAdam
from lipflow.fitting.lbfgs import BatchedLbfgs

StopReason = Literal["plateau", "no descent", "iterations", "not finite"]
"""Why a frame stopped: the first two have converged, as far as the objective can be told."""

CONVERGED: tuple[StopReason, ...] = ("plateau", "no descent")


@dataclass
class FitResult:
    """Latent codes of B frames.

    Attributes:
        z: ``(B, D)`` each frame's best iterate.
        start: ``(B, D)`` where its optimisation started.
        objective: ``(B,)`` at ``z``.
        observed: ``(B,)`` L_obs alone, at ``z``.
        trace: ``(iterations + 1, B)`` objective at the start and at every point that was tried; from where a frame
            stopped, its ``objective``.
        observed_trace: the same for L_obs alone.
        recorded: after so many iterations, the best ``(B, D)`` until then.
        iterations: ``(B,)`` int64, used by each frame.
        gradient_norm: ``(B,)`` of the objective at ``z``, in the coordinates that were optimised.
        stopped: why each of them went no further.
        from_previous: ``(B,)`` bool: it started at the answer of the frame before it; never outside of sequences.
        seconds: wall-clock time of the whole batch.
    """

    z: Tensor
    start: Tensor
    objective: Tensor
    observed: Tensor
    trace: Tensor
    observed_trace: Tensor
    recorded: dict[int, Tensor]
    iterations: Tensor
    gradient_norm: Tensor
    stopped: tuple[StopReason, ...]
    from_previous: Tensor
    seconds: float

    @property
    def converged(self) -> Tensor:
        """``(B,)`` bool: stopped because there was nothing left to gain."""
        return torch.tensor([reason in CONVERGED for reason in self.stopped], device=self.z.device)

    @property
    def relative_decrease(self) -> Tensor:
        """``(B,)`` what the fit took off the objective, in shares of its size at the start; never negative."""
        return (self.trace[0] - self.objective) / self.trace[0].abs().clamp(min=torch.finfo(self.trace.dtype).tiny)


class Objective(Protocol):
    """A function of independent frames."""

    def rows(self, rows: Tensor) -> Objective:
        """The same for the frames ``rows (N,)`` alone."""

    def coordinates(self, z: Tensor) -> Tensor:
        """``(B, D)`` where the optimiser stands at ``z``."""

    def latent(self, coordinates: Tensor) -> Tensor:
        """``(B, D)`` z at ``coordinates``."""

    def __call__(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """``(B,)`` what is minimised, and the part of it that is observed."""


class _Progress:
    """The best of every frame, and what led to it."""

    def __init__(self, start: Tensor, recorded: Iterable[int]):
        frames = len(start)
        self.best = start.clone()
        self.lowest = start.new_full((frames,), torch.inf)
        self.observed = start.new_zeros(frames)
        self.gradient_norm = start.new_zeros(frames)
        self.used = torch.zeros(frames, dtype=torch.long, device=start.device)
        self.trace: list[Tensor] = []
        self.observed_trace: list[Tensor] = []
        self.lowest_trace: list[Tensor] = []
        self.recorded: dict[int, Tensor] = {}
        self._record = frozenset(recorded)

    def add(self, rows: Tensor, point: Tensor, value: Tensor, observed: Tensor, gradient: Tensor) -> None:
        """What the frames ``rows (N,)`` came to at ``point (N, D)``; all others stay as they are."""
        finite = torch.isfinite(value)
        better = finite & (value < self.lowest[rows])
        self.best[rows] = torch.where(better[:, None], point, self.best[rows])
        self.gradient_norm[rows] = torch.where(better, gradient.norm(dim=-1), self.gradient_norm[rows])
        self.observed[rows] = torch.where(better, observed, self.observed[rows])
        self.lowest[rows] = torch.where(better, value, self.lowest[rows])
        self.used[rows] = len(self.trace)
        everywhere = self.lowest.clone()
        everywhere[rows] = torch.where(finite, value, self.lowest[rows])
        observed_everywhere = self.observed.clone()
        observed_everywhere[rows] = torch.where(finite, observed, self.observed[rows])
        self._append(everywhere, observed_everywhere)

    def hold(self) -> None:
        """One iteration in which no frame moves."""
        self._append(self.lowest, self.observed)

    def _append(self, value: Tensor, observed: Tensor) -> None:
        if len(self.trace) in self._record:
            self.recorded[len(self.trace)] = self.best.clone()
        self.trace.append(value.clone())
        self.observed_trace.append(observed.clone())
        self.lowest_trace.append(self.lowest.clone())

    def stalled(self, config: FitConfig) -> Tensor:
        """``(B,)`` bool: the last iterations brought next to nothing of what all of them brought."""
        if config.patience is None or len(self.trace) <= config.patience:
            return torch.zeros_like(self.lowest, dtype=torch.bool)
        gained = self.lowest_trace[0] - self.lowest
        lately = self.lowest_trace[-1 - config.patience] - self.lowest
        return lately <= config.tolerance * gained


def descend(objective: Objective, z: Tensor, config: FitConfig, record: Sequence[int] = ()) -> FitResult:
    """Minimise ``objective`` in every frame by itself, from ``z (B, D)``.

    A frame that stopped costs nothing more. Points at which an objective is not finite end the frame's descent at its
    best one under Adam, and shorten the step under L-BFGS.

    Returns:
        The answers; ``seconds`` is 0 and ``from_previous`` false.

    Raises:
        LipflowError: the objective or its gradient is not finite at the start, or ``record`` goes beyond the
            iterations.
    """
    beyond = [iteration for iteration in record if not 0 <= iteration <= config.iterations]
    if beyond:
        raise LipflowError(f"record names iteration {beyond[0]}, but the fit has {config.iterations}: raise iterations")
    with torch.no_grad():
        start = objective.coordinates(z).detach().clone()
    optimizer = _optimizer(start, config)
    progress = _Progress(start, record)
    reasons: list[StopReason] = ["iterations"] * len(start)
    moving = torch.ones(len(start), dtype=torch.bool, device=start.device)
    here, rows = objective, moving.nonzero()[:, 0]
    for iteration in range(config.iterations + 1):
        if len(rows) == 0:
            progress.hold()
            continue
        point = optimizer.point.detach()[rows].requires_grad_()
        value, observed = here(point)
        # The sum keeps frames apart: each row of the gradient belongs to one of them.
        (gradient,) = torch.autograd.grad(value.sum(), point)
        value, observed, point = value.detach(), observed.detach(), point.detach()
        finite = torch.isfinite(value) & torch.isfinite(gradient).all(-1)
        value = torch.where(finite, value, torch.inf)
        if iteration == 0 and not finite.all():
            raise LipflowError(
                f"the objective of frames {rows[~finite].tolist()} of the batch is not finite at the start: look at "
                "their driving signals, cameras and keypoints"
            )
        progress.add(rows, point, value, observed, gradient)
        if iteration == config.iterations:
            break
        exhausted = optimizer.tell(_spread(value, rows, moving), _spread(gradient, rows, moving), moving)
        diverged = torch.zeros_like(moving)
        diverged[rows] = ~finite & (config.optimizer == "adam")
        stalled = progress.stalled(config)
        stopping = moving & (exhausted | diverged | stalled)
        if stopping.any():
            for row in stopping.nonzero()[:, 0].tolist():
                reasons[row] = "not finite" if diverged[row] else "no descent" if exhausted[row] else "plateau"
            moving = moving & ~stopping
            rows = moving.nonzero()[:, 0]
            here = objective.rows(rows)
    with torch.no_grad():
        latents = {iteration: objective.latent(best) for iteration, best in progress.recorded.items()}
        answer = objective.latent(progress.best)
    return FitResult(
        z=answer,
        start=z,
        objective=progress.lowest,
        observed=progress.observed,
        trace=torch.stack(progress.trace),
        observed_trace=torch.stack(progress.observed_trace),
        recorded=latents,
        iterations=progress.used,
        gradient_norm=progress.gradient_norm,
        stopped=tuple(reasons),
        from_previous=torch.zeros_like(moving),
        seconds=0.0,
    )


def _optimizer(start: Tensor, config: FitConfig) -> BatchedAdam | BatchedLbfgs:
    if config.optimizer == "adam":
        return BatchedAdam(start, config.learning_rate)
    return BatchedLbfgs(start, config.learning_rate, config.history)


def _spread(values: Tensor, rows: Tensor, moving: Tensor) -> Tensor:
    """``values (N, ...)`` of ``rows`` in a batch of all frames, zero elsewhere."""
    spread = values.new_zeros(len(moving), *values.shape[1:])
    spread[rows] = values
    return spread
