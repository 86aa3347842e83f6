"""The one door to storage: ``file://`` (or a plain path) and ``s3://`` are equals.

Every write is atomic: the whole object appears, or nothing does. Reads and writes are retried, a bounded
number of times and with jittered back-off, on throttling, server errors, resets, time-outs and short bodies;
nothing else is retried. Whatever goes wrong is a :class:`~lipflow.errors.StorageError` of one line that names
the address and the remedy.

S3 is configured by the environment only (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_ENDPOINT_URL``, ...): no key ever enters a config, a pickled task or a log.
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
from pipeline.storage_errors import explain
from pipeline.storage_s3 import ShortBodyError, open_upload, retrying, s3_filesystem

_Result = TypeVar("_Result")
_CHUNK_BYTES = 16 * 2**20
_PARTIAL_SUFFIX = ".partial"


class ObjectNotFoundError(StorageError):
    """The object or folder that should be read is not there."""


def normalize_uri(path_or_uri: str | Path) -> str:
    """``file:///absolute/path`` or ``s3://bucket/key``, without a trailing slash.

    Raises:
        StorageError: a scheme that is neither of the two, or an ``s3://`` address without a bucket.
    """
    text = str(path_or_uri)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return "file://" + str(Path(text).expanduser().absolute())
    if scheme == "file":
        return "file://" + str(Path(rest).absolute())
    if scheme != "s3":
        raise StorageError(f"{text}: cannot use {scheme}:// addresses; give a path, file:// or s3://")
    if not rest.strip("/"):
        raise StorageError(f"{text}: no bucket is named; expected s3://BUCKET/KEY")
    return "s3://" + rest.strip("/")


def is_local(uri: str | Path) -> bool:
    """Whether ``uri`` is a path or ``file://``."""
    return normalize_uri(uri).startswith("file://")


def local_path(uri: str | Path) -> Path:
    """The path behind a local address.

    Raises:
        StorageError: the address is remote.
    """
    normal = normalize_uri(uri)
    if not normal.startswith("file://"):
        raise StorageError(f"{normal}: expected a local path; download it first")
    return Path(normal.removeprefix("file://"))


