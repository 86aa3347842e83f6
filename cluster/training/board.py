"""What the submitter sees of a running training; an actor, in a module that is light to import."""

from __future__ import annotations


class ProgressBoard:
    """Where rank 0 notes its progress and the submitter's terminal reads it."""

    def __init__(self) -> None:
        self._step, self._note = 0, "starting workers"
        self._first_step: int | None = None

    def update(self, step: int, note: str) -> None:
        """Note the number of steps done."""
        self._step, self._note = step, note

    def started(self, step: int) -> None:
        """Note the step at which the workers of this submission first started."""
        if self._first_step is None:
            self._first_step = step
        self._step, self._note = step, "training"

    def read(self) -> tuple[int, str, int | None]:
        """(steps done, note, first step of this submission)."""
        return self._step, self._note, self._first_step
