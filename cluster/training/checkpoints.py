"""Checkpoints on the storage: each complete or not there, the latest ones and the best kept.

OUT/checkpoints/step-00000200-1f0c52aa/
    avatar/...          what is exported
    state.pt            the rest (:mod:`cluster.training.state`)
    checkpoint.json     step, validation loss and the SHA-256 of every file; written last, and so the checkpoint's
                        birth certificate: a folder without it is no checkpoint

They are ours and not Ray Train's: its record of what it has uploaded is a second write, after which alone a checkpoint
counts, and half of which ends the training for good. Here there is one atomic write. A folder has one writer, so that
a worker that was given up and still lives cannot mix its files with those of the one that took its place.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lipflow.errors import LipflowError
from pipeline import storage

CHECKPOINTS_FOLDER = "checkpoints"
RECORD_FILE = "checkpoint.json"
UPLOADS_THAT_MAY_FAIL = 2
"""In a row: the next checkpoint makes up for one that could not be written, but not for ever."""

_logger = logging.getLogger(__name__)


class DamagedCheckpointError(LipflowError):
    """A checkpoint whose files are not those of its record."""


@dataclass(frozen=True)
class Checkpoint:
    """The record of a complete checkpoint.

    Attributes:
        name: of its folder.
        step: optimiser steps done.
        validation_loss: of what it exports; None where a worker had to leave between two validations.
        sha256: of every file, by path in the folder.
    """

    name: str
    step: int
    validation_loss: float | None
    sha256: dict[str, str]


class CheckpointStore:
    """The checkpoints of one training.

    Args:
        out_uri: of the training.
        keep: how many of the latest ones are kept, besides the best.
    """

    def __init__(self, out_uri: str, keep: int = 2):
        self._uri = storage.join(out_uri, CHECKPOINTS_FOLDER)
        self._keep = keep

    def complete(self) -> list[Checkpoint]:
        """The complete ones, by step."""
        found = [record for record in map(self._record, self._names()) if record is not None]
        return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.name))

    def best(self) -> Checkpoint | None:
        """The one with the lowest validation loss, the first of several."""
        return _best_of(self.complete())

    def fetch(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Copy its files to a local folder, and compare them with its record.

        Raises:
            DamagedCheckpointError: a file is missing or another one.
            StorageError: a file cannot be read.
        """
        for name, sha256 in checkpoint.sha256.items():
            try:
                storage.download(storage.join(self._uri, checkpoint.name, name), folder / name, sha256=sha256)
            except (storage.ObjectNotFoundError, storage.OtherBytesError) as error:
                raise DamagedCheckpointError(f"checkpoint {checkpoint.name}: {error}") from error

    def read_latest(self, read: Callable[[Path], None]) -> Checkpoint | None:
        """Call ``read`` with the files of the latest one that is unharmed; None if there is none.

        Raises:
            StorageError: a file cannot be read.
        """
        for checkpoint in reversed(self.complete()):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    self.fetch(checkpoint, Path(folder))
                except DamagedCheckpointError as error:
                    _logger.warning("passed over for the one before it: %s", error)
                    continue
                read(Path(folder))
                return checkpoint
        return None

    def read(self, name: str, read: Callable[[Path], None]) -> None:
        """Call ``read`` with the files of the complete checkpoint ``name``.

        Raises:
            DamagedCheckpointError: it is not there, or a file is missing or another one.
            StorageError: a file cannot be read.
        """
        checkpoint = self._record(name)
        if checkpoint is None:
            raise DamagedCheckpointError(f"checkpoint {name} is not there any more: submit the training again")
        with tempfile.TemporaryDirectory() as folder:
            self.fetch(checkpoint, Path(folder))
            read(Path(folder))

    def write(self, save: Callable[[Path], None], step: int, validation_loss: float | None) -> None:
        """Add a checkpoint, then remove those that are not kept.

        Args:
            save: writes its files to an empty folder.
            step: optimiser steps done.
            validation_loss: see :class:`Checkpoint`.

        Raises:
            StorageError: it cannot be written.
        """
        name = f"step-{step:08d}-{uuid.uuid4().hex[:8]}"
        with tempfile.TemporaryDirectory() as temporary:
            save(Path(temporary))
            files = sorted(path for path in Path(temporary).rglob("*") if path.is_file())
            digests = {path.relative_to(temporary).as_posix(): storage.sha256_hex(path) for path in files}
            storage.upload_dir(temporary, storage.join(self._uri, name))
        record = Checkpoint(name, step, validation_loss, digests)
        storage.write_bytes(storage.join(self._uri, name, RECORD_FILE), json.dumps(asdict(record), indent=2).encode())
        self._prune()

    def _prune(self) -> None:
        """Remove what is older than the latest ones and not the best, and what was left unfinished before them."""
        complete = self.complete()
        best = _best_of(complete)
        kept = {checkpoint.name for checkpoint in complete[-self._keep :]} | {best.name if best else ""}
        latest = complete[-1].name.rpartition("-")[0]
        for name in self._names():
            if name in kept or name.rpartition("-")[0] >= latest:
                continue
            # First, so that a removal that is cut short leaves no checkpoint behind.
            storage.delete(storage.join(self._uri, name, RECORD_FILE))
            storage.delete_dir(storage.join(self._uri, name))

    def _record(self, name: str) -> Checkpoint | None:
        uri = storage.join(self._uri, name, RECORD_FILE)
        try:
            return Checkpoint(**json.loads(storage.read_text(uri)))
        except storage.ObjectNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            _logger.warning("%s is damaged and passed over: %s", uri, error)
            return None

    def _names(self) -> list[str]:
        try:
            entries = storage.listdir(self._uri)
        except storage.ObjectNotFoundError:
            return []
        return [entry.rstrip("/") for entry in entries if entry.startswith("step-") and entry.endswith("/")]


def _best_of(complete: Sequence[Checkpoint]) -> Checkpoint | None:
    return min(
        (checkpoint for checkpoint in complete if checkpoint.validation_loss is not None),
        key=lambda checkpoint: (checkpoint.validation_loss, checkpoint.step),
        default=None,
    )


class CheckpointWriter:
    """Writes checkpoints while the training goes on, one at a time."""

    def __init__(self, store: CheckpointStore):
        self._store = store
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failed_in_a_row = 0

    def write(self, save: Callable[[], Callable[[Path], None]], step: int, validation_loss: float | None) -> None:
        """Wait for the one before, then begin to write another one.

        Args:
            save: makes the copy that is written; called at once.
            step: optimiser steps done.
            validation_loss: see :class:`Checkpoint`.

        Raises:
            StorageError: too many could not be written.
        """
        self._join()
        if self._error is not None:
            if self._failed_in_a_row > UPLOADS_THAT_MAY_FAIL:
                raise self._error
            _logger.warning("a checkpoint could not be written, the next one is due: %s", self._error)
        copy = save()
        self._thread = threading.Thread(
            target=self._run, args=(copy, step, validation_loss), name="lipflow-checkpoint", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Wait for the last one.

        Raises:
            StorageError: it could not be written.
        """
        self._join()
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self, save: Callable[[Path], None], step: int, validation_loss: float | None) -> None:
        try:
            self._store.write(save, step, validation_loss)
        except Exception as error:
            self._error = error
            self._failed_in_a_row += 1
        else:
            self._error, self._failed_in_a_row = None, 0
