"""Chosen members of a shard by range requests, where the whole shard is not worth fetching.

A shard's digest cannot be checked this way. What is checked is the CRC-32 that the manifest has of each member, and
the tar header in front of it: its own checksum, and that it names the member and the size.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterable

import numpy as np

from lipflow.errors import ShardSetError
from pipeline import storage
from pipeline.loading.frames import MemberReader, average_texture_member, decode_mesh_and_texture
from pipeline.manifest import Place, SampleRecord
from pipeline.sealing import ChecksumError
from pipeline.sharding.samples import VERTICES

_HEADER_BYTES = 512
_WORTH_A_REQUEST_BYTES = 64 * 2**10
"""Members that lie no further apart are fetched by one request: about what a request's latency is worth."""


def fetch_members(shard_uri: str, sample: SampleRecord, suffixes: Iterable[str]) -> MemberReader:
    """Fetch those of the members that the sample has, neighbours by one request; returns a reader of just them.

    Raises:
        ChecksumError: the bytes of a member are not those that were written.
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
        for offset, size, crc32 in group:
            name = f"{sample.frame_id}.{places[offset, size, crc32]}"
            _check_header(span[offset - start - _HEADER_BYTES : offset - start], name, size, shard_uri)
            bodies[offset, size] = span[offset - start : offset - start + size]
            check_crc32(bodies[offset, size], crc32, f"{shard_uri}!{name}")
    return lambda offset, size: bodies[offset, size]


def read_mesh_and_texture(shard_uri: str, sample: SampleRecord) -> tuple[np.ndarray, np.ndarray]:
    """Texture ``(3, T, T)`` uint8, row 0 is v = 0, and vertices ``(V, 3)`` of a frame of a shard.

    Raises:
        ShardSetError: as :func:`fetch_members`.
        StorageError: the shard cannot be read.
    """
    suffixes = (VERTICES, average_texture_member(sample))
    return decode_mesh_and_texture(sample, fetch_members(shard_uri, sample, suffixes))


def check_crc32(body: bytes, expected: int, source: str) -> None:
    """Compare a member's bytes with the CRC-32 in the manifest; measured at 0.3 ms/MB.

    Raises:
        ChecksumError: they differ.
    """
    actual = zlib.crc32(body)
    if actual != expected:
        raise ChecksumError(
            f"{source}: CRC-32 {actual:08x}, but the manifest says {expected:08x}; fetch the shard or shard again"
        )


def _neighbours(places: list[Place]) -> list[list[Place]]:
    """Sorted places in groups that are fetched together."""
    groups: list[list[Place]] = []
    end = -_WORTH_A_REQUEST_BYTES
    for offset, size, crc32 in places:
        if groups and offset - _HEADER_BYTES - end <= _WORTH_A_REQUEST_BYTES:
            groups[-1].append((offset, size, crc32))
        else:
            groups.append([(offset, size, crc32)])
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
