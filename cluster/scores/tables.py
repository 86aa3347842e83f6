"""Tables of an evaluation: pure functions of score sheets.

Sheets of one name are seeds of one variant: their mean is shown. Intervals are 95 % percentile bootstrap intervals
(:mod:`lipflow.bootstrap`) over segments or frames, and over seeds where there are several. Every table's note says
which. "Image error" is the mean over frames of the masked image MSE, "geometry error" that of the RMSE in mm; PSNR is
that of the mean MSE.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cluster.scores.sheet import FrameScore, ScoreSheet, require_comparable
from lipflow.bootstrap import BootstrapInterval, bootstrap_interval, bootstrap_ratio
from lipflow.metrics import PEAK

IntervalUnit = Literal["auto", "segment", "frame"]

FEWEST_SEGMENTS = 8
"""From so many held-out segments on, ``auto`` resamples segments; a bootstrap of fewer has too few outcomes."""

Cell = BootstrapInterval | float | None


@dataclass(frozen=True)
class Key:
    """Which scores a line of a table is about.

    Attributes:
        latent: as in :class:`cluster.scores.sheet.FrameScore`.
        iterations: likewise.
        cameras: ``train`` or ``held-out``.
        expressions: ``train`` or ``held-out``.
        calibrated: held-out cameras in colours solved on the calibration segments.
    """

    latent: str
    iterations: int = 0
    cameras: str = "train"
    expressions: str = "held-out"
    calibrated: bool = False


@dataclass(frozen=True)
class Column:
    """A column of figures: its heading, and how many digits they have."""

    name: str
    digits: int


@dataclass(frozen=True)
class Row:
    """Words on the left, figures on the right; None where there is none."""

    labels: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: for files.
        title: one line.
        note: what the figures are of, and what their intervals are over.
        labels: headings of the rows' labels.
        columns: of figures.
        rows: in the order shown.
    """

    name: str
    title: str
    note: str
    labels: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


class Variant:
    """The scores of one variant: one sheet, or one for each seed.

    Args:
        sheets: of one name and the same frames.
        unit: what intervals resample.
    """

    def __init__(self, sheets: Sequence[ScoreSheet], unit: IntervalUnit = "auto"):
        require_comparable(sheets)
        self.name, self.method, self.seeds = sheets[0].name, sheets[0].method, len(sheets)
        self.unit = unit
        self._order = {
            frame: place for place, frame in enumerate((*sheets[0].train_frames, *sheets[0].held_out_frames))
        }
        held_out = set(sheets[0].held_out_frames)
        self._scores: dict[Key, list[dict[str, FrameScore]]] = {}
        for place, sheet in enumerate(sheets):
            for score in sheet.scores:
                expressions = "held-out" if score.frame_id in held_out else "train"
                key = Key(score.latent, score.iterations, score.cameras, expressions, score.calibrated)
                self._scores.setdefault(key, [{} for _ in sheets])[place][score.frame_id] = score

    @property
    def keys(self) -> tuple[Key, ...]:
        """What was scored."""
        return tuple(self._scores)

    def frames(self, key: Key, *metrics: str) -> list[str]:
        """The frames for which every seed has all of these metrics, in time."""
        found = self._scores.get(key, [{}])
        common = set.intersection(*(set(scores) for scores in found))
        kept = [
            frame
            for frame in common
            if all(getattr(scores[frame], metric) is not None for scores in found for metric in metrics)
        ]
        return sorted(kept, key=self._order.__getitem__)

    def values(self, key: Key, metric: str, frames: Sequence[str]) -> torch.Tensor:
        """``(seeds, frames)`` float64."""
        rows = [[getattr(scores[frame], metric) for frame in frames] for scores in self._scores[key]]
        return torch.tensor(rows, dtype=torch.float64)

    def mean(self, key: Key, metric: str) -> BootstrapInterval | None:
        """Mean and interval of a metric; None where it was not scored."""
        frames = self.frames(key, metric)
        if not frames:
            return None
        return bootstrap_interval(self.values(key, metric, frames), blocks=blocks_of(frames, self.unit))

    def psnr_db(self, key: Key, metric: str = "image_mse") -> BootstrapInterval | None:
        """PSNR of the mean MSE; its interval is that of the MSE, turned round."""
        mse = self.mean(key, metric)
        if mse is None:
            return None
        middle, low, high = (10 * math.log10(PEAK**2 / max(value, 1e-12)) for value in (mse.mean, mse.high, mse.low))
        return BootstrapInterval(middle, low, high, mse.confidence, mse.frames)

    def jitter(self, key: Key) -> BootstrapInterval | None:
        """Shaking over the tracked mesh's own; 1 is as steady as the target."""
        frames = self.frames(key, "jitter_mm", "target_jitter_mm")
        if not frames or not bool((self.values(key, "target_jitter_mm", frames) > 0).all()):
            return None
        pair = (self.values(key, metric, frames) for metric in ("jitter_mm", "target_jitter_mm"))
        return bootstrap_ratio(*pair, blocks=blocks_of(frames, self.unit))

    def ratio(self, key: Key, metric: str, other: Variant, other_key: Key) -> BootstrapInterval | None:
        """This variant's mean over the other's, paired by frame; None where one was not scored."""
        shared = set(other.frames(other_key, metric))
        frames = [frame for frame in self.frames(key, metric) if frame in shared]
        if not frames:
            return None
        ours, theirs = self.values(key, metric, frames), other.values(other_key, metric, frames)
        return bootstrap_ratio(ours, theirs, blocks=blocks_of(frames, self.unit))

    def seconds(self, key: Key) -> float | None:
        """Mean fitting time of a frame."""
        frames = self.frames(key, "fit_seconds")
        return float(self.values(key, "fit_seconds", frames).mean()) if frames else None


