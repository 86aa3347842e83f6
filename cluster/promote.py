"""The promotion job: ``lipflow promote [MODEL]`` moves the alias ``champion`` only to a better model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.recipe import load_recipe
from cluster.records.promotion import PromotionConfig, PromotionDecision, promote, rollback
from cluster.records.registry import CHALLENGER, DEFAULT_NAME, parse_model_uri
from cluster.records.tracking import TrackingConfig
from cluster.scores.gate import decision_table
from cluster.scores.tables import as_markdown
from lipflow.config import StrictConfig


class PromoteRecipe(StrictConfig):
    """Settings of a promotion.

    Attributes:
        criterion: what better means; by default a surely higher mean image PSNR over all driving signals after the
            fit, and no error of any region more than 5 % worse.
        tracking: the MLflow store with the registry.
    """

    criterion: PromotionConfig = PromotionConfig()
    tracking: TrackingConfig = TrackingConfig()


def promote_model(model: str, recipe: PromoteRecipe) -> PromotionDecision:
    """Compare a registered version, as it was evaluated, with the champion; see :mod:`cluster.scores.gate`.

    Raises:
        RegistryError: ``model`` is no ``models:/`` URI of a version that was evaluated.
    """
    name, candidate = parse_model_uri(model)
    return promote(recipe.tracking, recipe.criterion, candidate=candidate, name=name)


def _shown(decision: PromotionDecision) -> str:
    """For a terminal: the table, and the sentence below it."""
    compared = decision.gain is not None
    title = (
        f"Errors of version {decision.candidate_version} over those of champion {decision.champion_version}"
        if compared
        else f"Errors of version {decision.candidate_version}"
    )
    note = f"Paired by frame; below 1 is better. {decision.note}" if compared else "Not compared with a champion's."
    verdict = "promoted" if decision.promoted else "refused"
    return f"{as_markdown(decision_table(decision.rows, title, note))}\n{verdict}: {decision.reason}"


def promote_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="models:/NAME@ALIAS or models:/NAME/VERSION.")
    ] = f"models:/{DEFAULT_NAME}@{CHALLENGER}",
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an evaluated model the champion, if it is surely better and nowhere much worse. Exit code 1 if not."""
    decision = promote_model(model, load_recipe(PromoteRecipe, recipe, set_ or ()))
    command.emit(asdict(decision), as_json, _shown(decision))
    if not decision.promoted:
        raise typer.Exit(command.EXIT_BAD)


def rollback_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Registered model.")] = DEFAULT_NAME,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give the champion's place back to the version that held it before."""
    settings = load_recipe(PromoteRecipe, recipe, set_ or ())
    before, after = rollback(settings.tracking, name=name)
    command.emit(
        {"name": name, "from": before, "to": after}, as_json, f"{name}: champion was version {before}, is {after}"
    )


if __name__ == "__main__":
    command.run_job("cluster.promote", "promote_command")
