"""The sweep's page: every trial is on it, plots say what the ledger says, and nothing comes from elsewhere."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

from cluster.reports.drawings import Axis, Line, bars_svg, parallel_svg
from cluster.reports.page import render_report
from cluster.reports.tune_report import importances, report_content, trials_csv
from cluster.training.recipe import TrainRecipe
from cluster.tuning.ledger import TrialRecord
from cluster.tuning.recipe import TuneRecipe
from cluster.tuning.search import propose

SPACE: dict[str, Any] = {
    "learning_rate": {"kind": "loguniform", "low": 1e-4, "high": 1e-1},
    "loss.latent_weight": {"kind": "uniform", "low": 0.0, "high": 1.0},
    "loader.signals": {"kind": "choice", "values": [["hmc"], ["hmc", "frontal"]]},
}
SWEEP = TuneRecipe(
    train=TrainRecipe(warmup_steps=5), space=SPACE, trials=12, trial_steps=80, grace_steps=10, reduction_factor=2
)
SUMMARY: dict[str, Any] = {
    "trials": 12, "completed": 6, "stopped": 5, "failed": 1, "base_loss": 2.0, "best_trial": 4, "best_loss": 1.5,
    "best_recipe": "file:///sweep/best_recipe.yaml", "avatar": "file:///sweep/best/avatar", "avatar_loss": 1.2,
    "model": None, "report": "", "run_id": "sweep-run", "shards_digest": "d" * 64,
}  # fmt: skip


def records() -> list[TrialRecord]:
    """The loss depends on the learning rate alone."""
    found = []
    for number in range(12):
        values = propose([], SWEEP.searched, 1, number)
        loss = 1.0 + abs(math.log10(float(values["learning_rate"])) + 2.5)  # type: ignore[arg-type]
        reports = ((10, loss), (20, loss / 2)) if number % 2 else ((10, loss), (80, loss / 3))
        ended: Any = ("stopped", None) if number % 2 else ("completed", loss / 3)
        found.append(TrialRecord(number, values, ended[0], reports, ended[1]))
    found[1] = TrialRecord(1, found[1].values, "failed", error='NonFiniteLossError: image, "frame"')
    return found


def test_the_page_shows_every_trial_and_loads_nothing(tmp_path: Path):
    render_report(tmp_path / "report.html", report_content(records(), SWEEP, SUMMARY))
    page = (tmp_path / "report.html").read_text()
    assert "25.0 % lower" in page
    assert page.count("<title>trial ") == 12
    assert "4 (best)" in page
    assert re.findall(r"(?:src|href)=\"(?!data:|#)", page) == []
    assert page.count("<svg") == 3
    for colour in (0, 1, 2, 3, 5):
        assert f'class="line s{colour}"' in page


def test_a_base_recipe_that_won_or_failed_is_said_to():
    def said(**changes: Any) -> str:
        return report_content(records(), SWEEP, SUMMARY | changes).summary

    assert "found nothing better" in said(best_trial=0, best_loss=2.0)
    assert "own trial failed" in said(base_loss=None)


def test_what_matters_is_found_and_what_does_not_is_not():
    """The loss at a step that all trials reached; the share of the learning rate measured here: 0.93."""
    shares = importances(records(), SWEEP.searched, 10, seed=0)
    assert set(shares) == set(SPACE)
    assert shares["learning_rate"] > 0.7
    assert sum(shares.values()) == 1.0 or abs(sum(shares.values()) - 1) < 1e-9
    assert importances(records()[:5], SWEEP.searched, 10, seed=0) == {}


def test_the_table_reads_back():
    rows = list(csv.DictReader(io.StringIO(trials_csv(records(), SWEEP.searched))))
    assert [int(row["trial"]) for row in rows] == list(range(12))
    assert rows[1]["error"] == 'NonFiniteLossError: image, "frame"'
    assert rows[1]["last_val_loss"] == rows[1]["val_loss"] == ""
    assert float(rows[3]["last_val_loss"]) == records()[3].reports[-1][1]


def test_lines_break_where_a_trial_has_no_place_on_an_axis():
    axes = [Axis(name, [(0.0, "a"), (1.0, "<b>")]) for name in "wxyz"]
    svg = parallel_svg(axes, [Line("t", (0.0, 1.0, None, 0.5), 0), Line("u", (0.0, 0.0, 0.0, 0.0), 1)], "two")
    points = re.findall(r'points="([^"]*)"', svg)
    assert [len(line.split()) for line in points] == [2, 4]
    assert "&lt;b&gt;" in svg
    # 0 is at the bottom and 1 at the top.
    (low, high) = (float(place.split(",")[1]) for place in points[0].split())
    assert low > high


def test_bars_are_as_long_as_their_shares():
    svg = bars_svg({"a": 0.6, "b": 0.3, "c": 0.0}, "three")
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height', svg)]
    assert widths[0] == 2 * widths[1] > 0 == widths[2]
    assert "60 %" in svg
