"""Corrupt files of a capture, as a job that met them tells of them: all in one error, and never an endless list."""

from __future__ import annotations

from functools import partial

from lipflow.errors import CaptureError
from pipeline.manifest import SkippedFile

MAX_LISTED_FAULTS = 100
"""After so many corrupt files a job stops to look for more, and its error lists no more."""


class CorruptFilesError(CaptureError):
    """Files of a capture that cannot be used.

    Args:
        capture_uri: the capture.
        files: each with its address and the reason.
        remedy: what to do.
        consequence: what became of them, to follow "cannot be used".

    Attributes:
        capture_uri: the capture.
        files: each with its address and the reason.
    """

    def __init__(
        self, capture_uri: str, files: tuple[SkippedFile, ...], remedy: str = "Fetch them again", consequence: str = ""
    ):
        self.capture_uri = capture_uri
        self.files = files
        self._remedy, self._consequence = remedy, consequence
        named = "; ".join(
            item.reason if item.path in item.reason else f"{item.path}: {item.reason}"
            for item in files[:MAX_LISTED_FAULTS]
        )
        more = f"; and {len(files) - MAX_LISTED_FAULTS} more" if len(files) > MAX_LISTED_FAULTS else ""
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        super().__init__(f"{capture_uri}: {count} cannot be used{consequence}: {named}{more}. {remedy}")

    def __reduce__(self) -> tuple:
        return partial(type(self), remedy=self._remedy, consequence=self._consequence), (self.capture_uri, self.files)


class FaultLimit:
    """Whether so many corrupt files were found that looking for more is not worth the time."""

    def __init__(self) -> None:
        self._found = 0

    def is_passed_by(self, more: int) -> bool:
        """Count ``more`` corrupt files; True once there are more than an error lists."""
        self._found += more
        return self._found > MAX_LISTED_FAULTS
