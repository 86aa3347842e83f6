"""The report of an evaluation: one self-contained HTML page, and its headline table for the terminal.

The page needs nothing but a browser: pictures are embedded, charts are inline SVG, there is no script and nothing
is fetched. What it shows is a :class:`ReportContent`; where the numbers come from is the caller's business.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from rich.console import Console
from rich.table import Table

from cluster.records.redaction import redact, redact_text
from cluster.reports.charts import SERIES_COLOURS, Chart, chart_svg
from cluster.reports.drawings import Drawing
from pipeline import storage

_TEMPLATE = "page.html.j2"
_LARGEST_PNG_BYTES = 400_000
_JPEG_QUALITY = 90


@dataclass(frozen=True)
class Measured:
    """A figure, with its interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class HeadlineRow:
    """One line of the headline table.

    Attributes:
        method: such as ``lipflow`` or ``dam``.
        signal: the driving signal; None for a reference that is not driven, such as the mean face.
        image_psnr_db: over the images of the evaluated cameras.
        geometry_rmse_mm: over all vertices.
    """

    method: str
    signal: str | None
    image_psnr_db: Measured
    geometry_rmse_mm: Measured


@dataclass(frozen=True)
class QuadrantRow:
    """One method on one quadrant of {training, held-out} cameras x {training, held-out} expressions."""

    method: str
    cameras: str
    expressions: str
    image_psnr_db: Measured
    geometry_rmse_mm: Measured
    frames: int
    ssim: Measured | None = None


@dataclass(frozen=True)
class ReportTable:
    """A table whose figures are text already.

    Attributes:
        title: above it.
        note: what its figures are of.
        labels: headings of the rows' labels.
        figures: headings of the figures.
        rows: (labels, figures).
    """

    title: str
    note: str
    labels: Sequence[str]
    figures: Sequence[str]
    rows: Sequence[tuple[Sequence[str], Sequence[str]]]


@dataclass(frozen=True)
class Picture:
    """A picture ``(H, W, 3)`` uint8 with a title, a caption and, for those who do not see it, a description."""

    title: str
    caption: str
    image: np.ndarray
    description: str = ""


@dataclass(frozen=True)
class ReportContent:
    """All that a report shows; empty parts are left out.

    Attributes:
        title: of the page.
        summary: the result in a sentence or two.
        headline: the headline table, in the order shown.
        protocol: what the headline was measured on, e.g. ``held-out expressions, training cameras``.
        reading: sentences on how to read the headline.
        tables: further tables, in the order shown.
        quadrants: the quadrant table.
        quadrants_note: below that table, e.g. how held-out cameras were calibrated.
        drawings: as wide as the page, in the order shown.
        pictures: in the order shown, such as one for each driving signal.
        training_curves: charts.
        fit_curves: charts.
        facts: group (``Runs``, ``Durations``, ``Environment``) to name to value.
        config: the recipe; secrets are taken out.
    """

    title: str
    summary: str
    headline: Sequence[HeadlineRow]
    protocol: str = ""
    reading: Sequence[str] = ()
    tables: Sequence[ReportTable] = ()
    quadrants: Sequence[QuadrantRow] = ()
    quadrants_note: str = ""
    drawings: Sequence[Drawing] = ()
    pictures: Sequence[Picture] = ()
    training_curves: Sequence[Chart] = ()
    fit_curves: Sequence[Chart] = ()
    facts: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Line:
    """A headline row as it is printed."""

    row: HeadlineRow
    best_psnr: bool
    best_rmse: bool
    first_of_signal: bool
    rows_of_signal: int


def render_report(path: str | Path, content: ReportContent) -> None:
    """Write the report as one HTML file to a path or URI.

    Raises:
        StorageError: it cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": format_measured, "interval": format_interval, "chart": chart_svg}
    environment.filters["embedded"] = _embedded
    page = environment.get_template(_TEMPLATE).render(
        content=content,
        lines=_lines(content.headline),
        config=json.dumps(redact(content.config), indent=2, ensure_ascii=False),
        facts={
            group: {name: redact_text(str(value)) for name, value in entries.items()}
            for group, entries in content.facts.items()
        },
        series_colours=SERIES_COLOURS,
        has_intervals=any(row.image_psnr_db.low is not None for row in content.headline),
        has_ssim=any(row.ssim is not None for row in content.quadrants),
    )
    storage.write_bytes(path, page.encode())


def print_table(rows: Sequence[HeadlineRow], console: Console | None = None, *, title: str = "") -> None:
    """Print the headline table; the best method of each driving signal is bold."""
    table = Table(title=title or None, title_justify="left", header_style="bold")
    table.add_column("driven by")
    table.add_column("method")
    table.add_column("image PSNR, dB ↑", justify="right")
    table.add_column("geometry RMSE, mm ↓", justify="right")
    for line in _lines(rows):
        if line.first_of_signal and table.row_count:
            table.add_section()
        row = line.row
        table.add_row(
            _plain(row.signal or "reference") if line.first_of_signal else "",
            _plain(row.method),
            _emphasised(row.image_psnr_db, 2, bold=line.best_psnr),
            _emphasised(row.geometry_rmse_mm, 3, bold=line.best_rmse),
        )
    (console or Console()).print(table)


def format_measured(measured: Measured, digits: int) -> str:
    """The figure with ``digits`` decimals, and a dash where it is not a number."""
    return f"{measured.value:.{digits}f}" if math.isfinite(measured.value) else "–"


def format_interval(measured: Measured, digits: int) -> str:
    """``31.20–32.05``, or nothing where there is no interval."""
    if measured.low is None or measured.high is None:
        return ""
    return f"{measured.low:.{digits}f}–{measured.high:.{digits}f}"


def _lines(rows: Sequence[HeadlineRow]) -> list[_Line]:
    """Rows grouped by driving signal, references last, each group's best figures marked where it has rivals."""
    signals = [signal for signal in dict.fromkeys(row.signal for row in rows) if signal is not None]
    lines = []
    for signal in [*signals, None]:
        group = [row for row in rows if row.signal == signal]
        rivals = signal is not None and len(group) > 1
        psnr = max(_numbers(row.image_psnr_db for row in group), default=None)
        rmse = min(_numbers(row.geometry_rmse_mm for row in group), default=None)
        lines += [
            _Line(
                row,
                best_psnr=rivals and row.image_psnr_db.value == psnr,
                best_rmse=rivals and row.geometry_rmse_mm.value == rmse,
                first_of_signal=index == 0,
                rows_of_signal=len(group),
            )
            for index, row in enumerate(group)
        ]
    return lines


def _numbers(figures: Iterable[Measured]) -> list[float]:
    return [figure.value for figure in figures if not math.isnan(figure.value)]


def _emphasised(measured: Measured, digits: int, *, bold: bool) -> str:
    figure = format_measured(measured, digits)
    interval = format_interval(measured, digits)
    figure = f"[bold]{figure}[/bold]" if bold else figure
    return f"{figure} [dim]({interval})[/dim]" if interval else figure


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _embedded(image: np.ndarray) -> str:
    """A data URI: PNG, or JPEG where PNG is large."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    kind = "png"
    if buffer.tell() > _LARGEST_PNG_BYTES:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
