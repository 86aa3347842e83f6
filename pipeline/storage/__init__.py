"""The one door to storage: ``file://`` (or a plain path) and ``s3://`` are equals.

Every write is atomic: the whole object appears, or nothing does. Reads and writes are retried, a bounded
number of times and with jittered back-off, on throttling, server errors, resets, time-outs and short bodies
(:mod:`pipeline.storage.s3_settings` states how often and how long); nothing else is retried. Whatever goes wrong is
a :class:`~lipflow.errors.StorageError` of one line that names the address and the remedy.

S3 is configured by the environment only (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_ENDPOINT_URL``, ``AWS_PROFILE``, ...): no key ever enters a config, a pickled task or a log.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from lipflow.errors import StorageError
from pipeline.storage import s3 as storage_s3
from pipeline.storage.address import is_local, join, local_path, normalize_uri
from pipeline.storage.errors import explain, is_not_found
from pipeline.storage.s3 import EndOfObjectError, ShortBodyError, retrying
from pipeline.storage.s3_streams import fetch_to_file, open_object, open_upload

_Result = TypeVar("_Result")
_CHUNK_BYTES = 16 * 2**20
_MAX_SINGLE_PUT_BYTES = 64 * 2**20
_PARTIAL_SUFFIX = ".partial"


class ObjectNotFoundError(StorageError):
    """The object or folder that should be read is not there."""


class OtherBytesError(StorageError):
    """An object that is not the one whose digest the caller knows."""


def read_bytes(uri: str | Path) -> bytes:
    """The whole object.

    Raises:
        ObjectNotFoundError: it is not there.
        StorageError: it cannot be read.
    """
    if is_local(uri):
        return _guarded(uri, "read", lambda: local_path(uri).read_bytes())
    return _guarded(uri, "read", lambda: storage_s3.get_object(_s3_path(uri)))


def read_range(uri: str | Path, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset`` on, by one range request.

    Raises:
        ObjectNotFoundError: the object is not there.
        StorageError: it cannot be read, or it ends before ``offset + length``.
    """
    if length == 0:
        return b""

    normal = normalize_uri(uri)
    if not normal.startswith("file://"):
        path = normal.removeprefix("s3://")
        return _guarded(normal, "read", lambda: storage_s3.get_range(path, offset, length))

    def fetch() -> bytes:
        descriptor = os.open(normal.removeprefix("file://"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            end = os.fstat(descriptor).st_size
            if end < offset + length:  # before memory is taken for bytes that are not there
                raise EndOfObjectError(f"it ends at byte {end}, expected {length} from {offset} on")
            body = os.pread(descriptor, length, offset)
            if len(body) != length:
                raise EndOfObjectError(f"it was cut while it was read, expected {length} from {offset} on")
            return body
        finally:
            os.close(descriptor)

    return _guarded(normal, "read", fetch)


def read_text(uri: str | Path) -> str:
    """The whole object as UTF-8 text."""
    body = read_bytes(uri)
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(f"{normalize_uri(uri)}: expected UTF-8 text ({error.reason})") from error


def write_bytes(uri: str | Path, body: bytes) -> None:
    """Write a whole object atomically; a folder that is missing is made.

    Raises:
        StorageError: it cannot be written.
    """
    if is_local(uri) or len(body) > _MAX_SINGLE_PUT_BYTES:
        with open_for_writing(uri) as stream:
            stream.write(body)
    else:
        _guarded(uri, "write", lambda: storage_s3.put_object(_s3_path(uri), body))


@contextmanager
def open_for_writing(uri: str | Path) -> Iterator[IO[bytes]]:
    """A binary stream whose object appears when the block ends without an error, and not at all otherwise.

    Raises:
        StorageError: it cannot be written.
    """
    if not is_local(uri):
        with _translated(uri, "write"), open_upload(_s3_path(uri)) as upload:
            yield upload
        return
    final = local_path(uri)
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}{_PARTIAL_SUFFIX}")
    with _translated(uri, "write"):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, final)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def open_for_reading(uri: str | Path) -> Iterator[IO[bytes]]:
    """A seekable binary stream of an object."""
    if is_local(uri):
        with _translated(uri, "read"), local_path(uri).open("rb") as stream:
            yield stream
    else:
        with _translated(uri, "read"), open_object(_s3_path(uri)) as stream:
            yield stream


