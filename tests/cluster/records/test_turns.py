"""Tickets admit one at a time with nothing but tags; here on SQLite, whose own turns are a lock file."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.records import turns
from cluster.records.tracking import TrackingConfig, open_client
from cluster.records.turns import TICKET_PREFIX, TurnError

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

NAME = "turns"


@pytest.fixture(scope="module")
def client(tracking_config: TrackingConfig):
    client = open_client(tracking_config)
    client.create_registered_model(NAME)
    return client


def tickets(client) -> list[str]:
    return [tag for tag in client.get_registered_model(NAME).tags if tag.startswith(TICKET_PREFIX)]


def hand_out(client, ticket: str, number: int) -> None:
    client.set_registered_model_tag(NAME, f"{TICKET_PREFIX}{ticket}", json.dumps({"number": number}))


def test_holders_of_tickets_are_alone(client):
    """What is read, waited over and written back loses nothing."""
    counter = [0]

    def count(_) -> None:
        for _ in range(3):
            with turns._ticket_turn(client, NAME) as turn:
                seen = counter[0]
                time.sleep(0.02)
                turn.require()
                counter[0] = seen + 1

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(count, range(3)))
    assert counter == [9]
    assert tickets(client) == []


def test_a_turn_ends_with_an_error_inside(client):
    with pytest.raises(ZeroDivisionError), turns._ticket_turn(client, NAME):
        raise ZeroDivisionError
    assert tickets(client) == []


def test_tickets_of_the_dead_are_torn_up(client, monkeypatch, caplog):
    """Of a holder, of one who was taking a ticket, and what is no ticket at all."""
    monkeypatch.setattr(turns, "LEASE_S", 0.3)
    hand_out(client, "held", 1)
    hand_out(client, "taking", 0)
    client.set_registered_model_tag(NAME, f"{TICKET_PREFIX}odd", "?")
    with turns._ticket_turn(client, NAME) as turn:
        assert len(tickets(client)) == 1
        turn.require()
    assert caplog.text.count("tearing up the ticket of a promotion that seems dead") == 3


def test_a_ticket_ahead_is_waited_for(client, monkeypatch):
    hand_out(client, "ahead", 7)
    monkeypatch.setattr(turns, "LONGEST_WAIT_S", 0.3)
    with pytest.raises(TurnError, match=f"model '{NAME}' is being promoted by .*7"), turns._ticket_turn(client, NAME):
        pass
    client.delete_registered_model_tag(NAME, f"{TICKET_PREFIX}ahead")
    assert tickets(client) == []


def test_a_holder_whose_ticket_is_gone_is_told(client):
    with turns._ticket_turn(client, NAME) as turn:
        turn.require()
        client.delete_registered_model_tag(NAME, tickets(client)[0])
        with pytest.raises(TurnError, match="given to somebody else after 120 s: run it again"):
            turn.require()