def blocks_of(frames: Sequence[str], unit: IntervalUnit) -> list[str] | None:
    """The frames' segments where those are resampled, else None; see ``FEWEST_SEGMENTS``."""
    segments = [frame.split("/")[0] for frame in frames]
    by_segment = unit == "segment" or (unit == "auto" and len(set(segments)) >= FEWEST_SEGMENTS)
    return segments if by_segment else None


def variants_of(sheets: Sequence[ScoreSheet], unit: IntervalUnit = "auto") -> list[Variant]:
    """One variant for each name, in the order of first mention.

    Raises:
        ConfigError: the sheets are of different data.
    """
    require_comparable(sheets)
    names = dict.fromkeys(sheet.name for sheet in sheets)
    return [Variant([sheet for sheet in sheets if sheet.name == name], unit) for name in names]


def interval_note(sheets: Sequence[ScoreSheet], unit: IntervalUnit) -> str:
    """What intervals are over, in a sentence."""
    frames = sheets[0].held_out_frames
    segments = len({frame.split("/")[0] for frame in frames})
    counts = {name: [sheet.name for sheet in sheets].count(name) for name in {sheet.name for sheet in sheets}}
    seeds = max(counts.values())
    over = (
        f"segments, resampled whole ({segments} held-out segments, {len(frames)} frames)"
        if blocks_of(frames, unit) is not None
        else f"frames ({len(frames)} held-out frames of {segments} segments; frames of a segment are alike, so these "
        "intervals are too narrow)"
    )
    beside = f", and over {seeds} seeds, of which means are shown" if seeds > 1 else ""
    return f"Ranges are 95 % bootstrap intervals over {over}{beside}."


def as_csv(table: Table) -> str:
    """The table with one column for each figure, its low and its high end."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    heads = [name for column in table.columns for name in (column.name, f"{column.name} low", f"{column.name} high")]
    writer.writerow([*table.labels, *heads])
    for row in table.rows:
        writer.writerow([*row.labels, *(value for cell in row.cells for value in _triple(cell))])
    return buffer.getvalue()


def as_markdown(table: Table) -> str:
    """The table as GitHub writes it, with its title and its note."""
    heads = [*table.labels, *(column.name for column in table.columns)]
    rule = ["---"] * len(table.labels) + ["---:"] * len(table.columns)
    lines = [f"### {table.title}", "", table.note, "", _line(heads), _line(rule)]
    lines += [_line([*row.labels, *formatted(table, row)]) for row in table.rows]
    return "\n".join(lines) + "\n"


def formatted(table: Table, row: Row) -> list[str]:
    """The row's figures as text, with their intervals in brackets."""
    return [_text(cell, column.digits) for cell, column in zip(row.cells, table.columns, strict=True)]


def _text(cell: Cell, digits: int) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, BootstrapInterval):
        return f"{cell.mean:.{digits}f} ({cell.low:.{digits}f}–{cell.high:.{digits}f})"
    return f"{cell:.{digits}f}"


def _triple(cell: Cell) -> tuple[float | str, float | str, float | str]:
    if cell is None:
        return "", "", ""
    if isinstance(cell, BootstrapInterval):
        return cell.mean, cell.low, cell.high
    return cell, "", ""


def _line(words: Sequence[str]) -> str:
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


__all__ = [
    "Column",
    "IntervalUnit",
    "Key",
    "Row",
    "Table",
    "Variant",
    "as_csv",
    "as_markdown",
    "blocks_of",
    "formatted",
    "interval_note",
    "variants_of",
]
