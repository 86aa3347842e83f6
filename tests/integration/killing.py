"""The end of a job as when its machine dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

import psutil


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the whole group, and to what Ray put into groups of its own, as when a machine dies."""
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(timeout=30)
    _, survivors = psutil.wait_procs(family, timeout=15)
    assert not survivors
