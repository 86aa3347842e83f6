"""Percentile bootstrap (Efron, 1979) of means and of ratios of means over frames.

Resampled are *units*: single frames, or blocks of frames that are not independent, such as those of one segment
(Künsch, 1989, with whole segments for blocks). A mean is then that of all frames of the drawn blocks. Values of several
seeds, ``(seeds, frames)`` of the same frames, are averaged, and seeds are resampled beside the frames. Two methods on
the same frames are compared by the **paired** ratio: both see the same resampled frames, so that what makes a frame
hard for both cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 2000
_COUNTS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class BootstrapInterval:
    """A mean, or a ratio of means, and the interval in which it lies with the stated confidence."""

    mean: float
    low: float
    high: float
    confidence: float
    frames: int


def bootstrap_interval(
    values: Tensor,
    *,
    blocks: Sequence[str] | None = None,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> BootstrapInterval:
    """Interval of the mean over frames, and over seeds where there are several.

    Args:
        values: ``(frames,)``, or ``(seeds, frames)`` of the same frames.
        blocks: for each frame the name of its block, resampled whole; None: every frame for itself.
        seed: of the resampling.
        confidence: between 0 and 1.
        resamples: number of bootstrap samples.

    Raises:
        ValueError: no frames, values that are not finite, or another number of blocks.
    """
    table = _checked(values, confidence)
    members = _membership(blocks, table.shape[1])
    means = torch.cat([_resampled_means(table, members, counts) for counts in _draws(table, members, seed, resamples)])
    return _interval(float(table.mean()), means, confidence, table.shape[1])


def bootstrap_ratio(
    numerator: Tensor,
    denominator: Tensor,
    *,
    blocks: Sequence[str] | None = None,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> BootstrapInterval:
    """Paired interval of ``mean(numerator) / mean(denominator)``, two methods on the same frames.

    Frames are drawn once for both; seeds, which are separate trainings, for each apart.

    Args:
        numerator: ``(frames,)`` or ``(seeds, frames)``.
        denominator: ``(frames,)`` or ``(seeds, frames)``; another number of seeds is allowed.
        blocks: as in :func:`bootstrap_interval`.
        seed: of the resampling.
        confidence: between 0 and 1.
        resamples: number of bootstrap samples.

    Raises:
        ValueError: as :func:`bootstrap_interval`, or different numbers of frames, or a denominator that is not
            positive.
    """
    top, bottom = _checked(numerator, confidence), _checked(denominator, confidence)
    if top.shape[1] != bottom.shape[1]:
        raise ValueError(f"a paired ratio needs the same frames, found {top.shape[1]} and {bottom.shape[1]}")
    if not bool((bottom.mean(0) > 0).all()):
        raise ValueError("the denominator of a ratio of errors must be positive in every frame")
    members = _membership(blocks, top.shape[1])
    # The draws start with the frames': equal in both for one seed of the resampling. Their seeds' draws differ.
    ratios = torch.cat(
        [
            _resampled_means(top, members, above) / _resampled_means(bottom, members, below)
            for above, below in zip(
                _draws(top, members, seed, resamples),
                _draws(bottom, members, seed, resamples, other=True),
                strict=True,
            )
        ]
    )
    return _interval(float(top.mean() / bottom.mean()), ratios, confidence, top.shape[1])


def bootstrap_statistic(
    statistic: Callable[[Tensor], Tensor],
    values: Tensor,
    *,
    blocks: Sequence[str] | None = None,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> BootstrapInterval:
    """Interval of a function of several quantities' means over the same frames, which are drawn once for all.

    Args:
        statistic: of means ``(..., T)``, gives ``(...)``.
        values: ``(T, frames)``, a row for each quantity.
        blocks: as in :func:`bootstrap_interval`.
        seed: of the resampling.
        confidence: between 0 and 1.
        resamples: number of bootstrap samples.

    Raises:
        ValueError: as :func:`bootstrap_interval`.
    """
    table = _checked(values, confidence)
    members = _membership(blocks, table.shape[1])
    means = torch.cat([_block_means(table, members, frames) for frames, _ in _draws(table, members, seed, resamples)])
    return _interval(float(statistic(table.mean(1))), statistic(means), confidence, table.shape[1])


def _checked(values: Tensor, confidence: float) -> Tensor:
    """``(seeds, frames)`` float64."""
    if values.ndim not in (1, 2) or values.numel() == 0 or not bool(values.isfinite().all()):
        raise ValueError(
            f"a bootstrap needs finite values of at least one frame, (frames,) or (seeds, frames), "
            f"found shape {tuple(values.shape)}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a value between 0 and 1")
    return values.detach().double().cpu().reshape(-1, values.shape[-1])


def _membership(blocks: Sequence[str] | None, frames: int) -> Tensor:
    """``(frames,)`` index of each frame's block."""
    if blocks is None:
        return torch.arange(frames)
    if len(blocks) != frames:
        raise ValueError(f"{len(blocks)} block names for {frames} frames: give one for each frame")
    index = {name: place for place, name in enumerate(dict.fromkeys(blocks))}
    return torch.tensor([index[name] for name in blocks])


def _draws(
    table: Tensor, members: Tensor, seed: int, resamples: int, *, other: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """How often each block ``(r, blocks)`` and each seed ``(r, seeds)`` is drawn, in pieces that fit into memory."""
    blocks, seeds = int(members.max()) + 1, len(table)
    of_blocks = torch.Generator().manual_seed(seed)
    of_seeds = torch.Generator().manual_seed(2 * seed + (2 if other else 1))
    piece = max(1, _COUNTS_AT_ONCE // blocks)
    for start in range(0, resamples, piece):
        size = min(piece, resamples - start)
        yield _counts(size, blocks, of_blocks), _counts(size, seeds, of_seeds)


def _counts(resamples: int, units: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(units, (resamples, units), generator=generator)
    return torch.zeros(resamples, units, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(resamples, units, dtype=torch.float64)
    )


def _resampled_means(table: Tensor, members: Tensor, counts: tuple[Tensor, Tensor]) -> Tensor:
    """``(r,)`` means over the drawn seeds and all frames of the drawn blocks."""
    of_blocks, of_seeds = counts
    return (_block_means(table, members, of_blocks) * of_seeds).sum(1) / len(table)


def _block_means(table: Tensor, members: Tensor, of_blocks: Tensor) -> Tensor:
    """``(r, rows)`` means of each row over all frames of the drawn blocks."""
    blocks = of_blocks.shape[1]
    sums = table.new_zeros(len(table), blocks).index_add_(1, members, table)
    sizes = torch.bincount(members, minlength=blocks).double()
    return (of_blocks @ sums.T) / (of_blocks @ sizes)[:, None]


def _interval(mean: float, resampled: Tensor, confidence: float, frames: int) -> BootstrapInterval:
    tail = (1 - confidence) / 2
    low, high = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return BootstrapInterval(mean, low, high, confidence, frames)


__all__ = ["BootstrapInterval", "bootstrap_interval", "bootstrap_ratio", "bootstrap_statistic"]
