"""Zips read in place, on disk and on S3: never unpacked, and one range request a member.

The central directory is read once in a process, by the standard library, and kept as a compact index: about 65 bytes
a member, so that the hundred zips of a capture of 10,000 frames take tens of megabytes. Whatever a zip declares is
bounded before anything of that size is allocated.
"""

from __future__ import annotations

import bisect
import io
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline import storage
from pipeline.capture_errors import ArchiveBombError, DamagedArchiveError

MAX_DIRECTORY_BYTES = 16 * 2**20
"""Of a central directory; 10,000 members of a capture take 0.7 MB."""
MAX_MEMBERS = 200_000
MAX_MEMBER_BYTES = 128 * 2**20
"""Of a member, unpacked; an uncompressed image of the largest dome camera takes 33 MB."""
MAX_RATIO = 200
"""Unpacked over packed bytes of a deflated member of more than ``RATIO_FREE_BYTES``."""
RATIO_FREE_BYTES = 2**20
MAX_CACHED_BYTES = 256 * 2**20
"""Of all indices that a process keeps."""

_TAIL_BYTES = 2**20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LOCAL_SIGNATURE = b"PK\3\4"
# Writers put 0 to 36 bytes of extra fields (zip64 sizes, times, owners) into a local header.
_EXTRA_SLACK_BYTES = 64
_ENCRYPTED = 0x1
_DIRECTORY_ERRORS = (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError, IndexError)


@dataclass(frozen=True, eq=False)
class _ZipIndex:
    """What the central directory says, by members sorted by name.

    Attributes:
        names: all names in UTF-8, one after the other.
        name_ends: ``(N,)`` uint32, where each name ends in ``names``.
        offsets: ``(N,)`` int64 of the local headers.
        ends: ``(N,)`` int64, where the next local header or the central directory begins.
        packed_bytes: ``(N,)`` int64.
        unpacked_bytes: ``(N,)`` int64.
        checksums: ``(N,)`` uint32 CRC-32.
        methods: ``(N,)`` uint16 compression methods.
        encrypted: ``(N,)`` bool.
    """

    names: bytes
    name_ends: np.ndarray
    offsets: np.ndarray
    ends: np.ndarray
    packed_bytes: np.ndarray
    unpacked_bytes: np.ndarray
    checksums: np.ndarray
    methods: np.ndarray
    encrypted: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        arrays = (self.name_ends, self.offsets, self.ends, self.packed_bytes, self.unpacked_bytes, self.checksums)
        return len(self.names) + sum(array.nbytes for array in (*arrays, self.methods, self.encrypted))

    def name(self, row: int) -> bytes:
        return self.names[self.name_ends[row - 1] if row else 0 : self.name_ends[row]]

    def find(self, name: str) -> int | None:
        """The row of a name."""
        wanted = _encoded(name)
        row = bisect.bisect_left(range(len(self)), wanted, key=self.name)
        return row if row < len(self) and self.name(row) == wanted else None


class ZipArchive:
    """A zip at a path, ``file://`` or ``s3://`` URI, read member by member.

    Args:
        uri: of the zip.

    Raises:
        ObjectNotFoundError: it is not there.
        DamagedArchiveError: it is no zip, or its central directory cannot be used.
        ArchiveBombError: it declares more, or overlapping, members than any real archive has.
    """

    def __init__(self, uri: str):
        self.uri = storage.normalize_uri(uri)
        self._index = _cached_index(self.uri, storage.size_bytes(self.uri))

    def __reduce__(self) -> tuple[type[ZipArchive], tuple[str]]:
        # Another process has its own index, which its captures share.
        return ZipArchive, (self.uri,)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: str) -> bool:
        return self._index.find(name) is not None

    def names(self) -> Iterator[str]:
        """The members' names, sorted by their bytes."""
        return (self._index.name(row).decode("utf-8", "surrogatepass") for row in range(len(self)))

    def source(self, name: str) -> str:
        """The address of a member, for messages: ``ARCHIVE!MEMBER``."""
        return f"{self.uri}!{name}"

    def read(self, name: str) -> bytes:
        """The bytes of a member, by one range request, checked against its CRC-32.

        Raises:
            KeyError: there is no such member.
            DamagedArchiveError: its bytes are not those that were stored, or cannot be unpacked.
            ArchiveBombError: it would unpack to more than any real file.
            StorageError: the zip cannot be read.
        """
        row = self._index.find(name)
        if row is None:
            raise KeyError(name)
        self._check_declared(row, name)
        packed = self._packed(row, name)
        index, source = self._index, self.source(name)
        body = packed if index.methods[row] == zipfile.ZIP_STORED else _inflated(packed, self._size(row), source)
        if zlib.crc32(body) != index.checksums[row]:
            raise DamagedArchiveError(f"{source}: its CRC-32 differs from the archive's; fetch the archive again")
        return body

    def _size(self, row: int) -> int:
        return int(self._index.unpacked_bytes[row])

    def _check_declared(self, row: int, name: str) -> None:
        index, source = self._index, self.source(name)
        packed, unpacked, method = int(index.packed_bytes[row]), self._size(row), int(index.methods[row])
        if index.encrypted[row]:
            raise DamagedArchiveError(f"{source}: the member is encrypted; store it without a password")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DamagedArchiveError(
                f"{source}: compression method {method}; expected 0 (stored) or 8 (deflated): pack the archive again"
            )
        if max(packed, unpacked) > MAX_MEMBER_BYTES:
            raise ArchiveBombError(
                f"{source}: declares {max(packed, unpacked)} bytes, at most {MAX_MEMBER_BYTES} are read; "
                "fetch the archive again from a source that you trust"
            )
        if unpacked > RATIO_FREE_BYTES and unpacked > MAX_RATIO * packed:
            raise ArchiveBombError(
                f"{source}: {packed} bytes would unpack to {unpacked}, more than {MAX_RATIO} times as many; "
                "fetch the archive again from a source that you trust"
            )
        if method == zipfile.ZIP_STORED and packed != unpacked:
            raise DamagedArchiveError(
                f"{source}: stored, but its sizes differ ({packed} and {unpacked} bytes); fetch the archive again"
            )

    def _packed(self, row: int, name: str) -> bytes:
        """The member's bytes as they lie in the archive."""
        index, source = self._index, self.source(name)
        offset, packed = int(index.offsets[row]), int(index.packed_bytes[row])
        room = int(index.ends[row]) - offset
        misplaced = DamagedArchiveError(
            f"{source}: lies outside of its archive, or in another member; fetch the archive again"
        )
        if offset < 0 or room < _LOCAL_HEADER.size + packed:
            raise misplaced
        wanted = _LOCAL_HEADER.size + len(index.name(row)) + _EXTRA_SLACK_BYTES + packed
        body = storage.read_range(self.uri, offset, min(wanted, room))
        if not body.startswith(_LOCAL_SIGNATURE):
            raise DamagedArchiveError(f"{source}: no local header at byte {offset}; fetch the archive again")
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(body)[-2:]
        start = _LOCAL_HEADER.size + name_bytes + extra_bytes
        if start + packed > room:
            raise misplaced
        if start + packed > len(body):
            return storage.read_range(self.uri, offset + start, packed)
        return body[start : start + packed]


