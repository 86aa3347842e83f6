"""A Ray cluster of several nodes on this machine, one of which can die as a machine does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.ports import free_port
from tests.processes import kill_family

RAY = str(Path(sys.executable).parent / "ray")
START_ATTEMPTS = 5

_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Ray refuses nodes on loopback otherwise.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    # A node that is gone is noticed within seconds instead of half a minute.
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
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add(self) -> None:
        """Start one more node."""
        self.nodes.append(_started([f"--address={self.address}", "--num-cpus=1"], self.folder))

    def kill(self, number: int) -> None:
        """SIGKILL to everything of a node: its raylet, its agents and its workers."""
        kill_family(self.nodes.pop(number))

    def environment(self) -> dict[str, str]:
        """Of a driver on this cluster."""
        return os.environ | _SETTINGS | {"RAY_ADDRESS": self.address}


@contextmanager
def ray_nodes(folder: Path, count: int) -> Iterator[RayNodes]:
    """A cluster of a head and ``count`` nodes; logs go to ``folder``."""
    # Unix sockets have short names; pytest's folders are too deep for them.
    temporary = tempfile.mkdtemp(prefix="lf-nodes-")
    port = free_port()
    options = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={temporary}"]
    head = _started(options, folder)
    cluster = RayNodes(f"127.0.0.1:{port}", folder)
    try:
        for _ in range(count):
            cluster.add()
        yield cluster
    finally:
        for node in [*cluster.nodes, head]:
            kill_family(node)
        shutil.rmtree(temporary, ignore_errors=True)


def _started(options: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """``ray start``, once it says that it has; on a busy machine its own half minute may be too short."""
    command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats", *options]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--object-store-memory={128 * 2**20}"]
    for _ in range(START_ATTEMPTS):
        log = folder / f"node-{time.monotonic_ns()}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | _SETTINGS, cwd=folder)
        while process.poll() is None:
            if b"Ray runtime started" in log.read_bytes():
                return process
            time.sleep(0.1)
    raise RuntimeError(f"{command} did not start: {log.read_text()[-2000:]}")
