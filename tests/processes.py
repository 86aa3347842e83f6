"""Processes that tests start, and that end whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

import psutil


def kill_family(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all that it started, as when a machine dies; Ray's own way of stopping takes 15 s.

    What it started is found as its descendants and, if it leads a process group, in that, should a parent have died.
    """
    family = []
    if process.poll() is None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(timeout=30)
    _, survivors = psutil.wait_procs(family, timeout=30)
    assert not survivors
