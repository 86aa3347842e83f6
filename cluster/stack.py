"""``lipflow stack up|status|down``: a real S3 server, an MLflow server and a Ray cluster on this machine's loopback.

For trials and tests of what runs on a cluster elsewhere; see :mod:`cluster.services`.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.recipe import load_recipe
from cluster.services.servers import StackConfig
from cluster.services.stack import StackState, stack_down, stack_status, stack_up
from lipflow.errors import ConfigError

ACTIONS = ("up", "status", "down")


def default_folder() -> Path:
    """Where the stack is unless ``--folder`` says otherwise."""
    return Path(os.environ.get("LIPFLOW_STACK_FOLDER") or Path.home() / ".lipflow" / "stack")


def stack_command(
    action: Annotated[str, typer.Argument(metavar="up|status|down", help="What to do.")],
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The stack's folder (~/.lipflow/stack, or LIPFLOW_STACK_FOLDER)."),
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start, show or end S3, MLflow and Ray servers on this machine's loopback. status: exit code 1 if not all well."""
    if action not in ACTIONS:
        raise ConfigError(f"stack {action}: expected one of {', '.join(ACTIONS)}")
    folder = folder or default_folder()
    if action == "down":
        ended = stack_down(folder)
        command.emit(
            {"folder": str(folder.absolute()), "ended": ended},
            as_json,
            f"{folder}: {ended} processes ended; its data and keys stay" if ended else f"{folder}: nothing ran",
        )
        return
    config = load_recipe(StackConfig, recipe, set_ or ())
    state = stack_up(folder, config) if action == "up" else stack_status(folder)
    _show(state)
    command.emit(asdict(state) | {"well": state.well}, as_json, _summary(state, action))
    if not state.well:
        raise typer.Exit(command.EXIT_BAD)


def _show(state: StackState) -> None:
    table = Table("server", "address", "pid", "state")
    for server in state.servers:
        table.add_row(server.name, server.address, str(server.pid or "-"), server.problem or "well")
    command.console.print(table)


def _summary(state: StackState, action: str) -> str:
    if not state.well:
        return f"{state.folder}: not all is well; `lipflow stack down` and `up` start it afresh"
    lines = [] if state.started or action == "status" else [f"{state.folder}: it runs already"]
    lines += [
        f"use it:  set -a; . {state.env_file}; set +a",
        f"then:    lipflow submit demo -- --out s3://{state.bucket}/demo",
        f"look:    {state.dashboard} (Ray), {state.servers[1].address} (MLflow)",
        f"end it:  lipflow stack down --folder {state.folder}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    command.run_job("cluster.stack", "stack_command")
