"""A stack: up, down, and what of it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from cluster.command import console
from cluster.ports import LOOPBACK, RAY_WORKER_PORTS, free_port, is_free
from cluster.records.redaction import redact_text
from cluster.services import folder as stack_folder
from cluster.services.folder import Credentials, StackError, StackRecord
from cluster.services.processes import ServerProcess, end, running, start
from cluster.services.servers import PORTS, Server, StackConfig, client_variables, plan_servers

POLL_S = 0.25
LOG_LINES_SHOWN = 6


@dataclass(frozen=True)
class ServerState:
    """One server as it is now.

    Attributes:
        name: of the server.
        address: where it answers.
        pid: of its process; None if it does not run.
        problem: what is wrong with it; None if it is well.
    """

    name: str
    address: str
    pid: int | None
    problem: str | None


@dataclass(frozen=True)
class StackState:
    """A stack as it is now.

    Attributes:
        folder: of the stack.
        env_file: the variables of its users.
        bucket: on its S3 server.
        dashboard: of its Ray cluster, where jobs are submitted.
        servers: in the order in which they were started.
        started: whether this call started any.
    """

    folder: str
    env_file: str
    bucket: str
    dashboard: str
    servers: tuple[ServerState, ...]
    started: bool

    @property
    def well(self) -> bool:
        """Whether all servers run and answer."""
        return all(server.pid is not None and server.problem is None for server in self.servers)


def stack_up(folder: Path, config: StackConfig) -> StackState:
    """Start what does not run yet, one server after the other, each waited for.

    If one fails, or this process is interrupted, all of the stack ends: nothing stays half up.

    Raises:
        StackError: a server did not start, with the last lines of its log; a port is taken; the folder is unusable.
    """
    folder = folder.absolute()
    stack_folder.make_folder(folder)
    with _locked(folder):
        record = stack_folder.open_record(folder) or stack_folder.new_record(folder, config.bucket)
        alive = {server.name for server in record.servers if running(server) is not None}
        if not alive:
            # Whatever a killed server left behind would hold its ports.
            end(record.servers, record.mark)
            record = replace(record, bucket=config.bucket, ports=_ports(record.ports, config), servers=())
            Path(record.ray_folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            stack_folder.save_record(folder, record)
        credentials = stack_folder.load_credentials(folder)
        stack_folder.write_private(folder / stack_folder.TOKEN_FILE, credentials.ray_token)
        stack_folder.write_env_file(folder / stack_folder.ENV_FILE, client_variables(folder, record.ports, credentials))
        servers = plan_servers(folder, record, credentials, config)
        try:
            for server in servers:
                if server.name not in alive:
                    _start(folder, server, config.start_timeout_s, credentials)
        except BaseException:
            _end_all(folder)
            raise
        return _state(folder, servers, started=len(alive) < len(servers))


def stack_down(folder: Path) -> int:
    """End all processes of the stack; returns how many there were. Its data, keys and ports stay.

    Raises:
        StackError: there is no stack in ``folder``.
    """
    folder = folder.absolute()
    _known(folder)
    with _locked(folder):
        return _end_all(folder)


def stack_status(folder: Path) -> StackState:
    """What of the stack runs and answers.

    Raises:
        StackError: there is no stack in ``folder``.
    """
    folder = folder.absolute()
    record = _known(folder)
    credentials = stack_folder.load_credentials(folder)
    return _state(folder, plan_servers(folder, record, credentials, StackConfig()), started=False)


def _start(folder: Path, server: Server, timeout_s: float, credentials: Credentials) -> None:
    """Start one server and wait until it is well; it stands in the record as soon as its process is there."""
    log = folder / "logs" / f"{server.name}.log"
    began_at = log.stat().st_size if log.exists() else 0
    process = start(server.name, server.arguments, server.environment, folder=folder, log=log)
    record = _known(folder)
    others = tuple(other for other in record.servers if other.name != server.name)
    stack_folder.save_record(folder, replace(record, servers=(*others, process)))
    try:
        with console.status(f"starting {server.name}"):
            _wait_until_well(server, process, timeout_s)
    except StackError as error:
        lines = _last_lines(log, began_at, credentials)
        raise StackError(f"{error}; its log {log} ends: {lines or 'nothing was written'}") from error


def _end_all(folder: Path) -> int:
    record = _known(folder)
    ended = end(record.servers, record.mark)
    stack_folder.save_record(folder, replace(record, servers=()))
    return ended


def _wait_until_well(server: Server, process: ServerProcess, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    problem: str | None = "not asked yet"
    while time.monotonic() < deadline:
        if running(process) is None:
            raise StackError(f"the server {server.name} ended while it was starting at {server.address}")
        problem = server.problem()
        if problem is None:
            return
        time.sleep(POLL_S)
    raise StackError(
        f"the server {server.name} did not answer at {server.address} within {timeout_s:g} s: "
        f"{redact_text(str(problem))}"
    )


def _last_lines(log: Path, began_at: int, credentials: Credentials) -> str:
    with log.open("rb") as file:
        file.seek(began_at)
        text = file.read().decode(errors="replace")
    for secret in (credentials.s3_key_id, credentials.s3_secret, credentials.ray_token):
        text = text.replace(secret, "[redacted]")
    lines = [line.strip() for line in redact_text(text).splitlines() if line.strip()]
    return " | ".join(lines[-LOG_LINES_SHOWN:])


def _state(folder: Path, servers: tuple[Server, ...], *, started: bool) -> StackState:
    record = _known(folder)
    pids = {process.name: process.pid for process in record.servers if running(process) is not None}
    states = tuple(
        ServerState(
            server.name,
            server.address,
            pids.get(server.name),
            server.problem() if server.name in pids else "does not run",
        )
        for server in servers
    )
    return StackState(
        folder=str(folder),
        env_file=str(folder / stack_folder.ENV_FILE),
        bucket=record.bucket,
        dashboard=f"http://{LOOPBACK}:{record.ports['dashboard']}",
        servers=states,
        started=started,
    )


def _known(folder: Path) -> StackRecord:
    record = stack_folder.open_record(folder)
    if record is None:
        raise StackError(f"there is no stack in {folder}: start one with `lipflow stack up --folder {folder}`")
    return record


def _ports(kept: Mapping[str, int], config: StackConfig) -> dict[str, int]:
    """Ports that are free now: those of the recipe, else those of the last start, else any.

    Raises:
        StackError: a port of the recipe is taken, or one that Ray cannot have.
    """
    chosen: dict[str, int] = {}
    for name in PORTS:
        stated = getattr(config, f"{name}_port", None)
        if stated is not None:
            if name in ("ray", "dashboard") and stated in RAY_WORKER_PORTS:
                raise StackError(f"{name}_port {stated}: Ray gives 10002 to 19999 to its workers; choose another")
            if not is_free(stated):
                raise StackError(f"{name}_port {stated} is taken on {LOOPBACK}: choose another, or null for a free one")
            chosen[name] = stated
            continue
        last = kept.get(name)
        chosen[name] = last if last is not None and is_free(last) else free_port(set(chosen.values()))
    return chosen


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise StackError(f"another `lipflow stack` is at work in {folder}: wait for it") from error
