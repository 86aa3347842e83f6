"""What a run has to send waits here, and a thread sends it: a store that is away costs the job nothing.

MLflow's own asynchronous logging gives up what the store refused. Here it is sent again until it is taken, which makes
no duplicates: MLflow keeps one of metrics that are equal in name, step, time and value. What waits is bounded; beyond
that the oldest is dropped, and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lipflow.errors import LipflowError

if TYPE_CHECKING:
    from mlflow.entities import Metric

METRICS_PER_REQUEST = 1000
SEND_AFTER_METRICS = 500
SEND_AFTER_S = 5.0
FIRST_RETRY_AFTER_S = 1.0
LAST_RETRY_AFTER_S = 5.0
MOST_PARCELS = 16
"""A picture of 2048 x 1334 pixels is 8 MB."""

_logger = logging.getLogger(__name__)


class TrackingError(LipflowError):
    """A tracking store that cannot be reached or used, or a run that it does not hold."""


@dataclass(frozen=True)
class Parcel:
    """Something larger than a metric, such as a picture; it may be sent twice, if the answer to the first got lost."""

    name: str
    send: Callable[[], None]


@dataclass(frozen=True)
class Dropped:
    """What did not fit any more while the store was away.

    Attributes:
        metrics: their number.
        first_step: the least step of them; ``last_step`` the greatest.
        parcels: names of the parcels.
    """

    metrics: int = 0
    first_step: int = 0
    last_step: int = 0
    parcels: tuple[str, ...] = ()

    def with_metric(self, step: int) -> Dropped:
        """This and a metric at ``step``."""
        first, last = (self.first_step, self.last_step) if self.metrics else (step, step)
        return Dropped(self.metrics + 1, min(first, step), max(last, step), self.parcels)

    def with_parcel(self, name: str) -> Dropped:
        """This and a parcel."""
        return Dropped(self.metrics, self.first_step, self.last_step, (*self.parcels, name))


class Outbox:
    """A bounded queue with one sending thread, which starts with the first thing that is put in.

    Args:
        send_metrics: sends up to 1000 metrics in one request; raises :class:`TrackingError` if the store does not
            take them, and is then called again with the same ones.
        most_metrics: so many wait at most, and 1000 more that are being sent.
    """

    def __init__(self, send_metrics: Callable[[Sequence[Metric]], None], *, most_metrics: int) -> None:
        self._send_metrics = send_metrics
        self._most_metrics = most_metrics
        self._changed = threading.Condition()
        self._metrics: deque[Metric] = deque()
        self._under_way: list[Metric] = []
        self._parcels: deque[Parcel] = deque()
        self._dropped = Dropped()
        self._oldest_s = 0.0
        self._waiters = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        self._failure: TrackingError | None = None
        self._failing_since_s = 0.0

    @property
    def dropped(self) -> Dropped:
        """What was dropped so far."""
        return self._dropped

    @property
    def failure(self) -> TrackingError | None:
        """Why the last request failed; None while the store takes what is sent."""
        return self._failure

    def add(self, metrics: Iterable[Metric]) -> None:
        """Put metrics in; never waits for the store."""
        with self._changed:
            if not self._metrics:
                self._oldest_s = time.monotonic()
            for metric in metrics:
                if len(self._metrics) == self._most_metrics:
                    self._dropped = self._dropped.with_metric(self._metrics.popleft().step)
                self._metrics.append(metric)
            self._wake()

    def add_parcel(self, parcel: Parcel) -> None:
        """Put a parcel in; never waits for the store."""
        with self._changed:
            if len(self._parcels) == MOST_PARCELS:
                # Not the first, which may be on its way.
                oldest = self._parcels[1]
                self._parcels.remove(oldest)
                self._dropped = self._dropped.with_parcel(oldest.name)
                _logger.warning("%s was dropped: %d others wait for the tracking store", oldest.name, MOST_PARCELS)
            self._parcels.append(parcel)
            self._wake()

    def drain(self, timeout_s: float) -> bool:
        """Send at once what waits; whether all of it was taken within the time."""
        with self._changed:
            self._waiters += 1
            self._wake()
            try:
                return self._changed.wait_for(self._is_empty, timeout_s)
            finally:
                self._waiters -= 1

    def waiting_metrics(self) -> list[Metric]:
        """What was not taken yet, in the order in which it was put in."""
        with self._changed:
            return [*self._under_way, *self._metrics]

    def waiting_parcels(self) -> list[str]:
        """Names of the parcels that were not taken yet."""
        with self._changed:
            return [parcel.name for parcel in self._parcels]

    def close(self) -> None:
        """Send nothing more; what waits can still be asked for. A request that is under way is not waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wake(self) -> None:
        if self._thread is None and not self._closed and not self._is_empty():
            # A daemon: a request that hangs must not keep the process.
            self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _is_empty(self) -> bool:
        return not (self._metrics or self._under_way or self._parcels)

    def _work(self) -> None:
        pause_s = 0.0
        while self._wait_until_due(pause_s):
            try:
                self._send_some()
            except Exception as error:  # the thread must outlive whatever a request may raise
                pause_s = min(max(FIRST_RETRY_AFTER_S, 2 * pause_s), LAST_RETRY_AFTER_S)
                self._note_failure(error)
            else:
                pause_s = 0.0
                self._note_success()

    def _wait_until_due(self, pause_s: float) -> bool:
        """Wait for ``pause_s`` and for something to send; False once the box is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, pause_s)
            while not self._closed and not self._is_due():
                age_s = time.monotonic() - self._oldest_s
                self._changed.wait(max(0.0, SEND_AFTER_S - age_s) if self._metrics else None)
            return not self._closed

    def _is_due(self) -> bool:
        if self._under_way or self._parcels:
            return True
        enough = self._waiters or len(self._metrics) >= SEND_AFTER_METRICS
        return bool(self._metrics) and bool(enough or time.monotonic() - self._oldest_s >= SEND_AFTER_S)

    def _send_some(self) -> None:
        """One request's worth of metrics, and then one parcel: one that is refused must not hold up the metrics."""
        with self._changed:
            if not self._under_way:  # else the same ones again: the store may have them already
                count = min(len(self._metrics), METRICS_PER_REQUEST)
                self._under_way = [self._metrics.popleft() for _ in range(count)]
            self._oldest_s = time.monotonic()
            metrics = list(self._under_way)
        if metrics:
            self._send_metrics(metrics)
            with self._changed:
                self._under_way = []
                self._changed.notify_all()
        with self._changed:
            parcel = self._parcels[0] if self._parcels else None
        if parcel is not None:
            parcel.send()
            with self._changed:
                self._parcels.popleft()
                self._changed.notify_all()

    def _note_failure(self, error: Exception) -> None:
        if not isinstance(error, TrackingError):
            error = TrackingError(f"{type(error).__name__}: {error}")
        if self._failure is None:
            self._failing_since_s = time.monotonic()
            _logger.warning("metrics and pictures wait until the tracking store takes them: %s", error)
        self._failure = error

    def _note_success(self) -> None:
        if self._failure is not None:
            away_s = time.monotonic() - self._failing_since_s
            _logger.warning("the tracking store takes metrics again, after %.0f s", away_s)
        self._failure = None
