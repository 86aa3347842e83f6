"""Objects on S3 as files: read by ranges, written by parts, abandoned without a trace."""

from __future__ import annotations

import atexit
import io
import logging
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, cast

from pipeline.storage.s3 import (
    error_code,
    get_range,
    head_object,
    on_loop,
    one_line,
    put_object,
    request,
    retrying,
    send_once,
)
from pipeline.storage.s3_bulk import copy_range

_PART_BYTES = 16 * 2**20
_PARALLEL_RANGES = 4
_DIGEST_BYTES = 2**18
"""Stays in the cache of a core from the copy to the digest. A divisor of a part."""

_logger = logging.getLogger(__name__)


class Digest(Protocol):
    """As of :mod:`hashlib`."""

    def update(self, piece: Any, /) -> None:
        """Take the next bytes."""


def fetch_to_file(path: str, target: Path, digest: Digest | None = None) -> None:
    """Copy an object to a local file, by ranges, some at a time.

    ``digest`` takes the file's bytes in order, as they stand in the file: each range once, when it and all before it
    are there, while those behind it still come.
    """
    size, etag = head_object(path)
    with target.open("w+b", buffering=0) as stream, ThreadPoolExecutor(_PARALLEL_RANGES) as pool:

        def copy(offset: int) -> int:
            copy_range(path, offset, min(_PART_BYTES, size - offset), etag, stream.fileno())
            return offset

        piece = memoryview(bytearray(_DIGEST_BYTES))
        for offset in pool.map(copy, range(0, size, _PART_BYTES)):
            if digest is not None:
                for start in range(offset, min(offset + _PART_BYTES, size), _DIGEST_BYTES):
                    digest.update(piece[: os.preadv(stream.fileno(), [piece], start)])


def open_object(path: str) -> IO[bytes]:
    """A seekable stream of an object; ranges of 16 MiB are read ahead, and one version of it is seen throughout."""
    return cast("IO[bytes]", io.BufferedReader(_ObjectReader(path), _PART_BYTES))


@contextmanager
def open_upload(path: str) -> Iterator[IO[bytes]]:
    """A stream to ``bucket/key``; an error inside the block abandons the upload, parts included.

    An upload that is neither finished nor abandoned, because the process died, shows nothing to a reader; its parts
    wait for the bucket's rule for incomplete uploads.
    """
    upload = _Upload(path)
    _open_uploads.add(upload)
    try:
        yield cast("IO[bytes]", upload)
        upload.commit()
    except BaseException:
        upload.abandon()
        raise
    finally:
        _open_uploads.discard(upload)


_open_uploads: set[_Upload] = set()


@atexit.register
def _forget_open_uploads() -> None:
    """The event loop is gone at exit: a request to abandon an upload would wait for ever."""
    for upload in _open_uploads:
        upload.forget()


class _ObjectReader(io.RawIOBase):
    def __init__(self, path: str):
        self._path = path
        self._size, self._etag = head_object(path)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._position)
        if length <= 0:
            return 0
        buffer[:length] = get_range(self._path, self._position, length, self._etag)
        self._position += length
        return length

    def readall(self) -> bytes:
        body = bytearray(max(0, self._size - self._position))
        view = memoryview(body)
        while view:
            view = view[self.readinto(view[:_PART_BYTES]) :]
        return bytes(body)


class _Upload(io.RawIOBase):
    """One request for a small object, a multipart upload for one of more than a part; one part in memory."""

    def __init__(self, path: str):
        self._path = path
        self._buffer = bytearray()
        self._upload_id: str | None = None
        self._parts: list[dict[str, Any]] = []
        self._sent_bytes = self._sent_crc32 = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._sent_bytes + len(self._buffer)

    def write(self, body: Any) -> int:
        rest = memoryview(body).cast("B")
        length = len(rest)
        while rest:
            room = _PART_BYTES - len(self._buffer)
            self._buffer += rest[:room]
            rest = rest[room:]
            if len(self._buffer) == _PART_BYTES:
                self._send_part()
        return length

    def commit(self) -> None:
        if self._upload_id is None:
            put_object(self._path, bytes(self._buffer))
            return
        if self._buffer:
            self._send_part()
        answer_lost = False

        def complete() -> None:
            nonlocal answer_lost
            try:
                arguments = {"UploadId": self._upload_id, "MultipartUpload": {"Parts": self._parts}}
                on_loop(self._path, send_once, "complete_multipart_upload", arguments)
            except Exception as error:
                # The attempt before may have been carried out, and only its answer been lost.
                if not (answer_lost and error_code(error) == "NoSuchUpload" and self._is_there()):
                    raise
            finally:
                answer_lost = True

        retrying(complete)
        self._upload_id = None

    def abandon(self) -> None:
        if self._upload_id is None:
            return
        try:
            request("abort_multipart_upload", self._path, UploadId=self._upload_id)
        except Exception as error:
            _logger.warning(
                "s3://%s: cannot remove the parts of an abandoned upload, of which readers see nothing (%s);"
                " let the bucket's rule for incomplete uploads remove them",
                self._path,
                one_line(error),
            )

    def forget(self) -> None:
        """Send nothing more; the parts are left to the bucket's rule for incomplete uploads."""
        self._upload_id = None

    def _send_part(self) -> None:
        if self._upload_id is None:
            self._upload_id = request("create_multipart_upload", self._path)["UploadId"]
        body, self._buffer = bytes(self._buffer), bytearray()
        number = len(self._parts) + 1
        answer = request("upload_part", self._path, UploadId=self._upload_id, PartNumber=number, Body=body)
        checksums = {name: value for name, value in answer.items() if re.fullmatch(r"Checksum(CRC\w+|SHA\d+)", name)}
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"], **checksums})
        self._sent_bytes += len(body)
        self._sent_crc32 = zlib.crc32(body, self._sent_crc32)

    def _is_there(self) -> bool:
        size, etag = head_object(self._path)
        if size != self._sent_bytes:
            return False
        crc32 = 0
        for offset in range(0, size, _PART_BYTES):
            crc32 = zlib.crc32(get_range(self._path, offset, min(_PART_BYTES, size - offset), etag), crc32)
        return crc32 == self._sent_crc32
