"""Shards on a local disk: remote ones are copied whole, checked against the manifest, and kept within a bound."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from typing import Literal

from lipflow.errors import ShardSetError
from pipeline import storage
from pipeline.manifest import ShardRecord

_SUFFIX = ".shard"


class _ReadBuffer(threading.local):
    """Memory for one member a thread: fresh pages for each cost as much as the copy into them."""

    def __init__(self) -> None:
        self.memory = bytearray()

    def take(self, size: int) -> memoryview:
        if len(self.memory) < size:
            self.memory = bytearray(size)
        return memoryview(self.memory)[:size]


_buffer = _ReadBuffer()

ShardCheck = Literal["once", "each-epoch", "size"]
"""When a shard's SHA-256 is compared: at its first use by a process, in each epoch again, or never but for its size."""


class ShardCache:
    """Reads ranges of shards; a shard is checked before its first byte is handed out, and whenever it was copied.

    Local shards are read where they lie. Several processes may share one folder: names are digests, files appear
    atomically, and a file that another process removed is fetched again.

    Args:
        shards_uri: the shard set.
        folder: where copies of remote shards are kept; None: a temporary folder of this object.
        max_bytes: the copies' total size; the one used longest ago goes first.
        check: ``"size"`` compares sizes alone; the two others compare digests, ``"each-epoch"`` anew after
            :meth:`start_epoch`.
    """

    def __init__(self, shards_uri: str, folder: str | Path | None, max_bytes: int, check: ShardCheck = "once"):
        self._shards_uri = storage.normalize_uri(shards_uri)
        self._local = storage.is_local(shards_uri)
        self._max_bytes = max_bytes
        self._check_when = check
        self._temporary = None
        if folder is None and not self._local:
            self._temporary = tempfile.TemporaryDirectory(prefix="lipflow-shards-")
            folder = self._temporary.name
        self._folder = None if folder is None else Path(folder)
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._locks_guard = threading.Lock()
        self._room = threading.Condition()
        self._arriving: dict[str, int] = {}
        self._checked: set[str] = set()
        self._paths: dict[str, Path] = {}

    def start_epoch(self) -> None:
        """With ``check="each-epoch"``, no shard counts as checked any longer."""
        if self._check_when == "each-epoch":
            self._checked = set()

    def read(self, shard: ShardRecord, offset: int, size: int) -> memoryview:
        """``size`` bytes of a shard, which are valid until the same thread reads again.

        Raises:
            ShardSetError: the shard is absent, or it is not the one of the manifest.
            StorageError: it cannot be copied.
        """
        for _ in range(3):
            path = self.ensure(shard)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self._checked.discard(shard.sha256)
                continue
            try:
                body = _buffer.take(size)
                received = os.preadv(descriptor, [body], offset)
            finally:
                os.close(descriptor)
            if received == size:
                return body
            raise ShardSetError(f"{path}: ends within a member; the shard was changed while it was read")
        raise ShardSetError(f"{shard.name}: removed while it was read; raise the bound of the cache")

    def ensure(self, shard: ShardRecord) -> Path:
        """The local path of a shard that was checked, after copying it if need be."""
        path = self._paths.get(shard.name)
        if path is None:
            path = self._paths[shard.name] = self._path(shard)
        with self._lock(shard.sha256):
            there = self._local or _touch(path)
            if there and shard.sha256 in self._checked:
                return path
            if not there:
                self._fetch(shard, path)
            if there or self._check_when == "size":
                self._check(shard, path)
            self._checked.add(shard.sha256)
            return path

    def _fetch(self, shard: ShardRecord, path: Path) -> None:
        """Copy a shard, after what other threads are copying if there is no room for both.

        If digests are compared, that of the copy is before it can be seen; it is taken while the bytes come.
        """
        uri = storage.join(self._shards_uri, shard.name)
        with self._room:
            self._room.wait_for(
                lambda: not self._arriving or sum(self._arriving.values()) + shard.size_bytes <= self._max_bytes
            )
            self._arriving[shard.sha256] = shard.size_bytes
            self._make_room(sum(self._arriving.values()))
        try:
            storage.download(uri, path, sha256=None if self._check_when == "size" else shard.sha256)
        except storage.ObjectNotFoundError as error:
            raise ShardSetError(f"{error}; the manifest lists it, shard the capture again") from error
        except storage.OtherBytesError as error:
            raise _damaged(uri, "its bytes", shard) from error
        finally:
            with self._room:
                del self._arriving[shard.sha256]
                self._room.notify_all()

    def _path(self, shard: ShardRecord) -> Path:
        if self._folder is None or self._local:
            return storage.local_path(storage.join(self._shards_uri, shard.name))
        return self._folder / (shard.sha256 + _SUFFIX)

    def _check(self, shard: ShardRecord, path: Path) -> None:
        uri = storage.join(self._shards_uri, shard.name)
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise ShardSetError(f"{uri}: the shard is not there, but the manifest lists it; shard again") from error
        if size == shard.size_bytes and (self._check_when == "size" or storage.sha256_hex(path) == shard.sha256):
            return
        if not self._local:
            path.unlink(missing_ok=True)
        raise _damaged(uri, f"its {size} bytes", shard)

    def _make_room(self, needed_bytes: int) -> None:
        """Remove the copies used longest ago until the new one fits; others may be removing them as well."""
        if self._folder is None or not self._folder.exists():
            return
        copies = []
        for path in self._folder.glob("*" + _SUFFIX):
            try:
                facts = path.stat()
            except FileNotFoundError:
                continue
            copies.append((facts.st_mtime_ns, facts.st_size, path))
        total = sum(size for _, size, _ in copies) + needed_bytes
        for _, size, path in sorted(copies):
            if total <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _lock(self, key: str) -> threading.Lock:
        with self._locks_guard:
            return self._locks[key]


def _damaged(uri: str, found: str, shard: ShardRecord) -> ShardSetError:
    return ShardSetError(
        f"{uri}: {found} do not match the manifest (size {shard.size_bytes}, SHA-256 {shard.sha256[:12]}...);"
        " the shard is damaged, shard the capture again"
    )


def _touch(path: Path) -> bool:
    """Mark a copy as used now; False if it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
