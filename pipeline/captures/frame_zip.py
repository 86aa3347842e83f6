"""One zip that holds one file a frame: the images of a camera, the meshes, the head poses."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

import numpy as np

from pipeline import storage
from pipeline.capture_errors import ArchiveBombError, DamagedArchiveError
from pipeline.zip_index import ZipArchive

_FRAME_STEM = re.compile(r"[0-9]{6}|[1-9][0-9]{6,11}")
"""As :func:`~pipeline.captures.ava256_files.frame_stem` writes them."""


class FrameZip:
    """The members ``FOLDER/STEM.EXTENSION`` or ``STEM.EXTENSION`` of a zip, by stem.

    Args:
        uri: of the zip, which may be missing: then it has no member.
        folder: under which the members may lie.
        extension: of the members, without its dot.
    """

    def __init__(self, uri: str, folder: str, extension: str):
        self.uri = storage.normalize_uri(uri)
        self._folder, self._extension = folder, extension

    def source_of(self, stem: str) -> str:
        """``ARCHIVE!MEMBER`` of a frame, whether it is there or not."""
        return f"{self.uri}!{self._member(stem) or self._names(stem)[self._is_flat]}"

    def read(self, stem: str) -> bytes | None:
        """The file of a frame; None if there is none.

        Raises:
            DamagedArchiveError: the zip or the member is damaged.
            ArchiveBombError: the zip or the member would unpack to more than any real one.
        """
        archive = self._archive
        if isinstance(archive, Exception):
            raise archive
        name = self._member(stem)
        return None if archive is None or name is None else archive.read(name)

    def present(self, stems: Iterable[str]) -> frozenset[str]:
        """Those of ``stems`` that have a member.

        A zip that cannot be read counts as holding all of them: its frames are not lost by the capture, and whoever
        reads one meets the zip's fault.
        """
        archive = self._archive
        if archive is None:
            return frozenset()
        if isinstance(archive, Exception):
            return frozenset(stems)
        wanted = list(stems)
        numbers = np.array([int(stem) for stem in wanted], np.int64)
        return frozenset(wanted[row] for row in np.flatnonzero(np.isin(numbers, self._numbers)))

    def has(self, stem: str) -> bool:
        """Whether :meth:`present` names the frame."""
        archive = self._archive
        return self._member(stem) is not None if isinstance(archive, ZipArchive) else archive is not None

    def check(self) -> None:
        """Read the zip's central directory.

        Raises:
            DamagedArchiveError: it cannot be used.
            ArchiveBombError: it declares more than any real zip has.
        """
        if isinstance(self._archive, Exception):
            raise self._archive

    @property
    def is_there(self) -> bool:
        """Whether there is such a zip, good or bad."""
        return self._archive is not None

    @cached_property
    def _archive(self) -> ZipArchive | DamagedArchiveError | ArchiveBombError | None:
        try:
            return ZipArchive(self.uri)
        except storage.ObjectNotFoundError:
            return None
        except (DamagedArchiveError, ArchiveBombError) as error:
            return error

    @cached_property
    def _numbers(self) -> np.ndarray:
        """``(N,)`` int64 frame numbers of the members."""
        assert isinstance(self._archive, ZipArchive)
        suffix, found = f".{self._extension}", []
        for name in self._archive.names():
            stem = name.removeprefix(f"{self._folder}/").removesuffix(suffix)
            if name.endswith(suffix) and _FRAME_STEM.fullmatch(stem):
                found.append(int(stem))
        return np.array(found, np.int64)

    @cached_property
    def _is_flat(self) -> bool:
        """Whether its members lie outside of the folder, as those of a first one do."""
        archive = self._archive
        name = next(archive.names(), None) if isinstance(archive, ZipArchive) else None
        return name is not None and not name.startswith(f"{self._folder}/")

    def _names(self, stem: str) -> tuple[str, str]:
        """A frame's member in the folder, and outside of it."""
        short = f"{stem}.{self._extension}"
        return f"{self._folder}/{short}", short

    def _member(self, stem: str) -> str | None:
        archive = self._archive
        if not isinstance(archive, ZipArchive):
            return None
        return next((name for name in self._names(stem) if name in archive), None)