def join(uri: str | Path, *parts: str) -> str:
    """``uri/part/part...``; the first argument may be a plain path."""
    return "/".join([normalize_uri(uri).rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(uri: str | Path) -> bytes:
    """The whole object.

    Raises:
        ObjectNotFoundError: it is not there.
        StorageError: it cannot be read.
    """
    if is_local(uri):
        return _guarded(uri, "read", lambda: local_path(uri).read_bytes())
    return _guarded(uri, "read", lambda: s3_filesystem().cat_file(_s3_path(uri)))


def read_range(uri: str | Path, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset`` on, by one range request.

    Raises:
        ObjectNotFoundError: the object is not there.
        StorageError: it cannot be read, or it ends before ``offset + length``.
    """
    if length == 0:
        return b""

    def fetch() -> bytes:
        if is_local(uri):
            with local_path(uri).open("rb") as stream:
                stream.seek(offset)
                body = stream.read(length)
        else:
            body = s3_filesystem().cat_file(_s3_path(uri), start=offset, end=offset + length)
        if len(body) != length:
            raise ShortBodyError(f"{len(body)} bytes came back, expected {length} from offset {offset}")
        return body

    return _guarded(uri, "read", fetch)


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
    if is_local(uri):
        with open_for_writing(uri) as stream:
            stream.write(body)
    else:
        _guarded(uri, "write", lambda: s3_filesystem().pipe_file(_s3_path(uri), body))


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
        with _translated(uri, "read"), s3_filesystem().open(_s3_path(uri), "rb", block_size=_CHUNK_BYTES) as stream:
            yield stream


def exists(uri: str | Path) -> bool:
    """Whether an object or a folder is there."""
    if is_local(uri):
        return _guarded(uri, "look up", lambda: local_path(uri).exists())
    return _guarded(uri, "look up", lambda: bool(s3_filesystem().exists(_s3_path(uri))))


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
    prefix = _s3_path(uri) + "/"
    listing = _guarded(uri, "list", lambda: s3_filesystem().ls(_s3_path(uri), detail=True))
    inside = [entry for entry in listing if entry["name"].startswith(prefix)]
    if listing and not inside:
        raise ObjectNotFoundError(f"{normalize_uri(uri)}: expected a folder, found an object")
    names = (entry["name"].removeprefix(prefix) + "/" * (entry["type"] == "directory") for entry in inside)
    return sorted(name for name in names if name.strip("/"))


def size_bytes(uri: str | Path) -> int:
    """The size of an object."""
    if is_local(uri):
        return _guarded(uri, "look up", lambda: local_path(uri).stat().st_size)
    return _guarded(uri, "look up", lambda: int(s3_filesystem().size(_s3_path(uri))))


def sha256_hex(uri: str | Path) -> str:
    """The SHA-256 of an object, read in pieces."""
    digest = hashlib.sha256()
    total = size_bytes(uri)
    for offset in range(0, total, _CHUNK_BYTES):
        digest.update(read_range(uri, offset, min(_CHUNK_BYTES, total - offset)))
    return digest.hexdigest()


def delete(uri: str | Path) -> None:
    """Remove an object; one that is not there is no error."""
    try:
        if is_local(uri):
            _guarded(uri, "delete", lambda: local_path(uri).unlink(missing_ok=True))
        else:
            _guarded(uri, "delete", lambda: s3_filesystem().rm_file(_s3_path(uri)))
    except ObjectNotFoundError:
        return


def delete_dir(uri: str | Path) -> None:
    """Remove a folder and all that is in it; one that is not there is no error."""
    try:
        if is_local(uri):
            _guarded(uri, "delete", lambda: shutil.rmtree(local_path(uri)))
        else:
            for key in _guarded(uri, "list", lambda: s3_filesystem().find(_s3_path(uri) + "/")):
                delete("s3://" + key)
    except ObjectNotFoundError:
        return


def download(uri: str | Path, target: str | Path) -> None:
    """Copy an object to a local file, which appears whole or not at all.

    Raises:
        ObjectNotFoundError: it is not there.
        StorageError: it cannot be read, or the target cannot be written.
    """
    final = local_path(target)
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}{_PARTIAL_SUFFIX}")

    def copy() -> None:
        if is_local(uri):
            shutil.copyfile(local_path(uri), partial)
        else:
            s3_filesystem().get_file(_s3_path(uri), str(partial))
        received, expected = partial.stat().st_size, size_bytes(uri)
        if received != expected:
            raise ShortBodyError(f"{received} bytes came back, expected {expected}")

    with _translated(target, "write"):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            _guarded(uri, "read", copy)
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
    return s3_filesystem(), _s3_path(uri)


def check_writable(uri: str | Path) -> None:
    """Write and remove a small object under the folder ``uri``.

    Raises:
        StorageError: with the remedy, if that fails.
    """
    probe = join(uri, f".write-check-{uuid.uuid4().hex}")
    write_bytes(probe, b"lipflow")
    delete(probe)


def _guarded(uri: str | Path, action: str, call: Callable[[], _Result]) -> _Result:
    with _translated(uri, action):
        return retrying(call)


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
        kind = ObjectNotFoundError if isinstance(error, FileNotFoundError) and action != "write" else StorageError
        raise kind(f"{normalize_uri(uri)}: {reason}") from error


def _s3_path(uri: str | Path) -> str:
    return normalize_uri(uri).removeprefix("s3://")


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(_PARTIAL_SUFFIX)


__all__ = [
    "ObjectNotFoundError",
    "check_writable",
    "delete",
    "delete_dir",
    "download",
    "download_dir",
    "exists",
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
