"""What a verification found: bad files by path, fault and reason, and counts; nothing else is kept of a file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lipflow.errors import CaptureError, LipflowError, ShardSetError, StorageError
from pipeline import storage
from pipeline.capture import Asset
from pipeline.capture_errors import fault_name
from pipeline.images.codecs import CodecError
from pipeline.storage.s3 import is_transient

_ADDRESS_AND_REASON = re.compile(r"(?P<path>\S.*?)(?::\d+)?: (?P<reason>.*)", re.DOTALL)


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be used.

    Attributes:
        path: its address; of a member of an archive, ``ARCHIVE!MEMBER``.
        fault: the name of what is wrong, such as ``"vertex-count"``.
        reason: what was found, what was expected and the remedy.
    """

    path: str
    fault: str
    reason: str


@dataclass(frozen=True)
class VerifyPart:
    """What one task found.

    Attributes:
        files_checked: files that were decoded, good or bad.
        bad: in the order in which they were found.
        segment: of the task.
        missing_views: dome camera id to listed frames without its image; cameras that lack nothing are left out.
        missing_headset_views: the same of the paired headset cameras.
    """

    files_checked: int = 0
    bad: tuple[BadFile, ...] = ()
    segment: str = ""
    missing_views: Mapping[str, int] = field(default_factory=dict)
    missing_headset_views: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class VerifyReport:
    """What is wrong with a capture or a shard set.

    Attributes:
        uri: where it lies.
        layout: the name of its layout.
        files_checked: files that were decoded, good or bad.
        bad: sorted by path.
        missing_views: dome camera id to the number of frames without its image; cameras that lack nothing are left
            out, here and below.
        missing_views_by_segment: segment to the number of missing views of all dome cameras.
        missing_headset_views: headset camera id to the number of frames without its image.
        complete: False where a bad file (one of ``bad``) keeps the frames from being checked.
    """

    uri: str
    layout: str
    files_checked: int
    bad: tuple[BadFile, ...]
    missing_views: Mapping[str, int]
    missing_views_by_segment: Mapping[str, int]
    missing_headset_views: Mapping[str, int]
    complete: bool

    @property
    def good(self) -> bool:
        """Whether everything was checked and nothing is bad."""
        return self.complete and not self.bad


def report_of(uri: str, layout: str, parts: Iterable[VerifyPart], *, complete: bool) -> VerifyReport:
    """The parts put together; a fault that several tasks met is listed once."""
    files, bad = 0, {}
    views: Counter[str] = Counter()
    by_segment: Counter[str] = Counter()
    headset: Counter[str] = Counter()
    for part in parts:
        files += part.files_checked
        bad.update({(item.path, item.fault): item for item in part.bad})
        views.update(part.missing_views)
        headset.update(part.missing_headset_views)
        if part.missing_views:
            by_segment[part.segment] += sum(part.missing_views.values())
    return VerifyReport(
        uri=uri,
        layout=layout,
        files_checked=files,
        bad=tuple(bad[key] for key in sorted(bad)),
        missing_views=dict(sorted(views.items())),
        missing_views_by_segment=dict(sorted(by_segment.items())),
        missing_headset_views=dict(sorted(headset.items())),
        complete=complete,
    )


class FaultList:
    """The bad files that a task found.

    Args:
        uri: of the capture or shard set, under which the addresses of its files lie.

    Attributes:
        bad: what was found so far.
    """

    def __init__(self, uri: str):
        self.bad: list[BadFile] = []
        self._uri = uri

    def add(self, error: LipflowError, source: str) -> None:
        """Keep a fault of the file at ``source``; an error that is not about a file is raised."""
        if not is_file_fault(error):
            raise error
        self.bad.append(bad_file(error, source, self._uri))

    def check(self, assets: Iterator[Asset], origin: str) -> int:
        """Check each asset and return their number; a fault in listing them is ``origin``'s."""
        checked = 0
        try:
            for asset in assets:
                checked += 1
                try:
                    asset.check()
                except LipflowError as error:
                    self.add(error, asset.source)
        except LipflowError as error:
            self.add(error, origin)
        return checked


def is_file_fault(error: LipflowError) -> bool:
    """Whether an error is about one file, and not about storage as a whole (credentials, a server that is down)."""
    if isinstance(error, storage.ObjectNotFoundError) or is_content_fault(error):
        return True
    cause = error.__cause__
    return isinstance(error, StorageError) and isinstance(cause, OSError) and not is_transient(cause)


def is_content_fault(error: LipflowError) -> bool:
    """Whether an error is about what stands in a file."""
    return isinstance(error, CaptureError | CodecError | ShardSetError) or isinstance(error.__cause__, UnicodeError)


def bad_file(error: LipflowError, source: str, uri: str) -> BadFile:
    """The fault as it is reported: of the file under ``uri`` that its message begins with, or else of ``source``."""
    message = " ".join(str(error).split())
    match = _ADDRESS_AND_REASON.fullmatch(message)
    if match is None or not (match["path"] == uri or match["path"].startswith(f"{uri}/")):
        return BadFile(source, fault_name(error), message.removeprefix(f"{source}: "))
    return BadFile(source if match["path"] == uri else match["path"], fault_name(error), match["reason"])


__all__ = [
    "BadFile",
    "FaultList",
    "VerifyPart",
    "VerifyReport",
    "bad_file",
    "is_content_fault",
    "is_file_fault",
    "report_of",
]
