"""The errors of a candidate over those of a champion, as promotions judge them: one row an error, paired by frame.

The primary metric comes first, then the *guards*: errors of image, structure (1 - SSIM) and geometry, of the whole
head, the mouth, the eyes and the rest, for every driving signal before and after its fit, and for the encoder on what
was held out. Held-out cameras count in calibrated colours only, and their meshes not at all, being those of training
cameras.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from cluster.scores.sheet import ENCODER, MEAN_FACE
from cluster.scores.tables import IntervalUnit, Key, Variant, blocks_of
from lipflow.bootstrap import BootstrapInterval, bootstrap_statistic
from lipflow.config import StrictConfig
from lipflow.metrics import PEAK
from lipflow.model.drivers import registered_signals
from lipflow.regions import REGIONS

FITTED = "fitted"
WHOLE = "whole head"

Verdict = Literal["better", "not better", "within limits", "worse", "missing", "not compared"]

SCORE_OF = {"psnr_db": "image_mse", "ssim": "ssim", "geometry_rmse_mm": "geometry_rmse_mm"}
"""Figure of a primary metric -> the score that it is made of."""

_GUARDED = {"image error": "image_mse", "structure error": "ssim", "geometry error": "geometry_rmse_mm"}


class PromotionConfig(StrictConfig):
    """What "better" means.

    Attributes:
        primary_metric: the one that decides, on held-out expressions and training cameras: ``fitted.FIGURE`` (the mean
            over all driving signals, after the most fit iterations), ``SIGNAL.FIGURE``, or ``encoder.FIGURE``, with
            ``psnr_db``, ``ssim`` or ``geometry_rmse_mm`` for FIGURE.
        minimum_gain: what the low end of the gain's 95 % interval must exceed, in the metric's unit.
        guard_percent: by how much any guarded error may be worse, in per cent of the champion's.
        intervals: resample whole ``segment`` or single ``frame``; ``auto``: segments from 8 held-out ones on.
    """

    primary_metric: str = f"{FITTED}.psnr_db"
    minimum_gain: float = Field(0.0, ge=0)
    guard_percent: float = Field(5.0, ge=0)
    intervals: IntervalUnit = "auto"

    @field_validator("primary_metric")
    @classmethod
    def _known(cls, name: str) -> str:
        latent, _, figure = name.partition(".")
        latents = [FITTED, ENCODER, *(signal.name for signal in registered_signals())]
        if latent not in latents or figure not in SCORE_OF:
            raise ValueError(f"{name!r} is no primary metric: write one of {latents}, a dot, and one of {[*SCORE_OF]}")
        return name

    @property
    def latent(self) -> str:
        """Whose faces decide: ``fitted``, ``encoder`` or a driving signal."""
        return self.primary_metric.partition(".")[0]

    @property
    def figure(self) -> str:
        """``psnr_db``, ``ssim`` or ``geometry_rmse_mm``."""
        return self.primary_metric.partition(".")[2]


@dataclass(frozen=True)
class GateRow:
    """One error of both versions, and what was found.

    Attributes:
        role: ``primary`` or ``guard``.
        metric: the primary metric's name, or ``image error``, ``structure error``, ``geometry error``.
        signal: where z comes from: the encoder or a driving signal; ``fitted`` for the mean over signals.
        iterations: of the fit.
        cameras: ``train`` or ``held-out``.
        expressions: ``train`` or ``held-out``.
        region: ``whole head``, ``mouth``, ``eyes`` or ``rest``.
        frames: that both were scored on.
        candidate: the candidate's mean over them; of the primary metric in its own unit. None if it was not scored.
        champion: likewise; None also if there is none.
        ratio: of the candidate's error to the champion's; None if they were not compared.
        low: low end of its 95 % interval.
        high: high end.
        verdict: what follows.
    """

    role: Literal["primary", "guard"]
    metric: str
    signal: str
    iterations: int
    cameras: str
    expressions: str
    region: str
    frames: int = 0
    candidate: float | None = None
    champion: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: Verdict = "not compared"

    @property
    def images(self) -> str:
        """Which cameras and expressions, in words."""
        return f"{self.cameras} cameras, {self.expressions} expressions"

    def words(self) -> str:
        """What the row is about, for sentences."""
        fit = f" after {self.iterations} iterations" if self.signal != ENCODER else ""
        return f"{self.metric} of {self.region} ({self.signal}{fit}, {self.images})"


def primary_keys(variant: Variant, criterion: PromotionConfig) -> list[Key]:
    """What the primary metric is the mean of: the driving signals after their most iterations, or one latent."""
    most = _most_iterations(variant)
    if criterion.latent == FITTED:
        return [Key(signal, count) for signal, count in most.items()]
    found = Key(criterion.latent, most.get(criterion.latent, 0))
    return [found] if found in variant.keys else []


def primary_row(ours: Variant, theirs: Variant, criterion: PromotionConfig) -> tuple[GateRow, BootstrapInterval | None]:
    """The primary metric of candidate and champion, and the gain in its unit; None if no frame has both."""
    keys, score = primary_keys(theirs, criterion), SCORE_OF[criterion.figure]
    row = _primary(keys, criterion)
    frames = _shared_frames([(variant, key) for variant in (ours, theirs) for key in keys], score)
    if not frames:
        return replace(row, verdict="missing"), None
    values = torch.cat([variant.values(key, score, frames) for variant in (ours, theirs) for key in keys])
    blocks = blocks_of(frames, criterion.intervals)

    def both(means: Tensor) -> tuple[Tensor, Tensor]:
        """The metric of candidate and champion, of the means ``(..., 2 x signals)`` of its scores."""
        metric = _psnr_db(means) if criterion.figure == "psnr_db" else means
        return metric[..., : len(keys)].mean(-1), metric[..., len(keys) :].mean(-1)

    def gain_of(means: Tensor) -> Tensor:
        candidate, champion = both(means)
        return champion - candidate if criterion.figure == "geometry_rmse_mm" else candidate - champion

    def ratio_of(means: Tensor) -> Tensor:
        candidate, champion = both(means)
        if criterion.figure == "psnr_db":
            # The geometric mean over signals of the ratios of their image errors.
            return 10 ** ((champion - candidate) / 10)
        return _ratio(_error(candidate, score), _error(champion, score))

    gain = bootstrap_statistic(gain_of, values, blocks=blocks)
    candidate, champion = (float(metric) for metric in both(values.mean(1)))
    row = replace(row, frames=len(frames), candidate=candidate, champion=champion)
    verdict: Verdict = "better" if gain.low > criterion.minimum_gain else "not better"
    return _compared(row, bootstrap_statistic(ratio_of, values, blocks=blocks), verdict), gain


def guard_rows(ours: Variant, theirs: Variant, criterion: PromotionConfig) -> Iterator[GateRow]:
    """All that the champion was scored by; what it was not has nothing to be compared with."""
    for row, key, score in _guards(theirs):
        frames = _shared_frames([(ours, key), (theirs, key)], score)
        if not frames:
            yield replace(row, champion=_mean_error(theirs, key, score), verdict="missing")
            continue
        values = _error(torch.cat([variant.values(key, score, frames) for variant in (ours, theirs)]), score)
        ratio = bootstrap_statistic(
            lambda means: _ratio(means[..., 0], means[..., 1]), values, blocks=blocks_of(frames, criterion.intervals)
        )
        candidate, champion = values.mean(1).tolist()
        too_much = ratio.mean > 1 + criterion.guard_percent / 100 and ratio.low > 1
        verdict: Verdict = "worse" if too_much else "better" if ratio.high < 1 else "within limits"
        yield _compared(replace(row, frames=len(frames), candidate=candidate, champion=champion), ratio, verdict)


def lone_rows(ours: Variant, theirs: Variant | None, criterion: PromotionConfig) -> Iterator[GateRow]:
    """The candidate's figures, and the champion's beside them, where the two may not be compared."""
    keys = primary_keys(ours, criterion)
    frames = len(ours.frames(keys[0], SCORE_OF[criterion.figure]))
    candidate, champion = (_primary_metric(variant, criterion) for variant in (ours, theirs))
    yield replace(_primary(keys, criterion), frames=frames, candidate=candidate, champion=champion)
    for row, key, score in _guards(ours):
        candidate, champion = (_mean_error(variant, key, score) for variant in (ours, theirs))
        yield replace(row, frames=len(ours.frames(key, score)), candidate=candidate, champion=champion)


def _guards(variant: Variant) -> Iterator[tuple[GateRow, Key, str]]:
    """(row without figures, its scores' key, their field) of all that is guarded and was scored."""
    most = _most_iterations(variant)
    driven = [key for key in variant.keys if key.latent in most and key.iterations in (0, most[key.latent])]
    encoded = [key for key in variant.keys if key.latent == ENCODER and _held_out(key)]
    for key in [*driven, *encoded]:
        for name, score in _GUARDED.items():
            if key.cameras == "held-out" and name == "geometry error":
                continue
            for region in (WHOLE, *REGIONS):
                field = score if region == WHOLE else f"{score}_{region}"
                if variant.frames(key, field):
                    place = (name, key.latent, key.iterations, key.cameras, key.expressions, region)
                    yield GateRow("guard", *place), key, field


def _held_out(key: Key) -> bool:
    return key.calibrated if key.cameras == "held-out" else key.expressions == "held-out"


def _most_iterations(variant: Variant) -> dict[str, int]:
    """Driving signal -> the most fit iterations that were scored."""
    counts: dict[str, int] = {}
    for key in variant.keys:
        if key.latent not in (ENCODER, MEAN_FACE):
            counts[key.latent] = max(key.iterations, counts.get(key.latent, 0))
    return counts


def _primary(keys: Sequence[Key], criterion: PromotionConfig) -> GateRow:
    iterations = max(key.iterations for key in keys)
    return GateRow(
        "primary", criterion.primary_metric, criterion.latent, iterations, keys[0].cameras, keys[0].expressions, WHOLE
    )


def _primary_metric(variant: Variant | None, criterion: PromotionConfig) -> float | None:
    score = SCORE_OF[criterion.figure]
    keys = [] if variant is None else primary_keys(variant, criterion)
    if variant is None or not keys or not all(variant.frames(key, score) for key in keys):
        return None
    means = torch.stack([variant.values(key, score, variant.frames(key, score)).mean() for key in keys])
    return float((_psnr_db(means) if criterion.figure == "psnr_db" else means).mean())


def _mean_error(variant: Variant | None, key: Key, score: str) -> float | None:
    frames = [] if variant is None else variant.frames(key, score)
    return float(_error(variant.values(key, score, frames), score).mean()) if variant is not None and frames else None


def _compared(row: GateRow, ratio: BootstrapInterval, verdict: Verdict) -> GateRow:
    return replace(row, ratio=ratio.mean, low=ratio.low, high=ratio.high, verdict=verdict)


def _shared_frames(scored: Sequence[tuple[Variant, Key]], metric: str) -> list[str]:
    """The frames for which all of these were scored, in time."""
    lists = [variant.frames(key, metric) for variant, key in scored]
    common = set.intersection(*(set(frames) for frames in lists))
    return [frame for frame in lists[0] if frame in common]


def _psnr_db(mse: Tensor) -> Tensor:
    return 20 * math.log10(PEAK) - 10 * torch.log10(mse.clamp(min=1e-12))


def _error(values: Tensor, score: str) -> Tensor:
    """SSIM as an error; errors as they are."""
    return 1 - values if score.startswith("ssim") else values


def _ratio(candidate: Tensor, champion: Tensor) -> Tensor:
    """Of errors; two that are nothing are equal."""
    return torch.where((candidate == 0) & (champion == 0), torch.ones_like(candidate), candidate / champion)


__all__ = ["FITTED", "SCORE_OF", "GateRow", "PromotionConfig", "guard_rows", "lone_rows", "primary_keys", "primary_row"]