class _RangeFile:
    """As much of a read-only binary file as the standard library needs to read a central directory.

    The end of the file is fetched at once, since most directories fit into it.
    """

    def __init__(self, uri: str, size: int):
        self._uri, self._size, self._position = uri, size, 0
        self._tail_start = max(0, size - _TAIL_BYTES)
        self._tail = storage.read_range(uri, self._tail_start, size - self._tail_start)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if position < 0:
            raise OSError("a position before the start of the file")
        self._position = position
        return position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        count = left if count < 0 else min(count, left)
        if count > MAX_DIRECTORY_BYTES:
            raise ArchiveBombError(
                f"{self._uri}: a central directory of {count} bytes, at most {MAX_DIRECTORY_BYTES} are read; "
                "fetch the archive again from a source that you trust"
            )
        start = self._position
        self._position += count
        if start >= self._tail_start:
            return self._tail[start - self._tail_start :][:count]
        return storage.read_range(self._uri, start, count)


_cache: OrderedDict[tuple[str, int], _ZipIndex] = OrderedDict()
_cache_lock = threading.Lock()


def _cached_index(uri: str, size: int) -> _ZipIndex:
    key = (uri, size)
    with _cache_lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    index = _read_index(uri, size)
    with _cache_lock:
        _cache[key] = index
        while len(_cache) > 1 and sum(kept.nbytes for kept in _cache.values()) > MAX_CACHED_BYTES:
            _cache.popitem(last=False)
    return index


def _read_index(uri: str, size: int) -> _ZipIndex:
    try:
        # ZipFile asks a file object for read, seek, tell and seekable alone.
        with zipfile.ZipFile(_RangeFile(uri, size)) as archive:  # type: ignore[arg-type,call-overload]
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            return _index_of(entries, archive.start_dir, uri)
    except _DIRECTORY_ERRORS as error:
        raise DamagedArchiveError(f"{uri}: not a whole zip ({error}); fetch the archive again") from error


def _index_of(entries: list[zipfile.ZipInfo], directory_start: int, uri: str) -> _ZipIndex:
    if len(entries) > MAX_MEMBERS:
        raise ArchiveBombError(f"{uri}: {len(entries)} members, at most {MAX_MEMBERS} are read; split the archive")
    entries.sort(key=lambda entry: _encoded(entry.filename))
    names = [_encoded(entry.filename) for entry in entries]
    twice = next((name for name, other in pairwise(names) if name == other), None)
    if twice is not None:
        raise DamagedArchiveError(
            f"{uri}: member {twice.decode('utf-8', 'replace')} is in it twice; pack the archive again"
        )
    offsets = np.array([entry.header_offset for entry in entries], np.int64)
    order = np.argsort(offsets, kind="stable")
    ends = np.empty_like(offsets)
    ends[order] = np.append(offsets[order], directory_start)[1:]
    return _ZipIndex(
        names=b"".join(names),
        name_ends=np.cumsum([len(name) for name in names], dtype=np.uint32),
        offsets=offsets,
        ends=ends,
        packed_bytes=np.array([entry.compress_size for entry in entries], np.int64),
        unpacked_bytes=np.array([entry.file_size for entry in entries], np.int64),
        checksums=np.array([entry.CRC for entry in entries], np.uint32),
        methods=np.array([entry.compress_type for entry in entries], np.uint16),
        encrypted=np.array([bool(entry.flag_bits & _ENCRYPTED) for entry in entries], bool),
    )


def _inflated(packed: bytes, size: int, source: str) -> bytes:
    """Unpack a raw deflate stream to ``size`` bytes; one more byte is where it stops."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        body = stream.decompress(packed, size + 1)
    except zlib.error as error:
        raise DamagedArchiveError(f"{source}: cannot be unpacked ({error}); fetch the archive again") from error
    if len(body) > size:
        raise ArchiveBombError(f"{source}: unpacks to more than the {size} bytes that it declares; fetch it again")
    if len(body) != size or not stream.eof:
        raise DamagedArchiveError(f"{source}: unpacks to {len(body)} of {size} bytes; fetch the archive again")
    return body


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")