def exists(uri: str | Path) -> bool:
    """Whether an object or a folder is there."""
    if is_local(uri):
        return _guarded(uri, "look up", lambda: local_path(uri).exists())
    bucket, _, key = _s3_path(uri).partition("/")
    try:
        if key and _has_object(uri):
            return True
        page = _guarded(uri, "look up", lambda: next(storage_s3.list_pages(bucket, key and key + "/", MaxKeys=1)))
    except ObjectNotFoundError:
        return False
    return not key or bool(page.get("Contents") or page.get("CommonPrefixes"))


def listdir(uri: str | Path) -> list[str]:
    """The names in a folder, sorted; folders end with ``/``. Unfinished local writes are left out.

    Raises:
        ObjectNotFoundError: there is no such folder (on S3: nothing under that prefix).
    """
    if is_local(uri):

        def entries() -> list[str]:
            with os.scandir(local_path(uri)) as scan:
                return [entry.name + "/" * entry.is_dir() for entry in scan if not _is_partial(entry.name)]

        return sorted(_guarded(uri, "list", entries))
    bucket, _, key = _s3_path(uri).partition("/")
    prefix = key and key + "/"
    names: set[str] = set()
    with _translated(uri, "list"):
        for page in storage_s3.list_pages(bucket, prefix, Delimiter="/"):
            names |= {entry["Key"].removeprefix(prefix) for entry in page.get("Contents", [])}
            names |= {entry["Prefix"].removeprefix(prefix) for entry in page.get("CommonPrefixes", [])}
    if key and not names:
        found = "found an object" if _has_object(uri) else "nothing is there"
        raise ObjectNotFoundError(f"{normalize_uri(uri)}: expected a folder, {found}; check bucket and key")
    return sorted(name for name in names if name.strip("/"))


def size_bytes(uri: str | Path) -> int:
    """The size of an object."""
    if is_local(uri):
        return _guarded(uri, "look up", lambda: local_path(uri).stat().st_size)
    return _guarded(uri, "look up", lambda: storage_s3.head_object(_s3_path(uri))[0])


def sha256_hex(uri: str | Path) -> str:
    """The SHA-256 of an object, read in pieces."""
    if is_local(uri):
        return _guarded(uri, "read", lambda: _file_sha256_hex(local_path(uri)))
    digest = hashlib.sha256()
    total = size_bytes(uri)
    for offset in range(0, total, _CHUNK_BYTES):
        digest.update(read_range(uri, offset, min(_CHUNK_BYTES, total - offset)))
    return digest.hexdigest()


def _file_sha256_hex(path: Path) -> str:
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def delete(uri: str | Path) -> None:
    """Remove an object; one that is not there is no error."""
    try:
        if is_local(uri):
            _guarded(uri, "delete", lambda: local_path(uri).unlink(missing_ok=True))
        else:
            _guarded(uri, "delete", lambda: storage_s3.delete_object(_s3_path(uri)))
    except ObjectNotFoundError:
        return


def delete_dir(uri: str | Path) -> None:
    """Remove a folder and all that is in it; one that is not there is no error."""
    try:
        if is_local(uri):
            _guarded(uri, "delete", lambda: shutil.rmtree(local_path(uri)))
        else:
            bucket, _, key = _s3_path(uri).partition("/")
            with _translated(uri, "list"):
                keys = [
                    entry["Key"]
                    for page in storage_s3.list_pages(bucket, key and key + "/")
                    for entry in page.get("Contents", [])
                ]
            for key in keys:
                with _translated(f"s3://{bucket}/{key}", "delete"):
                    storage_s3.delete_object(f"{bucket}/{key}")
    except ObjectNotFoundError:
        return


