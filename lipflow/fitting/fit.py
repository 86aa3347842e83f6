"""Fitting frames that have nothing to do with one another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lipflow.config import FitConfig
from lipflow.fitting.descent import FitResult, descend
from lipflow.fitting.objective import fit_objective
from lipflow.model.avatar import Avatar
from lipflow.render.renderer import Renderer
from lipflow.types import DrivingSignals


def fit(
    avatar: Avatar,
    renderer: Renderer,
    driving: DrivingSignals,
    signals: str | Sequence[str],
    config: FitConfig,
    start: Tensor | None = None,
    record: Sequence[int] = (),
) -> FitResult:
    """Fit the latent codes of B frames to one driving signal, or to several at once.

    The avatar is not changed. With several signals L_obs is their sum, and the prior the product of theirs. The answer
    is the best iterate, so that the objective never ends above its start.

    Args:
        avatar: trained.
        renderer: of its topology, on the same device.
        driving: the signals of B frames, on the same device.
        signals: ``hmc``, ``frontal``, ``keypoints``, or several of them.
        config: optimiser, iterations, weights.
        start: ``(B, D)`` start instead of the avatar's own.
        record: iterations after which each frame's best z is kept as well; 0 is the start.

    Raises:
        LipflowError: a signal is missing, the objective of a frame is not finite at its start, or ``record`` goes
            beyond the iterations.
    """
    began = time.perf_counter()
    objective = fit_objective(avatar, renderer, driving, signals, config)
    if start is None:
        with torch.no_grad():
            start = avatar.start_from(objective.signals, driving)
    result = descend(objective, start, config, record)
    if start.is_cuda:
        torch.cuda.synchronize(start.device)
    return replace(result, seconds=time.perf_counter() - began)
