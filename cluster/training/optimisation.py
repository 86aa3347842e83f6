"""The optimiser: its groups of parameters, its learning rate, and one step of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cluster.training.recipe import TrainRecipe
from lipflow.losses import NonFiniteLossError
from lipflow.model.avatar import Avatar


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


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, recipe: TrainRecipe) -> None:
    """The rates of ``step``, in all groups."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate_factor(step, recipe)


def descend(optimizer: torch.optim.Optimizer, clip_norm: float, step: int, frame_ids: Sequence[str]) -> Tensor:
    """One step along the gradients that are there; returns their norm before it was clipped to ``clip_norm``.

    Raises:
        NonFiniteLossError: the gradient is not finite; no weight has changed then.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, clip_norm)
    if not torch.isfinite(norm):
        raise NonFiniteLossError(
            f"the gradient is not finite at step {step}, frames {', '.join(frame_ids)}: "
            "lower the learning rate, or look at these frames"
        )
    optimizer.step()
    return norm
