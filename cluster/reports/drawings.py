"""Parallel coordinates and bars as inline SVG, in the colours of the page that they stand in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from cluster.reports.charts import SERIES_COLOURS

_WIDTH = 980
_HEIGHT = 380
_TOP, _BOTTOM, _SIDE = 40, 34, 70
_BAR_HEIGHT = 26
_BAR_LEFT = 210
_LONGEST_LABEL = 16


@dataclass(frozen=True)
class Drawing:
    """An SVG with a heading.

    Attributes:
        title: above it.
        caption: what to see in it.
        svg: the element.
        legend: name -> index of its colour.
    """

    title: str
    caption: str
    svg: Markup
    legend: Mapping[str, int]


@dataclass(frozen=True)
class Axis:
    """One vertical axis of parallel coordinates.

    Attributes:
        title: above it.
        ticks: (place from 0 at the bottom to 1 at the top, label).
    """

    title: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Line:
    """One line across all axes.

    Attributes:
        label: for those who do not see it, and under the pointer.
        places: its place on each axis, from 0 to 1; None where it has none, which breaks the line.
        series: index of its colour.
        strong: whether it is drawn in full strength.
    """

    label: str
    places: Sequence[float | None]
    series: int
    strong: bool = False


def parallel_svg(axes: Sequence[Axis], lines: Sequence[Line], description: str) -> Markup:
    """Parallel coordinates; strong lines lie above the others."""
    step = (_WIDTH - 2 * _SIDE) / max(1, len(axes) - 1)
    base, height = _HEIGHT - _BOTTOM, _HEIGHT - _TOP - _BOTTOM

    def place(axis: int, value: float) -> str:
        return f"{_SIDE + axis * step:.1f},{base - value * height:.1f}"

    parts = [f'<svg role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-label="{escape(description)}">']
    for line in sorted(lines, key=lambda line: line.strong):
        colour = f"s{line.series % SERIES_COLOURS}"
        style = 'stroke-width="3"' if line.strong else 'stroke-opacity="0.45"'
        for run in _unbroken(line.places):
            points = " ".join(place(axis, value) for axis, value in run)
            title = f"<title>{escape(line.label)}</title>"
            parts.append(f'<polyline class="line {colour}" {style} points="{points}">{title}</polyline>')
    for index, axis in enumerate(axes):
        x = _SIDE + index * step
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{base}"/>')
        # Neighbours' titles stand on two levels, so that long ones do not meet.
        level = 14 if index % 2 else 30
        parts.append(f'<text x="{x:.1f}" y="{level}" text-anchor="middle">{escape(axis.title)}</text>')
        for value, label in axis.ticks:
            y = base - value * height + 4
            parts.append(f'<text class="tick" x="{x + 6:.1f}" y="{y:.1f}">{escape(_short(label))}</text>')
    return Markup("".join([*parts, "</svg>"]))


def bars_svg(values: Mapping[str, float], description: str) -> Markup:
    """Horizontal bars of shares from 0 to 1, in the order given, each with its percentage."""
    height = _BAR_HEIGHT * len(values) + 8
    longest = max((value for value in values.values() if math.isfinite(value)), default=1.0) or 1.0
    parts = [f'<svg role="img" viewBox="0 0 {_WIDTH} {height}" aria-label="{escape(description)}">']
    for index, (name, value) in enumerate(values.items()):
        y = 4 + index * _BAR_HEIGHT
        width = (_WIDTH - _BAR_LEFT - 70) * max(0.0, value) / longest
        middle = y + _BAR_HEIGHT / 2 + 3
        parts.append(f'<text x="{_BAR_LEFT - 10}" y="{middle}" text-anchor="end">{escape(name)}</text>')
        box = f'x="{_BAR_LEFT}" y="{y + 4}" width="{width:.1f}" height="{_BAR_HEIGHT - 8}"'
        parts.append(f'<rect class="dot s0" {box}/>')
        parts.append(f'<text x="{_BAR_LEFT + width + 8:.1f}" y="{middle}">{100 * value:.0f} %</text>')
    return Markup("".join([*parts, "</svg>"]))


def _unbroken(places: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    runs: list[list[tuple[int, float]]] = [[]]
    for index, value in enumerate(places):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((index, value))
    return [run for run in runs if len(run) > 1]


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…"
