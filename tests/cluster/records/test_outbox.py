"""What is put in arrives once and in order, however the store behaves, and nobody waits for it."""

from __future__ import annotations

import threading

import pytest

from cluster.records import outbox as outbox_module
from cluster.records.outbox import MOST_PARCELS, Dropped, Outbox, Parcel, TrackingError

LONG_S = 60.0


class Point:
    """As much of a metric as an outbox looks at."""

    def __init__(self, step: int):
        self.step = step


class Store:
    """Takes metrics while ``open`` is set; notes the sizes of all requests and what it took."""

    def __init__(self):
        self.open = threading.Event()
        self.asked = threading.Event()
        self.taken: list[int] = []
        self.requests: list[int] = []

    def take(self, metrics):
        self.requests.append(len(metrics))
        self.asked.set()
        if not self.open.is_set():
            raise TrackingError("the store is away")
        self.taken += [metric.step for metric in metrics]


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr(outbox_module, "FIRST_RETRY_AFTER_S", 0.01)
    monkeypatch.setattr(outbox_module, "LAST_RETRY_AFTER_S", 0.02)


@pytest.fixture
def store() -> Store:
    return Store()


def filled(store: Store, count: int, most: int = 100_000) -> Outbox:
    box = Outbox(store.take, most_metrics=most)
    for step in range(count):
        box.add([Point(step)])
    return box


def test_metrics_wait_for_the_store_and_arrive_once_and_in_order(store, caplog):
    box = filled(store, 3500)
    assert not box.drain(0.05)
    assert isinstance(box.failure, TrackingError)
    assert [metric.step for metric in box.waiting_metrics()] == list(range(3500))
    store.open.set()
    assert box.drain(LONG_S)
    assert box.failure is None
    assert store.taken == list(range(3500))
    assert max(store.requests) <= outbox_module.METRICS_PER_REQUEST
    assert box.dropped == Dropped()
    # One line for the outage, one for its end, however many requests failed.
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "metrics and pictures wait until the tracking store takes them",
        "the tracking store takes metrics again, after 0 s",
    ]


def test_full_outbox_keeps_the_newest_and_counts_what_it_dropped(store):
    box = filled(store, 1000, most=1000)
    assert store.asked.wait(LONG_S)
    for step in range(1000, 4000):
        box.add([Point(step)])
    waiting = [metric.step for metric in box.waiting_metrics()]
    under_way = len(waiting) - 1000
    assert 500 <= under_way <= 1000
    # What was on its way is kept; the rest is the newest.
    assert waiting == [*range(under_way), *range(3000, 4000)]
    assert box.dropped == Dropped(metrics=3000 - under_way, first_step=under_way, last_step=2999)
    store.open.set()
    assert box.drain(LONG_S)
    assert store.taken == waiting


def test_few_metrics_are_sent_by_themselves_after_a_while(store, monkeypatch):
    monkeypatch.setattr(outbox_module, "SEND_AFTER_S", 0.05)
    store.open.set()
    box = filled(store, 3)
    assert store.asked.wait(LONG_S)
    assert box.drain(LONG_S)
    assert store.taken == [0, 1, 2]


def test_store_that_hangs_keeps_neither_the_caller_nor_the_closing(store):
    release = threading.Event()

    def hang(metrics):
        store.asked.set()
        release.wait(LONG_S)

    box = Outbox(hang, most_metrics=1000)
    box.add([Point(step) for step in range(600)])
    assert store.asked.wait(LONG_S)
    box.add([Point(600)])
    assert not box.drain(0.01)
    box.close()
    assert len(box.waiting_metrics()) == 601
    release.set()


def test_error_of_any_kind_leaves_the_thread_alive(store):
    calls = []

    def send(metrics):
        calls.append(len(metrics))
        if len(calls) == 1:
            raise ZeroDivisionError("a defect of a library")
        store.taken += [metric.step for metric in metrics]

    box = Outbox(send, most_metrics=1000)
    box.add([Point(1)])
    assert box.drain(LONG_S)
    assert store.taken == [1]
    assert len(calls) == 2


def test_parcel_that_is_refused_does_not_hold_up_metrics_and_is_sent_again(store):
    store.open.set()
    allowed, sent = threading.Event(), []

    def send():
        if not allowed.is_set():
            raise TrackingError("no room")
        sent.append("picture")

    box = Outbox(store.take, most_metrics=1000)
    box.add_parcel(Parcel("a.png", send))
    box.add([Point(step) for step in range(5)])
    assert not box.drain(0.3)
    assert store.taken == list(range(5))
    assert box.waiting_parcels() == ["a.png"]
    allowed.set()
    assert box.drain(LONG_S)
    assert sent == ["picture"]


def test_too_many_parcels_drop_the_oldest_by_name(store):
    def refuse():
        raise TrackingError("away")

    box = Outbox(store.take, most_metrics=1000)
    for index in range(MOST_PARCELS + 2):
        box.add_parcel(Parcel(f"{index}.png", refuse))
    assert box.dropped.parcels == ("1.png", "2.png")
    assert box.waiting_parcels() == ["0.png", *(f"{index}.png" for index in range(3, MOST_PARCELS + 2))]


def test_closed_outbox_sends_nothing_more(store):
    box = filled(store, 2)
    box.close()
    store.open.set()
    box.add([Point(2)])
    assert not box.drain(0.1)
    assert store.taken == []
    assert [metric.step for metric in box.waiting_metrics()] == [0, 1, 2]
