"""The comparison job: ``lipflow compare [NAME=]EVALUATION... --out DIR`` makes tables of evaluations that are done.

Nothing is run again: the tables follow from the evaluations' ``scores.json``. Evaluations of one NAME are seeds of one
variant. What was scored on other frames, cameras or shards is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.recipe import load_recipe
from cluster.reports.evaluation_report import Comparison, compared, write_comparison
from cluster.scores.protocols import Protocol
from cluster.scores.sheet import read_scores
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
    """

    protocol: Protocol | None = None
    intervals: IntervalUnit = "auto"
    baseline: str | None = None


def compare(evaluations: list[str], out_uri: str, recipe: CompareRecipe) -> Comparison:
    """Tables of evaluations side by side, written to ``out_uri``.

    Args:
        evaluations: ``[NAME=]URI`` of an evaluation's folder or of its ``scores.json``.
        out_uri: where tables go.
        recipe: the settings.

    Raises:
        LipflowError: scores that cannot be read, that are of different data, or that are called alike by chance.
    """
    storage.check_writable(storage.normalize_uri(out_uri))
    pairs = [named(argument) for argument in evaluations]
    sheets = [read_scores(uri, name) for name, uri in pairs]
    refuse_namesakes([(name, sheet.name) for (name, _), sheet in zip(pairs, sheets, strict=True)])
    comparison = compared(sheets, recipe.protocol, recipe.intervals, recipe.baseline)
    write_comparison(out_uri, comparison, (), {}, recipe.model_dump(mode="json"))
    return comparison


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
        list[str], typer.Argument(metavar="EVALUATION...", help="[NAME=] output folder of lipflow evaluate.")
    ],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where tables go.")],
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put finished evaluations side by side; those of one NAME are seeds of one variant."""
    comparison = compare(evaluations, out, load_recipe(CompareRecipe, recipe, set_ or ()))
    command.emit(comparison.document(), as_json, comparison.text(f"{out}/report.html"))


if __name__ == "__main__":
    command.run_job("cluster.compare", "compare_command")
