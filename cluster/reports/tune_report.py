"""A sweep on paper: ``trials.csv``, and one page with its table, plots and settings."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
import ray

from cluster.records.code_version import code_version
from cluster.reports.charts import Chart
from cluster.reports.drawings import Axis, Drawing, Line, bars_svg, parallel_svg
from cluster.reports.page import ReportContent, ReportTable, render_report
from cluster.tuning.ledger import TrialRecord
from cluster.tuning.recipe import TuneRecipe
from cluster.tuning.search import study_of
from cluster.tuning.space import Choice, Int, Space, Uniform, Value
from pipeline import storage

FEWEST_FOR_IMPORTANCE = 8
"""Trials below which shares of importance are noise alone."""

_LEGEND = {"completed": 0, "stopped early": 1, "failed": 5, "base recipe": 2, "best": 3}


def write_tune_report(
    out_uri: str, records: Sequence[TrialRecord], recipe: TuneRecipe, summary: Mapping[str, Any]
) -> None:
    """Write ``trials.csv`` and ``report.html``.

    Args:
        out_uri: the sweep's folder.
        records: all trials, by number.
        recipe: of the sweep.
        summary: :class:`cluster.tune.TuneSummary` as a dictionary.

    Raises:
        StorageError: they cannot be written.
    """
    space = recipe.searched
    storage.write_bytes(storage.join(out_uri, "trials.csv"), trials_csv(records, space).encode())
    render_report(summary["report"], report_content(records, recipe, summary))


def trials_csv(records: Iterable[TrialRecord], space: Space) -> str:
    """One line for each trial: number, state, last step, last loss, loss of its best checkpoint, settings, error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", "last_step", "last_val_loss", "val_loss", *space, "error"])
    for record in records:
        last = record.reports[-1][1] if record.reports else ""
        loss = "" if record.loss is None else record.loss
        values = [_text(record.values[key]) for key in space]
        writer.writerow([record.number, record.state, record.last_step, last, loss, *values, record.error or ""])
    return text.getvalue()


def importances(records: Sequence[TrialRecord], space: Space, step: int, seed: int) -> dict[str, float]:
    """Each setting's share of the variance of the loss at a step, by fANOVA; empty if there is too little to go by.

    The step is one that stopped trials have reached too, so that all losses are of equal budgets.
    """
    study = study_of(records, space, at_step=step)
    losses = [trial.value for trial in study.trials]
    if len(losses) < FEWEST_FOR_IMPORTANCE or len(set(losses)) < 2:
        return {}
    return optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=seed)
    )


def report_content(records: Sequence[TrialRecord], recipe: TuneRecipe, summary: Mapping[str, Any]) -> ReportContent:
    """All that the page shows."""
    base, best = summary["base_loss"], summary["best_loss"]
    if summary["best_trial"] == 0:
        gain = "That is the base recipe: the search found nothing better."
    elif base is None:
        gain = "The base recipe's own trial failed."
    else:
        gain = f"The base recipe's is {base:.4f}: the best trial's is {100 * (1 - best / base):.1f} % lower."
    drawings = [_parallel(records, recipe, summary["best_trial"])]
    shares = importances(records, recipe.searched, recipe.grace_steps, recipe.seed)
    if shares:
        drawings.append(
            Drawing(
                "What matters",
                f"Share of the variance of the validation loss at step {recipe.grace_steps}, which all trials reached, "
                f"by fANOVA over {len(records)} trials. With few trials these shares are rough, and what matters early "
                "need not be what matters late.",
                bars_svg(shares, "; ".join(f"{key}: {100 * share:.0f} percent" for key, share in shares.items())),
                {},
            )
        )
    return ReportContent(
        title=f"Sweep: {summary['trials']} trials of {recipe.train.avatar.method}",
        summary=(
            f"Trial {summary['best_trial']} is the best, with a validation loss of {best:.4f} after "
            f"{recipe.trial_steps} steps. {gain} {summary['stopped']} trials were stopped early, "
            f"{summary['completed']} completed, {summary['failed']} failed."
        ),
        headline=(),
        tables=[_trial_table(records, recipe, summary["best_trial"])],
        drawings=drawings,
        training_curves=[_learning_curves(records, recipe, summary["best_trial"])],
        facts={
            "Data": {"shard set": summary["shards_digest"][:16]},
            "Runs": {"sweep": summary["run_id"]},
            "Result": {
                "recipe": summary["best_recipe"],
                "avatar": summary["avatar"] or "not trained",
                "its validation loss": summary["avatar_loss"] or "–",
                "its steps": recipe.train.steps,
                "model": summary["model"] or "not registered",
            },
            "Environment": {
                "code": code_version(),
                "python": platform.python_version(),
                "ray": ray.__version__,
                "optuna": optuna.__version__,
            },
        },
        config=recipe.model_dump(mode="json"),
    )


