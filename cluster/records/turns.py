"""Taking turns at a registered model: whoever reads its champion and then moves the alias must be alone.

MLflow's aliases and tags are set without comparing, so a *turn* is taken first. For an SQLite store it is a lock file
beside the database, which the system releases when its holder dies. A server has nothing to lock, but tags that can be
written one by one and read together; that is enough for Lamport's bakery (1974): everybody writes a ticket of its own,
numbered above all that it can see, and the lowest number is served.

A ticket whose holder died would bar the way for good. One that somebody has watched unchanged for ``LEASE_S`` is torn
up; clocks of different machines are never compared. A holder who was only slow finds that out by :meth:`Turn.require`
before it writes. What remains is a stall of minutes *between* that question and the very next request.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from lipflow.errors import LipflowError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TICKET_PREFIX = "lipflow.turn."
LEASE_S = 120.0
LONGEST_WAIT_S = 900.0

_SQLITE = "sqlite:///"
_POLL_S = 0.2

_logger = logging.getLogger(__name__)


class TurnError(LipflowError):
    """A turn that did not come, or that was lost."""


@dataclass(frozen=True)
class Turn:
    """A turn that has come.

    Attributes:
        is_ours: whether it still is.
    """

    is_ours: Callable[[], bool]

    def require(self) -> None:
        """Refuse to go on with a turn that was taken away.

        Raises:
            TurnError: it was.
        """
        if not self.is_ours():
            raise TurnError(f"the turn was given to somebody else after {LEASE_S:.0f} s: run it again")


@contextmanager
def turn_at(client: MlflowClient, name: str) -> Iterator[Turn]:
    """Be alone with the registered model ``name`` inside the ``with`` block; others wait. Not to be nested.

    Raises:
        TurnError: it did not come within ``LONGEST_WAIT_S``.
    """
    if client.tracking_uri.startswith(_SQLITE):
        with _file_turn(client.tracking_uri.removeprefix(_SQLITE)) as turn:
            yield turn
    else:
        with _ticket_turn(client, name) as turn:
            yield turn


@contextmanager
def _file_turn(database: str) -> Iterator[Turn]:
    from filelock import FileLock, Timeout

    lock = FileLock(f"{database}.champions.lock", timeout=LONGEST_WAIT_S)
    try:
        lock.acquire()
    except Timeout as error:
        raise TurnError(f"{lock.lock_file} was not released within {LONGEST_WAIT_S:.0f} s: see who holds it") from error
    try:
        yield Turn(lambda: True)
    finally:
        lock.release()


@contextmanager
def _ticket_turn(client: MlflowClient, name: str) -> Iterator[Turn]:
    key = f"{TICKET_PREFIX}{uuid.uuid4().hex}"

    def write(number: int) -> None:
        holder = {"by": f"{socket.gethostname()}:{os.getpid()}", "at": datetime.now(UTC).isoformat(timespec="seconds")}
        client.set_registered_model_tag(name, key, json.dumps({"number": number, **holder}))

    def tickets() -> dict[str, str]:
        tags = client.get_registered_model(name).tags
        return {tag: value for tag, value in tags.items() if tag.startswith(TICKET_PREFIX)}

    try:
        # Number 0: about to take one. Others wait until it is known.
        write(0)
        write(1 + max(_number(ticket) for ticket in tickets().values()))
        _wait_for_turn(client, name, key, tickets)
        yield Turn(lambda: key in tickets())
    finally:
        client.delete_registered_model_tag(name, key)


def _wait_for_turn(client: MlflowClient, name: str, key: str, tickets: Callable[[], dict[str, str]]) -> None:
    began = time.monotonic()
    watched: dict[tuple[str, str], float] = {}
    while True:
        held = tickets()
        if key not in held:
            raise TurnError(f"the ticket for model {name!r} was torn up after {LEASE_S:.0f} s: run it again")
        ours = (_number(held[key]), key)
        ahead = {item for item in held.items() if item[0] != key and (_number(item[1]), item[0]) < ours}
        if not ahead:
            return
        now = time.monotonic()
        watched = {ticket: watched.get(ticket, now) for ticket in ahead}
        for ticket in [ticket for ticket, since in watched.items() if now - since > LEASE_S]:
            _logger.warning("tearing up the ticket of a promotion that seems dead: %s", ticket[1])
            client.delete_registered_model_tag(name, ticket[0])
        if now - began > LONGEST_WAIT_S:
            raise TurnError(f"model {name!r} is being promoted by {min(ahead)[1]}: try again when that is done")
        time.sleep(_POLL_S * random.uniform(0.5, 1.5))


def _number(ticket: str) -> int:
    """Of a ticket; 0 while it is being taken, and for what is no ticket of ours, until it is torn up."""
    try:
        return int(json.loads(ticket)["number"])
    except (ValueError, KeyError, TypeError):
        return 0


__all__ = ["LEASE_S", "TICKET_PREFIX", "Turn", "TurnError", "turn_at"]
