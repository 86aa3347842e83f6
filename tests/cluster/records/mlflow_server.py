"""A real MLflow server on loopback that can be killed and started again on the same port and store."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from cluster.ports import free_port
from tests.processes import kill_family

START_S = 240.0
"""It takes 25 s on an idle machine."""


class MlflowServer:
    """``mlflow server`` over SQLite in ``folder``.

    Attributes:
        uri: the tracking URI.
    """

    def __init__(self, folder: Path):
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._folder = folder
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        # The server's own client settings must not be those that the tests' client has set.
        environment.pop("MLFLOW_TRACKING_URI", None)
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=self._folder, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.uri}/health", timeout=5).ok:
                    return
            time.sleep(0.2)
        self.kill()
        raise RuntimeError(f"the MLflow server did not start: {self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        """SIGKILL to it and to all that it started."""
        if self._process is not None:
            kill_family(self._process)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """A running server, killed at the end."""
    server = MlflowServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