def download(uri: str | Path, target: str | Path, *, sha256: str | None = None) -> None:
    """Copy an object to a local file, which appears whole or not at all.

    Args:
        uri: of the object.
        target: the file.
        sha256: what the digest of the copy has to be, in hex; compared before the file appears. None: anything.

    Raises:
        ObjectNotFoundError: it is not there.
        OtherBytesError: it has another digest.
        StorageError: it cannot be read, or the target cannot be written.
    """
    final = local_path(target)
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}{_PARTIAL_SUFFIX}")

    def copy() -> None:
        shutil.copyfile(local_path(uri), partial)
        received, expected = partial.stat().st_size, size_bytes(uri)
        if received != expected:
            raise ShortBodyError(f"{received} bytes came back, expected {expected}")

    with _translated(target, "write"):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            if is_local(uri):
                _guarded(uri, "read", copy)
                found = None if sha256 is None else _file_sha256_hex(partial)
            else:
                digest = None if sha256 is None else hashlib.sha256()
                with _translated(uri, "read"):
                    fetch_to_file(_s3_path(uri), partial, digest)
                found = None if digest is None else digest.hexdigest()
            if found != sha256:
                raise OtherBytesError(f"{normalize_uri(uri)}: SHA-256 {found}, expected {sha256}; write it again")
            os.replace(partial, final)
        finally:
            partial.unlink(missing_ok=True)


def upload_dir(source: str | Path, uri: str | Path) -> None:
    """Copy all files of a local folder, in sorted order, to ``uri/...``. Each file is atomic, the folder is not."""
    root = local_path(source)
    for path in sorted(item for item in root.rglob("*") if item.is_file() and not _is_partial(item.name)):
        with open_for_writing(join(uri, path.relative_to(root).as_posix())) as target, path.open("rb") as stream:
            shutil.copyfileobj(stream, target, _CHUNK_BYTES)


def download_dir(uri: str | Path, target: str | Path) -> None:
    """Copy all files under ``uri`` to a local folder.

    Raises:
        StorageError: also for a name that would leave the folder.
    """
    root = local_path(target)
    for name in listdir(uri):
        if name.rstrip("/") in (".", "..") or "\\" in name:
            raise StorageError(f"{join(uri, name)}: a name that leaves its folder; remove that object")
        if name.endswith("/"):
            download_dir(join(uri, name), root / name.rstrip("/"))
        else:
            download(join(uri, name), root / name)


def filesystem(uri: str | Path) -> tuple[AbstractFileSystem, str]:
    """The fsspec filesystem behind ``uri`` and the path in it, for libraries that do their own I/O through fsspec.

    It holds no credentials of its own: wherever it is unpickled, it takes them from that process's environment.
    """
    if is_local(uri):
        return LocalFileSystem(), str(local_path(uri))
    return storage_s3.s3_filesystem(for_libraries=True), _s3_path(uri)


def check_writable(uri: str | Path) -> None:
    """Write and remove a small object under the folder ``uri``.

    Raises:
        StorageError: with the remedy, if that fails.
    """
    probe = join(uri, f".write-check-{uuid.uuid4().hex}")
    write_bytes(probe, b"lipflow")
    delete(probe)


def _guarded(uri: str | Path, action: str, call: Callable[[], _Result]) -> _Result:
    """Run ``call``; what it asks of S3 is retried there, request by request."""
    with _translated(uri, action):
        return retrying(call) if is_local(uri) else call()


@contextmanager
def _translated(uri: str | Path, action: str) -> Iterator[None]:
    """Turn what the operating system or S3 raises about ``uri`` into a StorageError with a remedy."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        reason = explain(normalize_uri(uri), action, error)
        if reason is None:
            raise
        kind = ObjectNotFoundError if is_not_found(error) and action != "write" else StorageError
        raise kind(f"{normalize_uri(uri)}: {reason}") from error


def _has_object(uri: str | Path) -> bool:
    try:
        size_bytes(uri)
    except ObjectNotFoundError:
        return False
    return True


def _s3_path(uri: str | Path) -> str:
    return normalize_uri(uri).removeprefix("s3://")


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(_PARTIAL_SUFFIX)


__all__ = [
    "ObjectNotFoundError",
    "OtherBytesError",
    "check_writable",
    "delete",
    "delete_dir",
    "download",
    "download_dir",
    "exists",
    "filesystem",
    "is_local",
    "join",
    "listdir",
    "local_path",
    "normalize_uri",
    "open_for_reading",
    "open_for_writing",
    "read_bytes",
    "read_range",
    "read_text",
    "sha256_hex",
    "size_bytes",
    "upload_dir",
    "write_bytes",
]
