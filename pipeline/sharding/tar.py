"""Shards are tars with fixed times and owners: the same members give the same bytes."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from typing import IO

from webdataset import TarWriter

from lipflow.errors import CaptureError

_BLOCK_BYTES = 512
_MAX_NAME_BYTES, _MAX_FOLDER_BYTES = 100, 155


class ShardWriter:
    """Writes one tar to a stream, as a context manager; keeps its SHA-256, its size and the places of its members.

    Args:
        stream: where the bytes go; it is not closed.
    """

    def __init__(self, stream: IO[bytes]):
        self._hashing = _HashingStream(stream)
        self._tar = TarWriter(self._hashing, encoder=False, mtime=0, user="lipflow", group="lipflow", compress=False)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write the end of the tar; after an error, nothing more."""
        self._hashing.muted = kind is not None
        self._tar.close()

    def add_sample(self, frame_id: str, members: Iterator[tuple[str, bytes]]) -> dict[str, tuple[int, int, int]]:
        """Write the members of one sample as they come, one in memory at a time; returns offset, size and CRC-32."""
        places: dict[str, tuple[int, int, int]] = {}
        for suffix, body in members:
            self._tar.write({"__key__": frame_id, suffix: body})
            padded = -(-len(body) // _BLOCK_BYTES) * _BLOCK_BYTES
            places[suffix] = (self._tar.tarstream.offset - padded, len(body), zlib.crc32(body))
        return places

    @property
    def sha256(self) -> str:
        """Of all bytes; valid once the writer was left."""
        return self._hashing.digest.hexdigest()

    @property
    def size_bytes(self) -> int:
        """Of the tar; valid once the writer was left."""
        return self._hashing.size_bytes


def check_member_name(frame_id: str, suffix: str) -> None:
    """Refuse names that a tar cannot hold, or that a WebDataset reader would cut in another place.

    Raises:
        CaptureError: naming the frame or the camera.
    """
    folder, _, frame = frame_id.rpartition("/")
    parts = frame_id.split("/")
    if len(parts) != 2 or any(part in ("", ".", "..") for part in parts) or "." in frame or "\\" in frame_id:
        raise CaptureError(f"{frame_id!r}: a frame is named SEGMENT/FRAME, and FRAME has no dot; rename it")
    if "/" in suffix or "\\" in suffix:
        raise CaptureError(f"{suffix!r}: a camera's name has no slash; rename it")
    if len(folder.encode()) > _MAX_FOLDER_BYTES or len(f"{frame}.{suffix}".encode()) > _MAX_NAME_BYTES:
        raise CaptureError(f"{frame_id}.{suffix}: too long a name for a tar; shorten the segment or the camera")


class _HashingStream:
    """Passes bytes on, and counts and digests them."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self.digest = hashlib.sha256()
        self.size_bytes = 0
        self.muted = False

    def write(self, body: bytes) -> int:
        if self.muted:
            return len(body)
        self.digest.update(body)
        self.size_bytes += len(body)
        self._stream.write(body)
        return len(body)
