"""Whether a candidate may replace a champion: a pure function of the score sheets of both.

- **The primary metric** must be *measured* to be better: the 95 % interval of its paired gain must lie above
  ``minimum_gain``. An equal candidate is refused, and so is one that is better on average and not surely.
- **No guard** (:mod:`cluster.scores.gate_rows`) may be worse by more than ``guard_percent``: its ratio of errors above
  that limit *and* the ratio's interval above 1. The ratio alone would refuse good candidates, for among a hundred
  guards noise carries some small region over the limit; the interval alone would refuse for a harm too small to matter.

Scores of other frames, cameras, shards or settings of the fit are never compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby

from cluster.scores.gate_rows import (
    WHOLE,
    GateRow,
    PromotionConfig,
    guard_rows,
    lone_rows,
    primary_keys,
    primary_row,
)
from cluster.scores.sheet import MEAN_FACE, FrameScore, ScoreSheet, require_comparable
from cluster.scores.tables import Cell, Column, Row, Table, Variant, blocks_of, interval_note
from lipflow.bootstrap import CONFIDENCE, BootstrapInterval
from lipflow.errors import ConfigError
from lipflow.regions import REGIONS

FEWEST_UNITS = 6
"""Frames, or segments where those are resampled, that an interval needs to decide anything.

