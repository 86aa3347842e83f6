"""Who may write to the folder of a shard set: one plan, by any number of jobs.

Jobs of the same plan write the same bytes under the same names, so that a second one may join at any time. A job of
another plan is refused: two plans in one folder would mix. A job therefore *claims* the folder before it writes: it
puts an object there whose name holds its plan's fingerprint, and only then looks for claims and shards of other
plans. Of two jobs that start together at least one looks after both claims were written, and gives way; both may.
That takes no lock and no conditional write, which not every S3 server has, only that what was written is listed.

A claim does not expire. A clock cannot tell a dead job from one that is suspended, and the second would go on to
write into a folder that had been given away. A job that was killed before its first shard leaves its claim, which is
no obstacle to the same plan; its message tells whose it was, and what to remove if that job is dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from pydantic import ValidationError

from lipflow.config import StrictConfig
from lipflow.errors import ConfigError, ShardSetError, StorageError
from pipeline import storage
from pipeline.manifest import Manifest, ShardRecord, ShardSetVersionError
from pipeline.sealing import ChecksumError, unseal

STALE_PARTIAL_S = 3600.0
"""A local file of an unfinished shard that was not written to for so long has lost its writer."""

_CLAIM = re.compile(r"^\.job-([0-9a-f]{64})-[0-9a-f]{32}\.json$")
_SHARD_FILE = re.compile(r"^((?:train|val|test)-\d{6,})\.(?:tar|json)$")
_PARTIAL = re.compile(
    r"^\.(?:(?:train|val|test)-\d{6,}\.(?:tar|json)|topology\.npz|normalization\.npz|manifest\.json"
    r"|\.job-[0-9a-f]{64}-[0-9a-f]{32}\.json)\.[0-9a-f]{32}\.partial$"
)
_REMEDY = "give another OUT, remove what lies there, or use the recipe and the capture that it was begun with"


class ShardSidecar(StrictConfig):
    """What lies beside a finished shard until (and after) the commit, so that a second run can trust it."""

    fingerprint: str
    record: ShardRecord


def sidecar_uri(out_uri: str, shard_name: str) -> str:
    """Where the sidecar of a shard lies."""
    return storage.join(out_uri, shard_name.removesuffix(".tar") + ".json")


def read_sidecar(out_uri: str, shard_name: str) -> ShardSidecar | None:
    """The sidecar of a shard; None if there is none that can be used."""
    try:
        uri = sidecar_uri(out_uri, shard_name)
        return ShardSidecar.model_validate_json(unseal(storage.read_bytes(uri), uri))
    except (storage.ObjectNotFoundError, ChecksumError, ValidationError):
        return None


def foreign_plan_error(out_uri: str, name: str) -> ConfigError:
    """The refusal to write beside, or over, something of another plan."""
    return ConfigError(f"{out_uri}: {name} there is of another recipe or capture; {_REMEDY}")


@contextmanager
def claimed(out_uri: str, fingerprint: str, shard_names: Collection[str]) -> Iterator[None]:
    """The folder belongs to this plan, and to no other, within the block.

    The claim is removed at the end; after a block without an error, those of killed jobs of the same plan and their
    unfinished files are, too.

    Args:
        out_uri: the folder of the set.
        fingerprint: of the plan.
        shard_names: of the plan's shards.

    Raises:
        ConfigError: shards or a job of another plan are there; nothing is changed.
        StorageError: the folder cannot be written.
    """
    claim = storage.join(out_uri, f".job-{fingerprint}-{uuid.uuid4().hex}.json")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    body = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    storage.write_bytes(claim, json.dumps(body).encode())
    try:
        check_target(out_uri, fingerprint, shard_names)
        yield
    except BaseException:
        with contextlib.suppress(StorageError):
            storage.delete(claim)
        raise
    remove_leftovers(out_uri, fingerprint)


def remove_leftovers(out_uri: str, fingerprint: str) -> None:
    """Remove what killed jobs of a complete set's plan have left: their claims, and files that lost their writer.

    Raises:
        StorageError: something is there that cannot be removed.
    """
    for name in _names_in(out_uri):
        found = _CLAIM.match(name)
        if found is not None and found[1] == fingerprint:
            storage.delete(storage.join(out_uri, name))
    _remove_stale_partials(out_uri)


def check_target(out_uri: str, fingerprint: str, shard_names: Collection[str]) -> None:
    """Refuse a folder that holds shards or a claim of another plan; changes nothing.

    Raises:
        ConfigError: naming what was found, and what to do.
    """
    names = _names_in(out_uri)
    for name in names:
        claim = _CLAIM.match(name)
        if claim is not None and claim[1] != fingerprint:
            raise ConfigError(_other_job(out_uri, name))
    planned = set(shard_names)
    present = []
    for name in names:
        found = _SHARD_FILE.match(name)
        if found is not None and f"{found[1]}.tar" not in planned:
            raise foreign_plan_error(out_uri, name)
        if found is not None and name.endswith(".json"):
            present.append(f"{found[1]}.tar")
    # One plan alone has ever written here, so that any sidecar tells which.
    for name in present[:1]:
        sidecar = read_sidecar(out_uri, name)
        if sidecar is not None and sidecar.fingerprint != fingerprint:
            raise foreign_plan_error(out_uri, name)
    with contextlib.suppress(ShardSetError):
        try:
            manifest = Manifest.load(out_uri)
        except ShardSetVersionError as error:
            raise ConfigError(f"{error}; {_REMEDY}") from error
        if manifest.fingerprint != fingerprint:
            raise foreign_plan_error(out_uri, "the shard set")


def count_present(out_uri: str, shard_names: Collection[str]) -> int:
    """How many of the shards have a sidecar, by one listing; no digest is compared."""
    names = set(_names_in(out_uri))
    return sum(name in names and f"{name.removesuffix('.tar')}.json" in names for name in shard_names)


def _other_job(out_uri: str, name: str) -> str:
    uri = storage.join(out_uri, name)
    try:
        owner = json.loads(storage.read_bytes(uri))
        who = f"host {owner['host']}, process {owner['pid']}, since {owner['started']}"
    except (storage.ObjectNotFoundError, ValueError, KeyError, TypeError):
        who = "it just ended, or its claim is damaged"
    return (
        f"{out_uri}: a job of another recipe or capture is writing there ({who}); wait for its end, or give another "
        f"OUT. If that job is dead, remove {uri}"
    )


def _names_in(out_uri: str) -> list[str]:
    try:
        return storage.listdir(out_uri)
    except storage.ObjectNotFoundError:
        return []


def _remove_stale_partials(out_uri: str) -> None:
    """On a disk, the unfinished files of killed writers; S3 shows no unfinished upload."""
    if not storage.is_local(out_uri):
        return
    for path in storage.local_path(out_uri).iterdir():
        if _PARTIAL.match(path.name):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_PARTIAL_S:
                    path.unlink()
