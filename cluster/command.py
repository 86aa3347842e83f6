"""What every command shares: its options, its error handling and its exit codes.

Exit codes: 0 done, 1 what was checked is bad, 2 wrong use or bad input. Results go to standard output, everything
else to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.console import Console

from lipflow.errors import LipflowError

EXIT_BAD = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

RecipeOption = Annotated[str | None, typer.Option("--recipe", help="YAML file of settings (path or URI).")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting of the recipe; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]

console = Console(stderr=True)
"""Standard error: progress, tables, messages."""


def emit(result: dict[str, Any], as_json: bool, summary: str) -> None:
    """Print a command's result: one JSON document, or a line for people, on standard output."""
    if as_json:
        print(json.dumps(result, indent=2, default=str))
    else:
        Console(soft_wrap=True).print(summary, highlight=False, markup=False)


def add_command(app: typer.Typer, function: Callable[..., Any], name: str | None = None, summary: str = "") -> None:
    """Add a command to a command line, with the ``CONTEXT_SETTINGS`` of its module, if it has any."""
    settings = getattr(sys.modules[function.__module__], "CONTEXT_SETTINGS", None)
    app.command(name, help=summary or None, context_settings=settings)(function)


def run_job(module: str, function: str) -> None:
    """Run a job of ``python -m cluster.<job>`` by its importable name.

    What a job sends to Ray's workers has to be found in a module that they can import; ``__main__`` is none.
    """
    run(getattr(import_module(module), function))


def run(app: typer.Typer | Callable[..., Any]) -> None:
    """Run a command line and leave the process with its exit code.

    Bad input is one line on standard error; ``--debug`` anywhere on the line (or ``LIPFLOW_DEBUG=1``) shows the
    traceback.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1 or os.environ.get("LIPFLOW_DEBUG") == "1"
    if debug:
        os.environ["LIPFLOW_DEBUG"] = "1"
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, stream=sys.stderr)
    if not isinstance(app, typer.Typer):
        command, app = app, typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        add_command(app, command)
    try:
        app(args=arguments)
    except LipflowError as error:
        if debug:
            raise
        print("lipflow: error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
