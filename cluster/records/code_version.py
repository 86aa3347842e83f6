"""Which code made something: a git commit, or the installed package's version."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path


def code_version() -> str:
    """``LIPFLOW_CODE_VERSION`` if set, else the git commit (``+dirty`` if changed), else the package's version."""
    return os.environ.get("LIPFLOW_CODE_VERSION") or _installed_version()


def tree_version(tree: Path) -> str | None:
    """The commit of a git work tree, with ``+dirty`` if something differs from it; None outside git."""
    commit = git(tree, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit.decode().strip() + ("+dirty" if git(tree, "status", "--porcelain", "-uno") else "")


def git(folder: Path, *arguments: str) -> bytes | None:
    """What git prints, or None where there is no git or no work tree."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


@cache
def _installed_version() -> str:
    here = Path(__file__).resolve()
    # An environment inside somebody else's repository must not report that repository's commit.
    ours = git(here.parent, "ls-files", "--error-unmatch", here.name) is not None
    return (tree_version(here.parent) if ours else None) or f"lipflow {metadata.version('lipflow')}"
