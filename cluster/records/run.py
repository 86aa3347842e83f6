"""One MLflow run, as a job sees it: metrics are buffered, everything else is written at once."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.records.redaction import redact_text
from lipflow.errors import LipflowError

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient
    from PIL.Image import Image

METRICS_PER_REQUEST = 1000
FLUSH_AFTER_METRICS = 500
FLUSH_AFTER_S = 5.0

_logger = logging.getLogger(__name__)


class TrackingError(LipflowError):
    """A tracking store that cannot be reached or used, or a run that it does not hold."""


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

    Every method but :meth:`log_metrics` raises :class:`TrackingError` if the store cannot be written.

    Attributes:
        run_id: MLflow's id of the run.
        uri: the tracking URI of its store.
        experiment_id: MLflow's id of the experiment.
        client: the MLflow client, for what this class does not cover.
    """

    def __init__(self, client: MlflowClient, run_id: str, *, uri: str, experiment_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self.uri = uri
        self.experiment_id = experiment_id
        self._buffer: list[Metric] = []
        self._last_flush_s = time.monotonic()

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Note scalar metrics at ``step``; they are sent in batches, at the latest when the run ends.

        A store that fails for a while costs a warning, not the job: what could not be sent is kept and sent
        with the next batch.
        """
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._buffer += [Metric(name, float(value), now_ms, step) for name, value in metrics.items()]
        idle_s = time.monotonic() - self._last_flush_s
        if len(self._buffer) >= FLUSH_AFTER_METRICS or idle_s >= FLUSH_AFTER_S:
            self.try_flush()

    def try_flush(self) -> None:
        """Send the metrics that wait; a store that fails costs a warning."""
        try:
            self.flush()
        except TrackingError as error:
            _logger.warning("%d metrics wait to be sent: %s", len(self._buffer), error)

    def flush(self) -> None:
        """Send the metrics that wait."""
        self._last_flush_s = time.monotonic()
        while self._buffer:
            batch = self._buffer[:METRICS_PER_REQUEST]
            with store_errors(self.uri):
                self.client.log_batch(self.run_id, metrics=batch)
            del self._buffer[: len(batch)]

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
