"""The comparison job: ``lipflow compare [NAME=]EVALUATION... [--out DIR]`` makes tables of evaluations that are done.

An EVALUATION is the output folder of ``lipflow evaluate``, a registered version (``models:/…``: its last evaluation),
or a run (``runs:/…``) of an evaluation or of the training that it grew out of. Nothing is run again: the tables follow
from the evaluations' ``scores.json``. Evaluations of one NAME are seeds of one variant. What was scored on other
frames, cameras or shards is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.recipe import load_recipe
from cluster.records.evaluations import find_scores
from cluster.records.tracking import TrackingConfig
from cluster.reports.evaluation_report import Comparison, compared, write_comparison
from cluster.scores.protocols import Protocol
from cluster.scores.sheet import ScoreSheet, read_scores
from cluster.scores.tables import IntervalUnit
from lipflow.config import StrictConfig
from lipflow.errors import ConfigError
from pipeline import storage


class CompareRecipe(StrictConfig):
    """Settings of a comparison.

    Attributes:
        protocol: whose tables; None: of both, as far as they were scored.
        intervals: resample whole ``segment`` or single ``frame``; ``auto``: segments from 8 held-out ones on.
        baseline: name of the variant whose errors ratios are over; None: the first.
        tracking: the MLflow store, for ``models:/`` and ``runs:/``.
    """

    protocol: Protocol | None = None
    intervals: IntervalUnit = "auto"
    baseline: str | None = None
    tracking: TrackingConfig = TrackingConfig()


def compare(evaluations: list[str], out_uri: str | None, recipe: CompareRecipe) -> Comparison:
    """Tables of evaluations side by side, written to ``out_uri``.

    Args:
        evaluations: ``[NAME=]URI`` of an evaluation's folder, of its ``scores.json``, of a registered version or a run.
        out_uri: where tables go; None: nowhere.
        recipe: the settings.

    Raises:
        LipflowError: scores that cannot be read, that are of different data, or that are called alike by chance.
    """
    if out_uri is not None:
        storage.check_writable(storage.normalize_uri(out_uri))
    pairs = [named(argument) for argument in evaluations]
    sheets = [_scores(uri, name, recipe.tracking) for name, uri in pairs]
    refuse_namesakes([(name, sheet.name) for (name, _), sheet in zip(pairs, sheets, strict=True)])
    comparison = compared(sheets, recipe.protocol, recipe.intervals, recipe.baseline)
    if out_uri is not None:
        write_comparison(out_uri, comparison, (), {}, recipe.model_dump(mode="json"))
    return comparison


def _scores(uri: str, name: str | None, tracking: TrackingConfig) -> ScoreSheet:
    if uri.startswith(("models:/", "runs:/")):
        return find_scores(uri, tracking, name or called(uri))
    return read_scores(uri, name)


def called(model: str) -> str:
    """A name for a model: ``lipflow@champion`` of ``models:/lipflow@champion``, ``base`` of ``s3://runs/base/avatar``."""
    parts = model.rstrip("/").split("/")
    if model.startswith(("models:/", "runs:/")):
        return "-".join(part for part in parts[1:] if part)
    return parts[-2] if parts[-1] == "avatar" and len(parts) > 1 else parts[-1]


def named(argument: str) -> tuple[str | None, str]:
    """``NAME=URI`` taken apart; the name is None where there is none. A URI may hold ``=`` itself, after a ``/``."""
    name, separator, uri = argument.partition("=")
    if separator and name and "/" not in name and ":" not in name:
        return name, uri
    return None, argument


def refuse_namesakes(names: Sequence[tuple[str | None, str]]) -> None:
    """Seeds of one variant are named as such; what was named by us must not become a seed by chance.

    Args:
        names: (as it was given, as it is called).

    Raises:
        ConfigError: a name that was not given stands twice.
    """
    called = [name for _, name in names]
    for given, name in names:
        if given is None and called.count(name) > 1:
            raise ConfigError(
                f"two are called {name!r}: give names, as in A=… B=…; equal names are seeds of one variant"
            )


def compare_command(
    evaluations: Annotated[
        list[str],
        typer.Argument(metavar="EVALUATION...", help="[NAME=] output of lipflow evaluate, models:/ or runs:/ URI."),
    ],
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Where tables go; only to the terminal if left out.")
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put finished evaluations side by side; those of one NAME are seeds of one variant."""
    comparison = compare(evaluations, out, load_recipe(CompareRecipe, recipe, set_ or ()))
    command.emit(comparison.document(), as_json, comparison.text(None if out is None else f"{out}/report.html"))


if __name__ == "__main__":
    command.run_job("cluster.compare", "compare_command")
