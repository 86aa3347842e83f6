"""``lipflow doctor``: what is there, what is missing, and what to do.

It runs on a laptop as well as on a cluster (``lipflow submit doctor``), where it sees what a job sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cluster import command
from cluster.command import JsonOption, console
from cluster.health import machine, services
from cluster.health.finding import Finding, checked

_STYLES = {"ok": "green", "warn": "yellow", "bad": "red"}


def diagnose(uris: Sequence[str] = ()) -> list[Finding]:
    """All findings; ``uris`` are folders of storage to write to."""
    checks = machine.CHECKS | services.CHECKS | {uri: partial(services.writable, uri) for uri in uris}
    return [checked(name, check) for name, check in checks.items()]


def doctor_command(
    uris: Annotated[
        list[str] | None, typer.Argument(metavar="[URI]...", help="Storage to write to, such as s3://bucket/folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is there, what is missing and what to do. Exit code 1 if something is bad."""
    findings = diagnose(uris or ())
    if not as_json:
        _show(findings)
    counts = {state: sum(finding.state == state for finding in findings) for state in _STYLES}
    document = {"good": not counts["bad"], **counts, "findings": [asdict(finding) for finding in findings]}
    command.emit(document, as_json, ", ".join(f"{count} {state}" for state, count in counts.items()))
    if counts["bad"]:
        raise typer.Exit(command.EXIT_BAD)


def _show(findings: Sequence[Finding]) -> None:
    table = Table("", "state", "found", "what to do")
    for column in table.columns:
        column.overflow = "fold"
    for finding in findings:
        state = f"[{_STYLES[finding.state]}]{finding.state}[/]"
        table.add_row(escape(finding.name), state, escape(finding.found), escape(finding.remedy))
    console.print(table)


if __name__ == "__main__":
    command.run_job("cluster.doctor", "doctor_command")
