"""Addresses of files, folders and objects."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from lipflow.errors import StorageError


def normalize_uri(path_or_uri: str | Path) -> str:
    """``file:///absolute/path`` or ``s3://bucket/key``, without a trailing slash.

    Raises:
        StorageError: a scheme that is neither of the two, or an ``s3://`` address without a bucket.
    """
    text = str(path_or_uri)
    return _normalize_absolute(text) if text.startswith(_ABSOLUTE) else _normalize(text)


def _normalize(text: str) -> str:
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


# What does not depend on the working folder; a loader asks for the same few addresses over and over.
_ABSOLUTE = ("/", "file:///", "s3://")
_normalize_absolute = lru_cache(maxsize=4096)(_normalize)


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
