"""Ports on loopback for servers that are started here."""

from __future__ import annotations

import socket
from collections.abc import Collection

from lipflow.errors import LipflowError

LOOPBACK = "127.0.0.1"
RAY_WORKER_PORTS = range(10002, 20000)
"""From which Ray serves its workers: a server of its own that took one would now and then be in their way."""


def free_port(taken: Collection[int] = ()) -> int:
    """A free port that is not among ``taken``, fit for any server.

    Raises:
        LipflowError: there is none.
    """
    for _ in range(1000):
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = int(probe.getsockname()[1])
        if port not in RAY_WORKER_PORTS and port not in taken:
            return port
    raise LipflowError(f"no free port on {LOOPBACK} outside {RAY_WORKER_PORTS.start} to {RAY_WORKER_PORTS[-1]}")


def is_free(port: int) -> bool:
    """Whether a server could listen on it now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
