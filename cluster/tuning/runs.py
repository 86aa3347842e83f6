"""The sweep's trials as MLflow runs below the sweep's own."""

from __future__ import annotations

import json
import logging

from cluster.records.run import Run, TrackingError, store_errors
from cluster.train import RUN_FILE
from cluster.tuning.ledger import Ledger, TrialRecord
from pipeline import storage

TRIAL_TAG = "lipflow.trial"
STATE_TAG = "lipflow.trial_state"
STOPPED_TAG = "lipflow.stopped_by"

_logger = logging.getLogger(__name__)


class TrialRuns:
    """Names the trials' runs, notes how they ended, and ends those whose processes were ended from outside.

    A store that fails for a while costs a warning, not the sweep: :meth:`close` notes everything again.

    Args:
        run: the sweep's.
        ledger: of the sweep.
    """

    def __init__(self, run: Run, ledger: Ledger) -> None:
        self._run = run
        self._ledger = ledger
        self._noted: dict[int, str] = {}

    def reported(self, record: TrialRecord) -> None:
        """A trial has a new report, was stopped or has ended."""
        if record.loss is not None:
            self._run.log_metrics({"trials/val_loss": record.loss}, record.number)
        try:
            self._note(record)
        except TrackingError as error:
            _logger.warning("trial %d was not noted: %s", record.number, error)

    def close(self, why: str) -> None:
        """Note all trials' ends, and end whatever still counts as running below the sweep's run.

        Args:
            why: their state, such as ``interrupted``; a trial that goes on later gets another.

        Raises:
            TrackingError: the store cannot be written.
        """
        for record in self._ledger.all():
            self._note(record)
        client = self._run.client
        with store_errors(self._run.uri):
            still = client.search_runs(
                [self._run.experiment_id],
                filter_string=f"tags.`mlflow.parentRunId` = '{self._run.run_id}' and attributes.status = 'RUNNING'",
                max_results=1000,
            )
            for run in still:
                client.set_tag(run.info.run_id, STATE_TAG, why)
                client.set_terminated(run.info.run_id, status="KILLED")

    def _note(self, record: TrialRecord) -> None:
        run_id = self._run_of(record.number) if self._noted.get(record.number) != record.state else None
        if run_id is None:
            return
        tags = {TRIAL_TAG: str(record.number), STATE_TAG: record.state, "mlflow.runName": f"trial-{record.number:04d}"}
        if record.state == "stopped":
            tags[STOPPED_TAG] = f"ASHA at step {record.last_step}"
        client = self._run.client
        with store_errors(self._run.uri):
            for key, value in tags.items():
                client.set_tag(run_id, key, value)
            if record.state in ("stopped", "failed"):
                client.set_terminated(run_id, status="KILLED" if record.state == "stopped" else "FAILED")
        self._noted[record.number] = record.state

    def _run_of(self, number: int) -> str | None:
        uri = storage.join(self._ledger.folder(number), RUN_FILE)
        return json.loads(storage.read_text(uri))["run_id"] if storage.exists(uri) else None
