"""Metrics that a tracking store did not take, as files of JSON lines beside what the job has made."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lipflow.errors import LipflowError
from pipeline import storage

if TYPE_CHECKING:
    from mlflow.entities import Metric

UNSENT_FOLDER = "unsent-metrics"

_FIELDS = ("key", "value", "timestamp", "step")

_logger = logging.getLogger(__name__)


class UnsentMetrics:
    """The files of one run in ``unsent-metrics/``, of which this process writes one.

    A line is ``{"key": ..., "value": ..., "timestamp": ..., "step": ...}``, as MLflow's own log has them; a line
    ``{"lost": ...}`` says what did not even fit into memory.

    Args:
        folder: path or URI of the folder in which ``unsent-metrics`` lies, or will if it is needed.
        run_id: MLflow's id of the run.
    """

    def __init__(self, folder: str, run_id: str) -> None:
        self._folder = storage.join(storage.normalize_uri(folder), UNSENT_FOLDER)
        self._run_id = run_id
        self._own = storage.join(self._folder, f"{run_id}-{uuid.uuid4().hex[:8]}.jsonl")
        self._written: list[str] = []

    def keep(self, metrics: Sequence[Metric], lost: str) -> str | None:
        """Write what waits to this process's file; returns its URI, or None if there is nothing or it failed."""
        lines = [json.dumps({"lost": lost})] if lost else []
        lines += [json.dumps({key: getattr(metric, key) for key in _FIELDS}) for metric in metrics]
        if not lines:
            self._remove(self._own)
            return None
        try:
            storage.write_bytes(self._own, "".join(f"{line}\n" for line in lines).encode())
        except LipflowError as error:
            _logger.warning("metrics that wait for the tracking store could not be written to a file: %s", error)
            return None
        if self._own not in self._written:
            self._written.append(self._own)
        return self._own

    def take_back(self) -> tuple[list[Metric], list[str]]:
        """(metrics, losses) in the run's files of other processes; they are removed by :meth:`forget`."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        losses: list[str] = []
        for uri in self._files_of_others():
            try:
                lines = [json.loads(line) for line in storage.read_text(uri).splitlines()]
                metrics += [Metric(**line) for line in lines if "lost" not in line]
            except (LipflowError, ValueError, TypeError) as error:
                _logger.warning("%s is not sent: %s", uri, error)
                continue
            losses += [line["lost"] for line in lines if "lost" in line]
            self._written.append(uri)
        return metrics, losses

    def forget(self) -> None:
        """Remove the files whose metrics the store has by now."""
        for uri in list(self._written):
            self._remove(uri)

    def _remove(self, uri: str) -> None:
        if uri in self._written:
            self._written.remove(uri)
            try:
                storage.delete(uri)
            except LipflowError as error:
                _logger.warning("%s was sent and can be removed: %s", uri, error)

    def _files_of_others(self) -> list[str]:
        try:
            names = storage.listdir(self._folder)
        except LipflowError:
            return []
        mine = [name for name in names if name.startswith(f"{self._run_id}-") and name.endswith(".jsonl")]
        return [uri for uri in (storage.join(self._folder, name) for name in sorted(mine)) if uri not in self._written]
