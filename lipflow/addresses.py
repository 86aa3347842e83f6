"""Avatars by address: what is no folder is fetched by whoever knows its scheme.

``lipflow`` reads folders and imports nothing that could fetch anything. A package that can declares an entry point in
the group ``lipflow.avatar_fetchers``, named by the scheme, that takes an address and an empty folder and returns the
folder with the avatar. The jobs of this repository (``cluster/``) do so for ``models:/`` and ``runs:/`` of MLflow, and
for ``s3://`` and ``file://``.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

from lipflow.errors import LipflowError

FETCHERS = "lipflow.avatar_fetchers"

# Of two letters and more: C:/ is a drive.
_SCHEME = re.compile(r"(?P<scheme>[a-z][a-z0-9+.\-]+):/")


@contextmanager
def local_folder(address: str | Path) -> Iterator[Path]:
    """The folder that ``address`` names; a fetched one lasts as long as the ``with`` block.

    Raises:
        LipflowError: nothing that is installed fetches such addresses, or what does it could not.
    """
    found = _SCHEME.match(address) if isinstance(address, str) else None
    if found is None:
        yield Path(address)
        return
    fetch = _fetcher(found["scheme"])
    with tempfile.TemporaryDirectory() as folder:
        yield fetch(str(address), Path(folder))


def _fetcher(scheme: str) -> Callable[[str, Path], Path]:
    known = entry_points(group=FETCHERS)
    for entry in known:
        if entry.name == scheme:
            return entry.load()
    raise LipflowError(
        f"nothing that is installed fetches avatars from {scheme}:/, only from {sorted(known.names)}: "
        "install the lipflow package with its jobs, or give a local folder"
    )


__all__ = ["FETCHERS", "local_folder"]
