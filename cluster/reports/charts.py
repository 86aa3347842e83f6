"""Line charts as inline SVG, drawn with the colours of the page that they stand in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 42
_MOST_POINTS = 400
SERIES_COLOURS = 6
"""How many colours the page's style sheet defines, as the classes ``s0``, ``s1``, and so on."""


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        title: above the chart.
        x_label: with its unit.
        y_label: with its unit.
        curves: name to (x values, y values); values that are not finite are gaps.
        log_y: a logarithmic vertical axis; only positive values are drawn.
        caption: what to see in it.
    """

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log_y: bool = False
    caption: str = ""


def chart_svg(chart: Chart) -> Markup:
    """The chart as one ``<svg>`` element, described for screen readers."""
    curves = {name: _drawable(x, y, chart.log_y) for name, (x, y) in chart.curves.items()}
    finite = [points[np.isfinite(points[:, 1])] for points in curves.values()]
    known = np.concatenate(finite) if finite else np.zeros((0, 2))
    if len(known) == 0:
        return Markup('<p class="muted">No values were recorded.</p>')
    x_ticks = _ticks(known[:, 0].min(), known[:, 0].max(), 6)
    if chart.log_y:
        y_ticks, y_minor = _log_ticks(known[:, 1].min(), known[:, 1].max())
    else:
        y_ticks, y_minor = _ticks(known[:, 1].min(), known[:, 1].max(), 5), []
    x_low, x_high = known[:, 0].min(), known[:, 0].max()
    every_y = [*y_ticks, *y_minor]
    y_low, y_high = min(*every_y, known[:, 1].min()), max(*every_y, known[:, 1].max())

    def place_x(value: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (value - x_low) / ((x_high - x_low) or 1.0)

    def place_y(value: float) -> float:
        low, high, value = (math.log10(v) if chart.log_y else v for v in (y_low, y_high, value))
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - low) / ((high - low) or 1.0)

    base = HEIGHT - _BOTTOM
    parts = [_opening(chart, curves)]
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x = place_x(tick)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 18}" text-anchor="middle">{_number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.x_label)}</text>'
    )
    for index, points in enumerate(curves.values()):
        series = f"s{index % SERIES_COLOURS}"
        for segment in _unbroken(points):
            places = [(place_x(x), place_y(y)) for x, y in _thinned(segment)]
            if len(places) == 1:
                parts.append(f'<circle class="dot {series}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>')
            else:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
                parts.append(f'<polyline class="line {series}" points="{path}"/>')
    return Markup("".join([*parts, "</svg>"]))


def _opening(chart: Chart, curves: Mapping[str, np.ndarray]) -> str:
    ends = {name: points[np.isfinite(points[:, 1]), 1] for name, points in curves.items()}
    described = "; ".join(
        f"{name} goes from {_number(values[0])} to {_number(values[-1])}"
        for name, values in ends.items()
        if len(values)
    )
    label = escape(f"{chart.title}: {chart.y_label} over {chart.x_label}. {described}.")
    return f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{label}">'


def _drawable(x: Sequence[float], y: Sequence[float], log_y: bool) -> np.ndarray:
    points = np.stack([np.asarray(x, float), np.asarray(y, float)], -1).reshape(-1, 2)
    points = points[np.isfinite(points[:, 0])]
    if log_y:
        points[~(points[:, 1] > 0), 1] = np.nan
    points[~np.isfinite(points[:, 1]), 1] = np.nan
    return points


def _thinned(points: np.ndarray) -> np.ndarray:
    """At most ``_MOST_POINTS``: means of runs of neighbours, so that noise does not turn into aliasing."""
    if len(points) <= _MOST_POINTS:
        return points
    return np.stack([run.mean(0) for run in np.array_split(points, _MOST_POINTS)])


def _unbroken(points: np.ndarray) -> list[np.ndarray]:
    gaps = np.flatnonzero(np.isnan(points[:, 1]))
    segments = np.split(points, gaps)
    return [kept for segment in segments if len(kept := segment[np.isfinite(segment[:, 1])])]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from below ``low`` to above ``high``."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> tuple[list[float], list[float]]:
    """(labelled ticks, further values that the axis spans): decades, or 1-2-5 within less than two decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if len(decades) > 3:
        stride = math.ceil(len(decades) / 6)
        return [10.0**decade for decade in decades[::stride]], []
    inner = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    below = max((tick for tick in inner if tick <= low), default=low)
    above = min((tick for tick in inner if tick >= high), default=high)
    return [tick for tick in inner if below <= tick <= above], [below, above]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e−")
    return f"{value:.4g}".replace("-", "−")
