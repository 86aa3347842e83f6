"""A stack's folder: what it holds, which ports were chosen, and the keys that were drawn for it.

::

    stack.env         variables for those who use the stack, with its S3 keys     mode 0600
    ray-token         the token of its Ray cluster                                mode 0600
    stack.json        ports, and the processes that run
    objects/          the S3 server's buckets
    mlflow.db         the MLflow server's database
    logs/             a file for each server
    ray/              Ray's own files and logs, unless the path is too long for a socket's name
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.services.processes import ServerProcess
from lipflow.errors import LipflowError

ENV_FILE = "stack.env"
TOKEN_FILE = "ray-token"
RECORD_FILE = "stack.json"

LONGEST_RAY_FOLDER = 38
"""Characters. Ray adds 65 for its sockets, and the name of a socket has at most 107."""


class StackError(LipflowError):
    """A stack that cannot be started, stopped or read."""


@dataclass(frozen=True)
class Credentials:
    """What the stack's servers ask for; drawn once for a folder."""

    s3_key_id: str
    s3_secret: str
    ray_token: str

    @classmethod
    def drawn(cls) -> Credentials:
        """New ones."""
        return cls(secrets.token_hex(10), secrets.token_hex(20), secrets.token_hex(32))


@dataclass(frozen=True)
class StackRecord:
    """What ``stack.json`` holds; no secrets.

    Attributes:
        mark: random; all processes of the stack carry it in their environment.
        bucket: on the S3 server.
        ports: by their names.
        ray_folder: where Ray keeps its files.
        servers: the processes that were started; none after ``stack down``.
    """

    mark: str
    ray_folder: str
    bucket: str
    ports: Mapping[str, int] = field(default_factory=dict)
    servers: tuple[ServerProcess, ...] = ()


def open_record(folder: Path) -> StackRecord | None:
    """The record in ``folder``; None if there is no stack yet.

    Raises:
        StackError: it cannot be read.
    """
    path = folder / RECORD_FILE
    try:
        stored = json.loads(path.read_text())
        servers = tuple(ServerProcess(**entry) for entry in stored["servers"])
        return StackRecord(stored["mark"], stored["ray_folder"], stored["bucket"], stored["ports"], servers)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StackError(
            f"{path} cannot be read ({error}): end its processes by hand (`ps`), and remove the file"
        ) from error


def new_record(folder: Path, bucket: str) -> StackRecord:
    """The record of a stack that never ran."""
    ray_folder = folder / "ray"
    if len(str(ray_folder)) > LONGEST_RAY_FOLDER:
        # Ray opens its folder to everybody; the one above stays this user's own.
        ray_folder = Path(tempfile.mkdtemp(prefix="lf-ray-"), "ray")
    return StackRecord(mark=secrets.token_hex(16), ray_folder=str(ray_folder), bucket=bucket)


def save_record(folder: Path, record: StackRecord) -> None:
    """Write the record; it is there whole or not at all."""
    path = folder / RECORD_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(record), indent=2))
    partial.replace(path)


def make_folder(folder: Path) -> None:
    """Make the folder and its rooms, for this user alone.

    Raises:
        StackError: that is not possible.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for room in ("objects", "logs"):
            (folder / room).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StackError(f"{folder} cannot hold a stack ({error.strerror}): choose another --folder") from error


def load_credentials(folder: Path) -> Credentials:
    """Those of an earlier start in ``folder``, else new ones."""
    variables = read_env_file(folder / ENV_FILE)
    token = folder / TOKEN_FILE
    if {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= variables.keys() and token.is_file():
        return Credentials(
            variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"], token.read_text().strip()
        )
    return Credentials.drawn()


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a file that a shell can read; empty without such a file."""
    if not path.is_file():
        return {}
    assignments = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    pairs = (line.partition("=") for line in assignments)
    return {name: "".join(shlex.split(value)) for name, _, value in pairs}


def write_env_file(path: Path, variables: Mapping[str, str]) -> None:
    """Write variables for ``set -a; . FILE``, readable by this user alone."""
    lines = ["# The stack's addresses and keys, for: set -a; . FILE; set +a"]
    lines += [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    write_private(path, "\n".join([*lines, ""]))


def write_private(path: Path, text: str) -> None:
    """Write a file that nobody else can read, at no moment."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)
