"""Servers as processes that outlive the command that started them, and that are ended whole.

A process is known by its id *and* the moment it started, so that an id that the system gave to somebody else is
never touched. What servers start in turn is found as their descendants and, where a parent has died first, by a
random mark that all of them inherit in their environment.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK_VARIABLE = "LIPFLOW_STACK_ID"
STARTED_WITHIN_S = 2.0
"""How far two readings of the same process's start may lie apart: the system's clock is set now and then."""

TERMINATE_WAIT_S = 20.0
KILL_WAIT_S = 20.0


@dataclass(frozen=True)
class ServerProcess:
    """A server that was started.

    Attributes:
        name: of the server.
        pid: of the process above all of its own.
        started_s: when that process started, seconds since 1970.
        log: the file with its output.
    """

    name: str
    pid: int
    started_s: float
    log: str


def start(
    name: str, arguments: Sequence[str], environment: Mapping[str, str], *, folder: Path, log: Path
) -> ServerProcess:
    """Start a server that lives on when this process ends, and that Ctrl-C does not reach.

    Args:
        name: of the server.
        arguments: its command line; no secret may stand there, everybody on the machine can read it.
        environment: all of its variables.
        folder: its working folder.
        log: a file that its output is appended to.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
    return ServerProcess(name, process.pid, psutil.Process(process.pid).create_time(), str(log))


def running(server: ServerProcess) -> psutil.Process | None:
    """The server's process, if it is there and is still the one that was started."""
    try:
        process = psutil.Process(server.pid)
        if abs(process.create_time() - server.started_s) > STARTED_WITHIN_S:
            return None
        return process if _is_alive(process) else None
    except psutil.NoSuchProcess:
        return None


def family(servers: Sequence[ServerProcess], mark: str) -> list[psutil.Process]:
    """The servers' processes, all that descend from them, and all other processes of ours that carry ``mark``."""
    found = {process for server in servers if (process := running(server)) is not None}
    for process in list(found):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.update(process.children(recursive=True))
    for process in psutil.process_iter():
        # Those of other users cannot be read, and are not ours.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK_VARIABLE) == mark:
                found.add(process)
    return [process for process in found if process.pid != os.getpid() and _is_alive(process)]


def end(servers: Sequence[ServerProcess], mark: str) -> int:
    """End the servers and all that they started: a request first, then force; returns how many processes it took."""
    everything = set(family(servers, mark))
    for server in servers:
        process = running(server)
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
    heads = [process for server in servers if (process := running(server)) is not None]
    _wait_until_ended(heads, TERMINATE_WAIT_S)
    everything.update(family(servers, mark))
    for process in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            # psutil checks that the id still belongs to the process that was found.
            process.kill()
    _wait_until_ended(everything, KILL_WAIT_S)
    return len(everything)


def _wait_until_ended(processes: Iterable[psutil.Process], timeout_s: float) -> None:
    """psutil's own wait takes a process for alive that has ended but that nobody asked about, as in containers."""
    deadline = time.monotonic() + timeout_s
    while any(_is_alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
