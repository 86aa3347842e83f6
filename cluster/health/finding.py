"""One thing that was looked at: what is there, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.records.redaction import redact_text

State = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """What a check came to.

    Attributes:
        name: what was looked at.
        state: ``ok``; ``warn``: jobs run, but less well, or not all of them; ``bad``: jobs will fail.
        found: what is there.
        remedy: what to do, one line; empty if nothing.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def checked(name: str, check: Callable[[], Finding]) -> Finding:
    """The finding of ``check``, without secrets; a check that cannot be made is ``bad``."""
    try:
        finding = check()
    except Exception as error:
        finding = Finding(name, "bad", f"cannot be looked at ({type(error).__name__}: {error})", "repair what it says")
    return Finding(finding.name, finding.state, _one_line(finding.found), _one_line(finding.remedy))


def _one_line(text: str) -> str:
    return redact_text(" ".join(text.split()))
