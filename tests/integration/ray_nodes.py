"""A Ray cluster of several nodes on this machine, one of which can die as a machine does."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).parent / "ray")
START_WITHIN_S = 180

# Of the head's GCS: a node that is gone is noticed within seconds instead of half a minute.
_SOON_NOTICED = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "6",
}


@dataclass
class RayNodes:
    """A head without CPUs, on which drivers run, and nodes with one CPU each.

    Attributes:
        address: for ``RAY_ADDRESS``.
        nodes: their processes, the oldest first.
    """

    address: str
    folder: Path
    temporary: str
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add(self) -> None:
        """Start one more node; it joins within seconds."""
        self.nodes.append(self._start([f"--address={self.address}", "--num-cpus=1"]))

    def kill(self, number: int) -> None:
        """SIGKILL to everything of a node: its raylet, its agents and its workers."""
        _kill(self.nodes.pop(number))

    def environment(self) -> dict[str, str]:
        """Of a driver on this cluster."""
        return os.environ | {"RAY_ADDRESS": self.address, "OMP_NUM_THREADS": "1"}

    def _start(self, options: list[str], **settings: str) -> subprocess.Popen[bytes]:
        command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats", *options]
        command += [f"--dashboard-agent-listen-port={_free_port()}", f"--object-store-memory={128 * 2**20}"]
        with (self.folder / f"node-{time.monotonic_ns()}.log").open("wb") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", **settings}
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=self.folder)


@contextmanager
def ray_nodes(folder: Path, count: int) -> Iterator[RayNodes]:
    """A cluster of a head and ``count`` nodes; logs go to ``folder``."""
    # Unix sockets have short names; pytest's folders are too deep for them.
    temporary = tempfile.mkdtemp(prefix="lf-nodes-")
    port = _free_port()
    cluster = RayNodes(f"127.0.0.1:{port}", folder, temporary)
    options = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={temporary}"]
    head = cluster._start(options, **_SOON_NOTICED)
    try:
        _wait_until_open(port, head)
        for _ in range(count):
            cluster.add()
        yield cluster
    finally:
        for node in [*cluster.nodes, head]:
            _kill(node)
        shutil.rmtree(temporary, ignore_errors=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    family = [psutil.Process(process.pid)] if process.poll() is None else []
    family += [child for parent in family for child in parent.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(timeout=30)
    psutil.wait_procs(family, timeout=30)


def _free_port() -> int:
    """One outside 10002..19999, from which Ray serves its workers."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if not 10002 <= port <= 19999:
            return port


def _wait_until_open(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{process.args} did not start")
