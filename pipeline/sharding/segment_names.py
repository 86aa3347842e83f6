"""What segments and captures are called in a shard set.

A set of one capture keeps the capture's own segment names. In a set of several, a segment is ``SEGMENT@CAPTURE``: the
capture comes last, so that patterns and published lists of prefixes fit the segment in every capture.
"""

from __future__ import annotations

import re

SEPARATOR = "@"
CAPTURE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_+.-]*")
"""Safe as a part of a tar member's folder, and free of the signs of patterns, of ``=`` and of the separator."""


def stored_segment(segment: str, capture_name: str | None) -> str:
    """A capture's segment as the set calls it; None is the name of an only capture."""
    return segment if capture_name is None else f"{segment}{SEPARATOR}{capture_name}"


def captured_segment(stored: str) -> str:
    """The segment's own name, of its name in a set of several captures."""
    return stored.rpartition(SEPARATOR)[0]


def capture_name_of(stored: str) -> str:
    """The capture's name, of a segment's or frame's name in a set of several captures."""
    return stored.partition("/")[0].rpartition(SEPARATOR)[2]
