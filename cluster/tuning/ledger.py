"""The ledger of a sweep: one small JSON file a trial, from which a sweep that was killed goes on.

Ray Tune keeps the state of an experiment as pickles, drops what ASHA has seen when it restores them, and loses what
happened since the last snapshot. So its state is thrown away, and this is kept: what each trial was given, what it
reported and how it ended, written by the submitter alone, whole files at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from cluster.train import SUMMARY_FILE
from cluster.tuning.space import Value
from lipflow.errors import LipflowError
from pipeline import storage

TRIALS_FOLDER = "trials"
RECORD_FILE = "trial.json"

State = Literal["running", "completed", "stopped", "failed", "lost"]
FINAL: tuple[State, ...] = ("completed", "stopped", "failed")
"""States in which a trial is not run again."""

MOST_LOSSES = 2
"""Submissions in which a trial may be lost before it counts as failed, so that one that kills its machine ends."""


class SweepError(LipflowError):
    """A sweep that has no result."""


@dataclass(frozen=True)
class TrialRecord:
    """What is known of a trial.

    Attributes:
        number: from 0, which is the base recipe, in the order of proposal.
        values: its searched settings.
        state: ``running``; ``completed`` on its whole budget; ``stopped`` by ASHA; ``failed`` by an error that would
            come again; ``lost`` with its processes or by an error that may not.
        reports: (step, validation loss), in ascending order.
        loss: validation loss of its best checkpoint; None unless it was completed.
        error: why it failed or was lost.
        losses: submissions in which it was lost.
    """

    number: int
    values: dict[str, Value]
    state: State = "running"
    reports: tuple[tuple[int, float], ...] = ()
    loss: float | None = None
    error: str | None = None
    losses: int = 0

    def loss_at(self, step: int) -> float | None:
        """The validation loss that it reported at a step."""
        return dict(self.reports).get(step)

    @property
    def last_step(self) -> int:
        """The last step it reported; 0 before the first."""
        return self.reports[-1][0] if self.reports else 0


@dataclass
class Ledger:
    """The records of a sweep, in memory and in ``OUT/trials``.

    Attributes:
        out_uri: the sweep's folder.
        records: number to record.
    """

    out_uri: str
    records: dict[int, TrialRecord] = field(default_factory=dict)

    @classmethod
    def load(cls, out_uri: str) -> Ledger:
        """What an earlier submission left; a trial whose training has ended since its last record is completed."""
        ledger = cls(out_uri)
        number = 0
        while storage.exists(uri := storage.join(ledger.folder(number), RECORD_FILE)):
            found = json.loads(storage.read_text(uri))
            found["reports"] = tuple((step, loss) for step, loss in found["reports"])
            record = TrialRecord(**found)
            ledger.records[number] = record
            if record.state not in FINAL and ledger.summary(number) is not None:
                ledger.settle(number)
            number += 1
        return ledger

    def folder(self, number: int) -> str:
        """Where the trial is trained."""
        return storage.join(self.out_uri, TRIALS_FOLDER, f"{number:04d}")

    def summary(self, number: int) -> dict[str, Any] | None:
        """The summary that the trial's training wrote last; None if it has not ended."""
        uri = storage.join(self.folder(number), SUMMARY_FILE)
        return json.loads(storage.read_text(uri)) if storage.exists(uri) else None

    def add(self, number: int, values: Mapping[str, Value]) -> TrialRecord:
        """A new trial, before it starts."""
        return self._write(TrialRecord(number, dict(values)))

    def restart(self, number: int) -> TrialRecord:
        """A trial that was running or lost runs again."""
        return self._write(replace(self.records[number], state="running", error=None))

    def report(self, number: int, step: int, loss: float, *, stopped: bool) -> TrialRecord:
        """Note a validation loss at a step after the last one, and whether ASHA ended the trial there."""
        record = self.records[number]
        state: State = "stopped" if stopped else record.state
        return self._write(replace(record, reports=(*record.reports, (step, loss)), state=state))

    def settle(self, number: int) -> TrialRecord:
        """The trial's processes have ended by themselves: it is completed if its training says so, else lost."""
        summary = self.summary(number)
        if summary is None:
            return self.lose(number, "its training ended without a summary")
        return self._write(replace(self.records[number], state="completed", loss=summary["validation_loss"]))

    def fail(self, number: int, error: str) -> TrialRecord:
        """The trial raised an error that would come again."""
        return self._write(replace(self.records[number], state="failed", error=error))

    def lose(self, number: int, error: str) -> TrialRecord:
        """The trial was lost; it is run again by the next submission, or has failed if it was lost too often."""
        record = self.records[number]
        losses = record.losses + 1
        state: State = "failed" if losses >= MOST_LOSSES else "lost"
        return self._write(replace(record, state=state, error=error, losses=losses))

    def in_state(self, *states: State) -> list[TrialRecord]:
        """Records in these states, by number."""
        return [record for record in self.all() if record.state in states]

    def all(self) -> list[TrialRecord]:
        """All records, by number."""
        return [record for _, record in sorted(self.records.items())]

    def best(self) -> TrialRecord | None:
        """The completed trial of the lowest loss; of equal ones the first."""
        ranked = [
            (record.loss, record.number)
            for record in self.in_state("completed")
            if record.loss is not None and math.isfinite(record.loss)
        ]
        return self.records[min(ranked)[1]] if ranked else None

    def winner(self) -> TrialRecord:
        """The best trial of a sweep in which nothing is left to be run.

        Raises:
            SweepError: some trials were lost, or none was completed.
        """
        lost, failed = self.in_state("lost"), self.in_state("failed")
        if lost:
            raise SweepError(
                f"{len(lost)} of {len(self.records)} trials were lost; the first, trial {lost[0].number}: "
                f"{lost[0].error}; run the same command again to continue them"
            )
        best = self.best()
        if best is None:
            first = f"; the first, trial {failed[0].number}: {failed[0].error}" if failed else ""
            raise SweepError(
                "no trial got to the end of its budget with a finite loss, and "
                f"{len(failed)} of {len(self.records)} failed{first}; correct the base recipe or the space, and give "
                "another OUT"
            )
        return best

    def _write(self, record: TrialRecord) -> TrialRecord:
        text = json.dumps(asdict(record), indent=2)
        storage.write_bytes(storage.join(self.folder(record.number), RECORD_FILE), text.encode())
        self.records[record.number] = record
        return record
