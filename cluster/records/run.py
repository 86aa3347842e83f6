"""One MLflow run, as a job sees it: metrics are sent from the background, everything else is written at once."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.records.outbox import Outbox, Parcel, TrackingError
from cluster.records.redaction import redact_text
from cluster.records.unsent import UnsentMetrics

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient
    from PIL.Image import Image

LOST_METRICS_TAG = "lipflow.metrics_dropped"
LOST_PICTURES_TAG = "lipflow.pictures_dropped"

FLUSH_WAIT_S = 5.0
"""The longest that a checkpoint waits for the store."""

_LONGEST_TAG = 4000

_logger = logging.getLogger(__name__)


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """What MLflow, the database or the artifact storage of ``uri`` raise, as one-line errors of ours."""
    try:
        yield
    except _store_exceptions() as error:
        reason = (redact_text(str(error)).strip() or type(error).__name__).splitlines()[0]
        raise TrackingError(f"the tracking store {redact_text(uri)} refused: {reason}") from error


def _store_exceptions() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    exceptions: tuple[type[Exception], ...] = (MlflowException, RequestException, SQLAlchemyError)
    if "boto3" in sys.modules:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        exceptions += (Boto3Error, BotoCoreError, ClientError)
    return exceptions


class Run:
    """What a job writes to while it runs; made by :func:`cluster.records.tracking.tracked_run`.

    :meth:`log_metrics`, :meth:`try_flush` and :meth:`try_log_image` never fail because of the store. Every other method
    raises :class:`TrackingError` if it cannot be written.

    Args:
        client: the MLflow client, for what this class does not cover.
        run_id: MLflow's id of the run.
        uri: the tracking URI of its store.
        experiment_id: MLflow's id of the experiment; empty if the store was away when the run was opened.
        unsent: where metrics go that the store did not take.
        most_waiting_metrics: so many wait at most while the store is away.
    """

    def __init__(
        self,
        client: MlflowClient,
        run_id: str,
        *,
        uri: str,
        experiment_id: str,
        unsent: UnsentMetrics,
        most_waiting_metrics: int,
    ) -> None:
        self.client = client
        self.run_id = run_id
        self.uri = uri
        self.experiment_id = experiment_id
        self._unsent = unsent
        self._outbox = Outbox(self._send_metrics, most_metrics=most_waiting_metrics)
        self._other_losses: list[str] = []
        self._told: dict[str, str] = {}
        self._told_before: dict[str, str] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Note scalar metrics at ``step``; a thread sends them in batches, at the latest when the run ends.

        This never waits for the store. While it is away the newest metrics are kept; what was dropped is stated in the
        run's tag ``lipflow.metrics_dropped`` once it is back.
        """
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._outbox.add([Metric(name, float(value), now_ms, step) for name, value in metrics.items()])

    def try_log_image(self, image: np.ndarray | Image, name: str) -> None:
        """Like :meth:`log_image`, but sent by the thread that sends metrics: a store that is away costs a warning.

        Up to 16 pictures wait; those that were dropped are named in the run's tag ``lipflow.pictures_dropped``.
        """
        kept = image.copy()
        self._outbox.add_parcel(Parcel(name, lambda: self.log_image(kept, name)))

    def try_flush(self) -> None:
        """Send the metrics that wait, for a checkpoint: what it covers is not computed again.

        This waits 5 s at most, and not at all where the store is known to be away. What could not be sent then is kept
        in a file (in less than a second for 100,000 metrics), so that a job that is killed does not lose it.
        """
        if not self._outbox.drain(0.0 if self._outbox.failure else FLUSH_WAIT_S):
            self._unsent.keep(self._outbox.waiting_metrics(), self._lost_metrics())
        else:
            self._unsent.forget()

    def flush(self, timeout_s: float = 60.0) -> None:
        """Send the metrics and pictures that wait.

        Raises:
            TrackingError: the store has not taken them within the time.
        """
        if not self._outbox.drain(timeout_s):
            reason = self._outbox.failure or f"no answer from {redact_text(self.uri)}"
            raise TrackingError(f"metrics were not taken within {timeout_s:.0f} s: {reason}")

    def close(self, timeout_s: float, *, take_back: bool = False) -> bool:
        """Send what waits; what the store does not take within the time goes into a file, which a warning names.

        Args:
            timeout_s: how long the store is waited for.
            take_back: also send what other processes of this job could not, such as workers.

        Returns:
            Whether the store has everything.
        """
        if take_back:
            metrics, self._other_losses = self._unsent.take_back()
            self._outbox.add(metrics)
        sent = self._outbox.drain(timeout_s) and self._try_tell_losses()
        self._outbox.close()
        if sent:
            self._unsent.forget()
            return True
        metrics, pictures = self._outbox.waiting_metrics(), self._outbox.waiting_parcels()
        kept_in = self._unsent.keep(metrics, self._lost_metrics())
        reason = self._outbox.failure or f"no answer from {redact_text(self.uri)} in {timeout_s:.0f} s"
        where = f"they are kept in {kept_in}" if kept_in else "they are lost"
        lost = f", and {len(pictures)} pictures are lost ({', '.join(pictures)})" if pictures else ""
        _logger.warning("run %s lacks %d metrics; %s%s: %s", self.run_id, len(metrics), where, lost, reason)
        return False

    def _send_metrics(self, metrics: Sequence[Metric]) -> None:
        with store_errors(self.uri):
            self.client.log_batch(self.run_id, metrics=metrics)
        self._tell_losses()

    def _lost_metrics(self) -> str:
        """What the run lacks for good, by this process and by those whose files were taken back."""
        dropped = self._outbox.dropped
        steps = f"{dropped.metrics} metrics of steps {dropped.first_step} to {dropped.last_step}"
        return "; ".join([*self._other_losses, *([steps] if dropped.metrics else [])])

    def _tell_losses(self) -> None:
        """State in the run what it lacks, beside what earlier processes stated."""
        losses = {LOST_METRICS_TAG: self._lost_metrics(), LOST_PICTURES_TAG: ", ".join(self._outbox.dropped.parcels)}
        if all(self._told.get(tag, "") == text for tag, text in losses.items()):
            return
        with store_errors(self.uri):
            if not self._told:
                self._told_before = dict(self.client.get_run(self.run_id).data.tags)
            for tag, text in losses.items():
                if text != self._told.get(tag, ""):
                    before = self._told_before.get(tag)
                    self.client.set_tag(self.run_id, tag, (f"{before}; {text}" if before else text)[:_LONGEST_TAG])
                    self._told[tag] = text

    def _try_tell_losses(self) -> bool:
        try:
            self._tell_losses()
        except TrackingError as error:
            _logger.warning("what run %s lacks is not stated in it: %s", self.run_id, error)
            return False
        return True

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run, without secrets."""
        with store_errors(self.uri):
            for key, value in tags.items():
                self.client.set_tag(self.run_id, key, redact_text(str(value)))

    def log_image(self, image: np.ndarray | Image, name: str) -> None:
        """Log a picture, ``(H, W, 3)`` uint8 or PIL, as the artifact ``name`` such as ``"pictures/hmc.png"``."""
        with store_errors(self.uri):
            self.client.log_image(self.run_id, image, artifact_file=name)

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Log rows with equal keys as a table ``name`` (``.json``); a table of that name grows by the rows.

        Read it back with :func:`cluster.records.tracking.load_table`.
        """
        if not rows:
            raise ValueError(f"table {name} has no rows")
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        with store_errors(self.uri):
            self.client.log_table(self.run_id, columns, artifact_file=name)

    def log_dict(self, content: Mapping[str, Any], name: str) -> None:
        """Log a mapping as a JSON artifact."""
        with store_errors(self.uri):
            self.client.log_dict(self.run_id, dict(content), name)

    def log_text(self, text: str, name: str) -> None:
        """Log a text as the artifact ``name``."""
        with store_errors(self.uri):
            self.client.log_text(self.run_id, text, name)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Log one local file, into ``folder`` of the run's artifacts."""
        with store_errors(self.uri):
            self.client.log_artifact(self.run_id, str(path), folder)

    def log_artifacts(self, directory: str | Path, folder: str | None = None) -> None:
        """Log all files of a local folder, into ``folder`` of the run's artifacts."""
        with store_errors(self.uri):
            self.client.log_artifacts(self.run_id, str(directory), folder)
