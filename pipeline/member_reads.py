"""Chosen members of a shard by range requests, where the whole shard is not worth fetching.

A shard's digest cannot be checked this way. What is checked is the tar header in front of each member: its own
checksum, and that it names the member and the size that the manifest has at that place.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable

from lipflow.errors import ShardSetError
from pipeline import storage
from pipeline.frames import MemberReader
from pipeline.manifest import SampleRecord

_HEADER_BYTES = 512
_WORTH_A_REQUEST_BYTES = 64 * 2**10
"""Members that lie no further apart are fetched by one request: about what a request's latency is worth."""


def fetch_members(shard_uri: str, sample: SampleRecord, suffixes: Iterable[str]) -> MemberReader:
    """Fetch those of the members that the sample has, neighbours by one request; returns a reader of just them.

    Raises:
        ShardSetError: the shard is absent, ends early, or holds something else in these places.
        StorageError: it cannot be read.
    """
    places = {sample.members[suffix]: suffix for suffix in suffixes if suffix in sample.members}
    bodies: dict[tuple[int, int], bytes] = {}
    for group in _neighbours(sorted(places)):
        start = group[0][0] - _HEADER_BYTES
        end = group[-1][0] + group[-1][1]
        try:
            span = storage.read_range(shard_uri, start, end - start)
        except storage.ObjectNotFoundError as error:
            raise ShardSetError(f"{error}; the manifest lists it, shard the capture again") from error
        for offset, size in group:
            name = f"{sample.frame_id}.{places[offset, size]}"
            _check_header(span[offset - start - _HEADER_BYTES : offset - start], name, size, shard_uri)
            bodies[offset, size] = span[offset - start : offset - start + size]
    return lambda offset, size: bodies[offset, size]


def _neighbours(places: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Sorted (offset, size) in groups that are fetched together."""
    groups: list[list[tuple[int, int]]] = []
    end = -_WORTH_A_REQUEST_BYTES
    for offset, size in places:
        if groups and offset - _HEADER_BYTES - end <= _WORTH_A_REQUEST_BYTES:
            groups[-1].append((offset, size))
        else:
            groups.append([(offset, size)])
        end = offset + size
    return groups


def _check_header(header: bytes, name: str, size: int, shard_uri: str) -> None:
    try:
        entry = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise ShardSetError(f"{shard_uri}: no tar header in front of {name} ({error}); shard again") from error
    if entry.name != name or entry.size != size:
        raise ShardSetError(
            f"{shard_uri}: {entry.name} of {entry.size} bytes where the manifest has {name} of {size}; shard again"
        )
