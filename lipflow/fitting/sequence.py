"""Fitting a face through time: every frame may start where the one before it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lipflow.config import FitConfig
from lipflow.errors import LipflowError
from lipflow.fitting.descent import FitResult, descend
from lipflow.fitting.objective import FitObjective, fit_objective
from lipflow.model.avatar import Avatar
from lipflow.render.renderer import Renderer
from lipflow.types import DrivingSignals


def fit_sequence(
    avatar: Avatar,
    renderer: Renderer,
    driving: DrivingSignals,
    signals: str | Sequence[str],
    config: FitConfig,
    lengths: Sequence[int] | None = None,
    record: Sequence[int] = (),
) -> FitResult:
    """Fit frames that follow one another in time.

    A frame starts at the answer of the frame before it, or at the avatar's own start, whichever has the lower
    objective. With ``config.temporal_weight`` that answer also draws it: a random walk as prior. A frame depends on
    what came before it alone, so that a stream can be fitted as it comes.

    Args:
        avatar: trained.
        renderer: of its topology, on the same device.
        driving: the signals of B frames, on the same device.
        signals: ``hmc``, ``frontal``, ``keypoints``, or several of them.
        config: optimiser, iterations, weights.
        lengths: of several sequences, which lie one after another in the batch; the frames at one place in all of
            them are fitted side by side. None: all frames are one sequence.
        record: iterations after which each frame's best z is kept as well.

    Raises:
        LipflowError: as in :func:`lipflow.fitting.fit`, or ``lengths`` does not add up to B.
    """
    began = time.perf_counter()
    objective = fit_objective(avatar, renderer, driving, signals, config)
    with torch.no_grad():
        own = avatar.start_from(objective.signals, driving)
    lengths = (len(own),) if lengths is None else tuple(lengths)
    if sum(lengths) != len(own) or min(lengths, default=0) < 1:
        raise LipflowError(f"sequences of {list(lengths)} frames do not make a batch of {len(own)}: correct lengths")
    first = torch.tensor([sum(lengths[:place]) for place in range(len(lengths))], device=own.device)
    lasts = torch.tensor(lengths, device=own.device)
    z = torch.zeros_like(own)
    parts: list[tuple[Tensor, FitResult]] = []
    for place in range(max(lengths)):
        rows = (first + place)[lasts > place]
        here, start = objective.rows(rows), own[rows]
        warm = torch.zeros_like(rows, dtype=torch.bool)
        if place > 0:
            previous = z[rows - 1]
            if config.temporal_weight > 0:
                here = replace(here, previous=previous)
            start, warm = _lower(here, start, previous)
        part = replace(descend(here, start, config, record), from_previous=warm)
        z[rows] = part.z
        parts.append((rows, part))
    if own.is_cuda:
        torch.cuda.synchronize(own.device)
    return _joined(parts, time.perf_counter() - began)


@torch.no_grad()
def _lower(objective: FitObjective, own: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """The start of lower objective ``(N, D)``, and whether it is the previous frame's answer ``(N,)``."""
    warm = objective.at_latent(previous)[0] < objective.at_latent(own)[0]
    return torch.where(warm[:, None], previous, own), warm


def _joined(parts: Sequence[tuple[Tensor, FitResult]], seconds: float) -> FitResult:
    """One result of all frames, in the order of the batch."""
    order = torch.cat([rows for rows, _ in parts]).argsort()
    results = [result for _, result in parts]
    reasons = [reason for result in results for reason in result.stopped]

    def frames_first(name: str) -> Tensor:
        return torch.cat([getattr(result, name) for result in results])[order]

    def frames_second(name: str) -> Tensor:
        return torch.cat([getattr(result, name) for result in results], 1)[:, order]

    return FitResult(
        z=frames_first("z"),
        start=frames_first("start"),
        objective=frames_first("objective"),
        observed=frames_first("observed"),
        trace=frames_second("trace"),
        observed_trace=frames_second("observed_trace"),
        recorded={
            iteration: torch.cat([result.recorded[iteration] for result in results])[order]
            for iteration in results[0].recorded
        },
        iterations=frames_first("iterations"),
        gradient_norm=frames_first("gradient_norm"),
        stopped=tuple(reasons[row] for row in order.tolist()),
        from_previous=frames_first("from_previous"),
        seconds=seconds,
    )