If all of n units favour the candidate, the bootstrap's interval excludes "not better", and chance brings that about in
2^-n of the cases: 1.6 % for 6, and 3.1 % for 5, more than the 2.5 % below a 95 % interval.
"""

_UNITS = {"psnr_db": " dB", "ssim": "", "geometry_rmse_mm": " mm"}
_ERRORS = ("image_mse", "ssim", "geometry_rmse_mm")
_JUDGED = tuple(item.name for item in fields(FrameScore) if item.name.startswith(_ERRORS))


@dataclass(frozen=True)
class Judgement:
    """What the gate found.

    Attributes:
        passed: whether the candidate may become the champion.
        reason: one sentence for people.
        rows: the primary metric and all guards.
        gain: of the primary metric, in its unit, above 0 for better; None if nothing was compared.
        note: what intervals are over.
    """

    passed: bool
    reason: str
    rows: tuple[GateRow, ...]
    gain: BootstrapInterval | None
    note: str


def judge(candidate: ScoreSheet, champion: ScoreSheet | None, criterion: PromotionConfig) -> Judgement:
    """Whether ``candidate`` is measurably better than ``champion`` and nowhere much worse.

    Without a champion, finite scores are enough. The names of the sheets stand in the reasons.

    Raises:
        ConfigError: the candidate was not scored by the criterion's metric.
    """
    ours = Variant([candidate], criterion.intervals)
    theirs = None if champion is None else Variant([champion], criterion.intervals)
    if not primary_keys(ours, criterion):
        scored = sorted({key.latent for key in ours.keys} - {MEAN_FACE})
        raise ConfigError(
            f"{candidate.name} has no scores for primary_metric {criterion.primary_metric}, it was scored by {scored}: "
            "evaluate it again, or choose another criterion.primary_metric"
        )
    note = interval_note([candidate], criterion.intervals)
    refusal = _not_finite(candidate)
    if refusal is None and champion is not None and theirs is not None:
        refusal = _not_comparable(candidate, champion, theirs, criterion)
    if refusal is not None or theirs is None:
        rows = tuple(lone_rows(ours, theirs, criterion))
        first = f"there was no champion; {criterion.primary_metric} is {_text(rows[0].candidate, criterion)}"
        return Judgement(refusal is None, refusal or first, rows, None, note)
    first_row, gain = primary_row(ours, theirs, criterion)
    rows = (first_row, *guard_rows(ours, theirs, criterion))
    passed, reason = _conclude(rows, gain, theirs.name, criterion)
    return Judgement(passed, reason, rows, gain, note)


def decision_table(rows: Sequence[GateRow], title: str, note: str) -> Table:
    """The rows for people: a line for each error, its regions side by side.

    Compared rows show the ratio of errors, others the candidate's errors alone; the primary metric stands in the title.
    """
    columns = (WHOLE, *REGIONS)
    lines = []
    for labels, of_error in groupby(rows[1:], key=lambda row: (row.signal, row.iterations, row.images, row.metric)):
        regions = {row.region: row for row in of_error}
        words = [
            f"{row.verdict}: {row.region}" for row in regions.values() if row.verdict in ("worse", "missing", "better")
        ]
        signal, iterations, images, metric = labels
        cells = tuple(_cell(regions.get(region)) for region in columns)
        lines.append(Row((signal, str(iterations), images, metric, ", ".join(words)), cells))
    return Table(
        "decision",
        title,
        note,
        ("driven by", "iterations", "images", "error", "verdict"),
        tuple(Column(name, 3) for name in columns),
        tuple(lines),
    )


def _cell(row: GateRow | None) -> Cell:
    if row is None:
        return None
    if row.ratio is None or row.low is None or row.high is None:
        return row.candidate
    return BootstrapInterval(row.ratio, row.low, row.high, CONFIDENCE, row.frames)


def _conclude(
    rows: Sequence[GateRow], gain: BootstrapInterval | None, champion: str, criterion: PromotionConfig
) -> tuple[bool, str]:
    first = rows[0]
    lacking = [row for row in rows if row.verdict == "missing"]
    if gain is None or lacking:
        return False, (
            f"it was not scored as {champion} was: it lacks {lacking[0].words()}{_more(lacking)}; "
            "evaluate both with one recipe"
        )
    figures = (
        f"{criterion.primary_metric} {_text(first.candidate, criterion)} against {_text(first.champion, criterion)} of "
        f"{champion}, a gain of {_text(gain.mean, criterion)} (95 % interval {_text(gain.low, criterion)} to "
        f"{_text(gain.high, criterion)})"
    )
    if first.verdict == "not better":
        least = f" by more than {_text(criterion.minimum_gain, criterion)}" if criterion.minimum_gain else ""
        return False, f"not measurably better{least}: {figures}"
    worse = sorted((row for row in rows if row.verdict == "worse"), key=lambda row: -(row.ratio or 0))
    if worse:
        worst = worse[0]
        return False, (
            f"worse by more than {criterion.guard_percent:g} %: {worst.words()} is {worst.ratio:.3f} times that of "
            f"{champion} (95 % interval {worst.low:.3f} to {worst.high:.3f}){_more(worse)}, although {figures}"
        )
    return True, f"better: {figures}, and no guard is worse by more than {criterion.guard_percent:g} %"


def _more(rows: Sequence[GateRow]) -> str:
    return f", and {len(rows) - 1} more" if len(rows) > 1 else ""


def _text(value: float | None, criterion: PromotionConfig) -> str:
    return "–" if value is None else f"{value:.4f}{_UNITS[criterion.figure]}"


def _not_finite(sheet: ScoreSheet) -> str | None:
    for score in sheet.scores:
        for name in _JUDGED:
            value = getattr(score, name)
            if value is not None and not math.isfinite(value):
                return (
                    f"{name} of {sheet.name} is {value} in frame {score.frame_id} ({score.latent}, {score.iterations} "
                    "iterations), which is no measurement"
                )
    return None


def _not_comparable(
    candidate: ScoreSheet, champion: ScoreSheet, theirs: Variant, criterion: PromotionConfig
) -> str | None:
    try:
        require_comparable([candidate, champion])
    except ConfigError as error:
        return str(error)
    unmeasured = _not_finite(champion)
    if unmeasured is not None:
        return f"{unmeasured}: evaluate it again, or roll back"
    if not primary_keys(theirs, criterion):
        return f"{champion.name} has no scores for {criterion.primary_metric}: evaluate it with the candidate's recipe"
    # A fit of other settings is another protocol. How many iterations were scored is told by the rows.
    for name in sorted(candidate.fit.keys() & champion.fit.keys() - {"iterations"}):
        ours, held = candidate.fit[name], champion.fit[name]
        if ours != held:
            return (
                f"{candidate.name} was fitted with {name} {ours} and {champion.name} with {held}: "
                "evaluate both with one recipe"
            )
    segments = blocks_of(candidate.held_out_frames, criterion.intervals)
    units, what = len(set(segments or candidate.held_out_frames)), "segments" if segments else "frames"
    if units < FEWEST_UNITS:
        return (
            f"only {units} held-out {what} were scored, and fewer than {FEWEST_UNITS} show nothing with 95 % "
            "confidence: evaluate both on more"
        )
    return None


__all__ = ["FEWEST_UNITS", "Judgement", "PromotionConfig", "decision_table", "judge"]
