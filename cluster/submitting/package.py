"""The working tree as one archive, which Ray unpacks where the job runs.

In a git work tree it holds what git would: tracked files, and others that are not ignored. Elsewhere it holds all
files. In both cases without environments, data, results of runs, and files that by their name hold keys. Its bytes
are a function of the files alone, so an unchanged tree is not uploaded twice.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from rich.filesize import decimal

from cluster.records.code_version import git
from lipflow.errors import ConfigError

LARGEST_PACKAGE_BYTES = 100 * 2**20
"""Of all files together, before compression. Code and recipes are a few megabytes; data belongs on storage."""

SENT_FOLDER = "lipflow-sent"
"""Where files from outside the tree stand in the archive."""

_LARGEST_NAMED = 5
_LEFT_OUT_FOLDERS = {
    ".git", ".hg", ".svn", ".venv", "venv", "node_modules", "__pycache__", "build", "dist", "data", "mlruns",
    "mlartifacts", "demo-out", "wandb", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".tox",
}  # fmt: skip
_LEFT_OUT_FILES = ("*.pyc", "*.egg-info", "mlflow.db*")
_KEY_FILES = (
    ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", ".netrc", ".pgpass",
    ".npmrc", ".pypirc", "credentials", "credentials.*", "*-token", "*.token",
)  # fmt: skip
_OLDEST_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Package:
    """What was packed.

    Attributes:
        archive: the zip file.
        files: how many it holds.
        size_bytes: of the files, before compression.
        keys_left_out: files that were left out because their names say that they hold keys.
    """

    archive: Path
    files: int
    size_bytes: int
    keys_left_out: tuple[str, ...]


def working_tree(start: Path) -> Path:
    """The top of the git work tree that holds ``start``, else ``start``."""
    top = git(start, "rev-parse", "--show-toplevel")
    return start.resolve() if top is None else Path(os.fsdecode(top).strip()).resolve()


def pack(tree: Path, archive: Path, extra: dict[str, Path] | None = None) -> Package:
    """Write the archive.

    Args:
        tree: the folder to pack.
        archive: where the zip goes, outside of ``tree``.
        extra: further files by their names in the archive.

    Raises:
        ConfigError: the tree is too large (the largest files are named) or empty.
    """
    names, keys = _chosen(tree)
    sources = {name: tree / name for name in names} | (extra or {})
    if not sources:
        raise ConfigError(
            f"{tree} holds nothing to send: choose another --working-dir (files that git ignores stay here)"
        )
    sizes = {name: path.stat().st_size for name, path in sources.items()}
    total = sum(sizes.values())
    if total > LARGEST_PACKAGE_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:_LARGEST_NAMED]
        named = ", ".join(f"{name} ({decimal(sizes[name])})" for name in largest)
        raise ConfigError(
            f"{tree} holds {decimal(total)} in {len(sizes)} files, at most {decimal(LARGEST_PACKAGE_BYTES)} are sent; "
            f"the largest: {named}: put data on storage, name what is not needed in .gitignore, or choose another "
            "--working-dir"
        )
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in sorted(sources):
            entry = zipfile.ZipInfo(name, date_time=_OLDEST_DATE)
            entry.external_attr = (0o755 if os.access(sources[name], os.X_OK) else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            packed.writestr(entry, sources[name].read_bytes())
    return Package(archive, len(sources), total, tuple(keys))


def _chosen(tree: Path) -> tuple[list[str], list[str]]:
    """(names of the files to send, names that were left out for being keys); links are not followed."""
    listed = git(tree, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    candidates: Iterable[str] = _walked(tree) if listed is None else os.fsdecode(listed).split("\0")
    chosen: list[str] = []
    keys: list[str] = []
    for name in candidates:
        path = tree / name
        if not name or path.is_symlink() or not path.is_file() or _is_left_out(PurePosixPath(name)):
            continue
        (keys if _holds_keys(path.name) else chosen).append(name)
    return chosen, sorted(keys)


def _walked(tree: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(tree):
        folders[:] = [name for name in folders if name not in _LEFT_OUT_FOLDERS]
        for name in files:
            yield Path(folder, name).relative_to(tree).as_posix()


def _is_left_out(name: PurePosixPath) -> bool:
    in_left_out_folder = any(part in _LEFT_OUT_FOLDERS for part in name.parts[:-1])
    return in_left_out_folder or any(fnmatch(part, pattern) for part in name.parts for pattern in _LEFT_OUT_FILES)


def _holds_keys(file_name: str) -> bool:
    return any(fnmatch(file_name.lower(), pattern) for pattern in _KEY_FILES)
