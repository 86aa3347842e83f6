"""A shard from its first byte to its last: its members by the tar's own headers, and its digest."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from lipflow.errors import ShardSetError
from pipeline import storage

_CHUNK_BYTES = 16 * 2**20


class ShardMemberError(ShardSetError):
    """A member that is not what, or not where, the manifest says."""


class DigestedShard:
    """A shard from its first byte to its last, in large ranges that are retried; every byte is digested.

    Args:
        uri: of the shard.

    Attributes:
        size_bytes: of the shard.
        digest: of what was fetched; of the whole shard once its end was reached.
        position: of the next byte to read.
    """

    def __init__(self, uri: str):
        self._uri = uri
        self.size_bytes = storage.size_bytes(uri)
        self.digest = hashlib.sha256()
        self.position = 0
        self._buffer, self._buffer_start = b"", 0

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes; fewer at the end."""
        pieces = []
        while count > 0 and self.position < self.size_bytes:
            self._fetch()
            start = self.position - self._buffer_start
            piece = self._buffer[start : start + count]
            pieces.append(piece)
            count -= len(piece)
            self.position += len(piece)
        return b"".join(pieces)

    def skip_to(self, position: int) -> None:
        """Go on to ``position``, or to the end if that comes first; what lies between is digested."""
        position = min(position, self.size_bytes)
        while self.position < position:
            self._fetch()
            self.position = min(position, self._buffer_start + len(self._buffer))

    def _fetch(self) -> None:
        """Fetch the next range once the last one was used up."""
        if self.position == self._buffer_start + len(self._buffer):
            length = min(_CHUNK_BYTES, self.size_bytes - self.position)
            self._buffer, self._buffer_start = storage.read_range(self._uri, self.position, length), self.position
            self.digest.update(self._buffer)


@dataclass(frozen=True)
class PlainMember:
    """A member by its own header, and where its bytes lie in the shard."""

    name: str
    offset: int
    size_bytes: int


def plain_members(stream: DigestedShard, shard_uri: str) -> Iterator[PlainMember]:
    """The members up to the end of the tar, or of the shard.

    One header at a time, and plain files alone: links, sparse files and extended headers, which shards never have,
    can make a tar reader seek or allocate what they declare.

    Raises:
        ShardMemberError: a header that is none, or not of a plain file. What lies behind it cannot be told.
    """
    while True:
        header = stream.read(tarfile.BLOCKSIZE)
        if len(header) < tarfile.BLOCKSIZE or header == bytes(tarfile.BLOCKSIZE):
            return
        offset = stream.position
        try:
            entry = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise ShardMemberError(f"{shard_uri}: no tar header before byte {offset} ({error}); shard again") from error
        padded = -(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not 0 <= entry.size <= stream.size_bytes - offset:
            raise ShardMemberError(
                f"{shard_uri}: {entry.name!r} at byte {offset} is not a plain file of at most the shard's size "
                f"(type {entry.type!r}, {entry.size} bytes); shard again"
            )
        yield PlainMember(entry.name, offset, entry.size)
        stream.skip_to(offset + padded)


__all__ = ["DigestedShard", "PlainMember", "ShardMemberError", "plain_members"]
