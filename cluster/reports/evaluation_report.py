"""An evaluation's tables on paper: Markdown, CSV, JSON, and one page with its pictures and curves."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from cluster.records.code_version import code_version
from cluster.reports.charts import Chart
from cluster.reports.gallery import failure_sheets, picture_sheets
from cluster.reports.page import Picture, ReportContent, ReportTable, render_report
from cluster.scores.evaluation import Evaluation
from cluster.scores.protocols import Protocol, tables
from cluster.scores.sheet import ScoreSheet
from cluster.scores.tables import IntervalUnit, Table, as_csv, as_markdown, formatted
from lipflow.types import DRIVING_SIGNALS
from pipeline import storage

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class Comparison:
    """Score sheets on the same data, and the tables computed from them."""

    sheets: tuple[ScoreSheet, ...]
    tables: tuple[Table, ...]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        first = self.sheets[0]
        return {
            "variants": [{"name": sheet.name, "method": sheet.method} for sheet in self.sheets],
            "shards_digest": first.shards_digest,
            "held_out_frames": first.held_out_frames,
            "train_frames": first.train_frames,
            "train_cameras": first.train_cameras,
            "held_out_cameras": first.held_out_cameras,
            "tables": [asdict(table) for table in self.tables],
        }

    def markdown(self) -> str:
        """All tables, ready to be pasted, with where they come from."""
        first = self.sheets[0]
        origin = (
            f"Shard set {first.shards_digest[:12]}, code {code_version()[:12]}; "
            f"{len(first.train_cameras)} training and {len(first.held_out_cameras)} held-out cameras scored."
        )
        return "\n".join([*(as_markdown(table) for table in self.tables), origin]) + "\n"

    def text(self, report: str | None) -> str:
        """For a terminal: the tables with the errors of whole heads, and where the page lies, if there is one."""
        shown = [table for table in self.tables if not table.name.endswith("regions")]
        place = [] if report is None else [f"report: {report}"]
        return "\n".join([*(as_markdown(table) for table in shown), *place])


def compared(
    sheets: Sequence[ScoreSheet], protocol: Protocol | None, unit: IntervalUnit, baseline: str | None
) -> Comparison:
    """The tables of a protocol; see :func:`cluster.scores.protocols.tables`.

    Raises:
        ConfigError: the sheets are of different data.
    """
    return Comparison(tuple(sheets), tuple(tables(sheets, protocol, unit=unit, baseline=baseline)))


def write_comparison(
    out_uri: str,
    comparison: Comparison,
    evaluations: Sequence[Evaluation],
    document: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """Write ``tables.md``, ``tables/NAME.csv``, ``report.html`` and, last, ``evaluation.json``.

    Args:
        out_uri: a folder.
        comparison: what is told.
        evaluations: with the pictures and curves of its sheets, in their order; () if only scores are at hand.
        document: what ``evaluation.json`` holds besides.
        config: the recipe, for the page.

    Raises:
        StorageError: it cannot be written.
    """
    storage.write_bytes(storage.join(out_uri, "tables.md"), comparison.markdown().encode())
    for table in comparison.tables:
        storage.write_bytes(storage.join(out_uri, "tables", f"{table.name}.csv"), as_csv(table).encode())
    render_report(storage.join(out_uri, "report.html"), _content(comparison, evaluations, config))
    written = {**document, **comparison.document()}
    storage.write_bytes(storage.join(out_uri, EVALUATION_FILE), json.dumps(written).encode())


def _content(comparison: Comparison, evaluations: Sequence[Evaluation], config: Mapping[str, Any]) -> ReportContent:
    first = comparison.sheets[0]
    names = list(dict.fromkeys(sheet.name for sheet in comparison.sheets))
    labelled = dict(zip(_unique([sheet.name for sheet in comparison.sheets]), evaluations, strict=False))
    return ReportContent(
        title=f"Evaluation: {', '.join(names)}",
        summary=(
            f"{len(first.held_out_frames)} held-out and {len(first.train_frames)} training frames, "
            f"{len(first.train_cameras)} training and {len(first.held_out_cameras)} held-out cameras. "
            "Nothing is fitted on what is scored, and the frontal camera is never scored."
        ),
        headline=(),
        tables=[_report_table(table) for table in comparison.tables],
        pictures=[*_shown(labelled), *_failures(labelled)],
        fit_curves=_fit_curves(labelled),
        facts={
            "Data": {"shard set": first.shards_digest[:16], "calibration": ", ".join(first.calibration_segments)},
            "Runs": {name: evaluation.run_id for name, evaluation in labelled.items()},
            "Environment": {
                "code": code_version(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
        },
        config=config,
    )


def _report_table(table: Table) -> ReportTable:
    return ReportTable(
        title=table.title,
        note=table.note,
        labels=table.labels,
        figures=tuple(column.name for column in table.columns),
        rows=tuple((row.labels, tuple(formatted(table, row))) for row in table.rows),
    )


def _unique(names: Sequence[str]) -> list[str]:
    """Names with a number where one stands for several seeds."""
    return [
        name if names.count(name) == 1 else f"{name}, seed {names[:place].count(name)}"
        for place, name in enumerate(names)
    ]


def _shown(evaluations: Mapping[str, Evaluation]) -> list[Picture]:
    sheets = picture_sheets({name: evaluation.shown for name, evaluation in evaluations.items()})
    return [
        Picture(
            title=f"Driven by {latent}" if latent in DRIVING_SIGNALS else "Encoder",
            caption="Photo, reconstruction, and absolute error on held-out expressions.",
            image=sheet,
            description=f"Rows of photo, reconstruction and error heat map; latent codes from {latent}.",
        )
        for latent, sheet in sheets.items()
    ]


def _failures(evaluations: Mapping[str, Evaluation]) -> list[Picture]:
    pictures = []
    for name, evaluation in evaluations.items():
        for key, sheet in failure_sheets(evaluation.failures, evaluation.pictures).items():
            pictures.append(_failure(name, key, sheet))
    return pictures


def _failure(name: str, key: str, sheet: np.ndarray) -> Picture:
    return Picture(
        title=f"Worst frames: {name}, {key.replace('-', ', ', 1).replace('_', ' ')}",
        caption="The figures are means over all scored cameras, the picture is of one.",
        image=sheet,
        description="Rows of photo, reconstruction and error heat map of the worst frames.",
    )


def _fit_curves(evaluations: Mapping[str, Evaluation]) -> list[Chart]:
    charts = []
    for signal in DRIVING_SIGNALS:
        curves = {
            name: (list(range(len(trace))), trace)
            for name, evaluation in evaluations.items()
            if (trace := evaluation.fit_traces.get(signal))
        }
        if curves:
            charts.append(Chart(f"Fit to {signal}", "iteration", "observed loss, mean over frames", curves, log_y=True))
    return charts
