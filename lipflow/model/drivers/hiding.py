"""Dropout of a signal's parts in training: headset views and landmarks that are hidden at random.

Real signals lose parts one by one (a frame that was not delivered, a landmark behind a hand), and whole groups of
them at once (a headset with fewer cameras, a mouth behind a mask). Both are drawn, each with its own probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipflow.config import AvatarConfig


def hide_at_random(
    present: Tensor, config: AvatarConfig, generator: torch.Generator | None, ranks: Tensor | None = None
) -> Tensor:
    """Hide present parts at random, but never all of a frame.

    Args:
        present: ``(B, N)`` bool.
        config: ``driver_dropout``, with which each part is hidden alone, and ``driver_subset_dropout``, with which a
            frame keeps only the first parts of an order, 1 to N - 1 of them, all numbers equally likely.
        generator: of the draws; None hides nothing.
        ranks: ``(N, N)`` int, N orders, of which a frame draws one: ``ranks[n, m]`` is the place of part m. None draws
            from all N! orders.

    Returns:
        ``(B, N)`` bool.
    """
    if generator is None:
        return present
    kept = present
    if config.driver_dropout > 0:
        kept = kept & (_draw(present.shape, generator, present.device) >= config.driver_dropout)
    frames, parts = present.shape
    if config.driver_subset_dropout > 0 and parts > 1:
        fewer, size, choice = _draw((3, frames, 1), generator, present.device)
        if ranks is None:
            place = _draw(present.shape, generator, present.device).argsort(-1).argsort(-1)
        else:
            place = ranks[(choice[:, 0] * parts).long()]
        count = 1 + (size * (parts - 1)).long()
        kept = kept & ((place < count) | (fewer >= config.driver_subset_dropout))
    return torch.where(kept.any(-1, keepdim=True), kept, present)


def _draw(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), drawn on the generator's own device."""
    return torch.rand(shape, generator=generator, device=generator.device).to(device)