def _trial_table(records: Sequence[TrialRecord], recipe: TuneRecipe, best: int) -> ReportTable:
    space = recipe.searched
    ranked = sorted(records, key=lambda record: (record.loss is None, record.loss or 0.0, -record.last_step))
    return ReportTable(
        title="Trials",
        note=(
            "Completed trials by the validation loss of their best checkpoint, all after the same number of steps; "
            "then those that did not get so far. All are judged by one yardstick (validation_loss, "
            "validation_signals), whatever weights they were trained with. The best of many is chosen on the frames "
            "that it is judged by, so its loss flatters it: an evaluation on held-out frames does not. Trial 0 is the "
            "base recipe."
        ),
        labels=("trial", "state"),
        figures=("last step", f"loss at step {recipe.grace_steps}", "loss", *(_name(key) for key in space)),
        rows=[
            (
                (f"{record.number} (best)" if record.number == best else str(record.number), record.state),
                (
                    str(record.last_step),
                    _figure(record.loss_at(recipe.grace_steps)),
                    _figure(record.loss),
                    *(_text(record.values[key]) for key in space),
                ),
            )
            for record in ranked
        ],
    )


def _learning_curves(records: Sequence[TrialRecord], recipe: TuneRecipe, best: int) -> Chart:
    """One curve a kind of trial, broken between trials: so the legend stays short."""
    # In the order of their colours.
    kinds = sorted(_LEGEND, key=lambda kind: _LEGEND[kind])
    curves: dict[str, tuple[list[float], list[float]]] = {kind: ([], []) for kind in kinds}
    for record in records:
        steps, losses = curves[_kind(record, best)]
        for step, loss in record.reports:
            steps.append(step)
            losses.append(loss)
        steps.append(float(record.last_step))
        losses.append(math.nan)
    return Chart(
        "Validation loss of all trials",
        "step",
        "validation loss",
        curves,
        log_y=True,
        caption="A stopped trial's curve ends where ASHA ended it. The base recipe is never stopped.",
    )


def _parallel(records: Sequence[TrialRecord], recipe: TuneRecipe, best: int) -> Drawing:
    space, step = recipe.searched, recipe.grace_steps
    losses = [loss for record in records if (loss := record.loss_at(step)) is not None and math.isfinite(loss)]
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    if low == high:
        high = low + 1.0
    loss_axis = Axis(f"loss at step {step}", [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")])

    def loss_place(loss: float | None) -> float | None:
        return None if loss is None or not math.isfinite(loss) else (loss - low) / (high - low)

    lines = [
        Line(
            label=f"trial {record.number}, {record.state}: {_described(record.values)}",
            places=[
                *(_place(dimension, record.values[key]) for key, dimension in space.items()),
                loss_place(record.loss_at(step)),
            ],
            series=_LEGEND[_kind(record, best)],
            strong=record.number in (0, best),
        )
        for record in records
    ]
    axes = [*(Axis(_name(key), _ticks(dimension)) for key, dimension in space.items()), loss_axis]
    return Drawing(
        "Settings and what came of them",
        f"A line is a trial; the last axis is its validation loss at step {step}, which all reached.",
        parallel_svg(axes, lines, f"Parallel coordinates of {len(records)} trials; best is trial {best}."),
        _LEGEND,
    )


def _kind(record: TrialRecord, best: int) -> str:
    if record.number == best:
        return "best"
    if record.number == 0:
        return "base recipe"
    return {"completed": "completed", "stopped": "stopped early"}.get(record.state, "failed")


def _place(dimension: Uniform | Int | Choice, value: Value) -> float | None:
    """Where a value stands on its axis, from 0 to 1; None if it lies outside."""
    if not dimension.holds(value):
        return None
    if isinstance(dimension, Choice):
        codes = [dimension.coded(known) for known in dimension.values]
        return codes.index(dimension.coded(value)) / (len(codes) - 1)
    low, high, number = float(dimension.low), float(dimension.high), float(value)  # type: ignore[arg-type]
    if _is_log(dimension):
        low, high, number = math.log(low), math.log(high), math.log(number)
    return (number - low) / (high - low)


def _ticks(dimension: Uniform | Int | Choice) -> list[tuple[float, str]]:
    if isinstance(dimension, Choice):
        last = len(dimension.values) - 1
        return [(index / last, _text(value)) for index, value in enumerate(dimension.values)]
    return [(0.0, f"{dimension.low:.4g}"), (1.0, f"{dimension.high:.4g}")]


def _is_log(dimension: Uniform | Int) -> bool:
    return dimension.log if isinstance(dimension, Int) else dimension.kind == "loguniform"


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _text(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _described(values: Mapping[str, Value]) -> str:
    return ", ".join(f"{key}={_text(value)}" for key, value in values.items())
