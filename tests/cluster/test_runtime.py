"""Tasks on Ray: in order, bounded, repeated when a worker dies, ended by the first error of ours."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayTaskError, WorkerCrashedError
from rich.console import Console

from cluster import runtime
from cluster.runtime import ClusterError, map_tasks, ray_cluster, unwrapped
from lipflow.errors import CaptureError, LipflowError


def test_results_come_in_the_order_of_the_arguments(ray_session):
    def later_is_faster(number: int) -> int:
        import time

        time.sleep(0.02 * (5 - number))
        return number * number

    arguments = [(number,) for number in range(6)]
    assert map_tasks(later_is_faster, arguments, description="square", max_in_flight=3) == [0, 1, 4, 9, 16, 25]
    assert map_tasks(later_is_faster, [], description="nothing") == []


def test_results_are_reduced_as_they_come_and_notes_are_printed_where_there_is_no_terminal(
    ray_session, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runtime, "PROGRESS_LINE_EVERY_S", 0.0)
    monkeypatch.setattr(runtime, "console", Console(file=io.StringIO(), width=100))
    seen: list[bytes] = []

    def fill(length: int) -> bytes:
        return bytes(length)

    def receive(body: bytes) -> int:
        seen.append(body)
        return len(body)

    arguments = [(length,) for length in (3, 1, 2)]
    lengths = map_tasks(fill, arguments, description="fill", receive=receive, note=lambda: f"{len(seen)} seen")
    assert lengths == [3, 1, 2]
    assert sorted(seen) == [b"\0", b"\0\0", b"\0\0\0"]
    told = runtime.console.file.getvalue()
    assert [line for line in ("fill: 1 of 3, 1 seen", "fill: 3 of 3, 3 seen") if line not in told] == []


def test_no_task_writes_after_the_map_has_failed(ray_session, tmp_path: Path):
    def work(folder: str, number: int) -> None:
        import time

        if number == 0:
            raise CaptureError("frame 7 is corrupt")
        time.sleep(0.5)
        Path(folder, str(number)).write_text("")

    with pytest.raises(CaptureError):
        map_tasks(work, [(str(tmp_path), number) for number in range(4)], description="work")
    left = sorted(tmp_path.iterdir())
    time.sleep(1.5)
    assert sorted(tmp_path.iterdir()) == left


def test_a_cluster_that_is_joined_already_is_shared_and_stays(ray_session):
    with ray_cluster(), ray_cluster():
        assert ray.is_initialized()
    assert ray.is_initialized()


def test_an_error_of_ours_comes_back_as_itself(ray_session):
    def refuse(number: int) -> int:
        if number == 1:
            raise CaptureError("frame 7 is corrupt")
        return number

    with pytest.raises(CaptureError, match=r"^frame 7 is corrupt$"):
        map_tasks(refuse, [(0,), (1,), (2,)], description="refuse")


def test_a_defect_comes_back_with_its_traceback(ray_session):
    def divide(number: int) -> float:
        return 1 / number

    with pytest.raises(RayTaskError, match="ZeroDivisionError"):
        map_tasks(divide, [(1,), (0,)], description="divide")


def test_a_task_whose_worker_is_killed_is_run_again(ray_session, tmp_path: Path):
    def die_once(folder: str, number: int) -> int:
        marker = Path(folder, str(number))
        if number == 1 and not marker.exists():
            marker.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    arguments = [(str(tmp_path), number) for number in range(3)]
    assert map_tasks(die_once, arguments, description="die once") == [0, 1, 2]
    assert (tmp_path / "1").exists()


def test_the_cause_is_found_below_other_errors_and_a_lost_task_is_one_of_ours():
    ours = LipflowError("bad input")
    outer = RuntimeError("around it")
    outer.__cause__ = ours
    assert unwrapped(outer) is ours
    lost = unwrapped(WorkerCrashedError())
    assert isinstance(lost, ClusterError)
    assert "\n" not in str(lost)
    defect = ValueError("ours to fix")
    assert unwrapped(defect) is defect


OWN_CLUSTER = """
import json, os, psutil, ray
from ray.util.state import list_nodes
from cluster.runtime import ray_cluster
from cluster.services.servers import listening

def asked():
    return os.environ["RAY_ADDRESS"], [node.node_ip for node in list_nodes()]

with ray_cluster(dashboard=True):
    address, nodes = ray.get(ray.remote(asked).remote())
    sockets = listening(psutil.Process().children(recursive=True) + [psutil.Process()])
    own = ray.get_runtime_context().gcs_address
found = {"address": address, "nodes": nodes, "own": own, "sockets": sockets, "left": "RAY_ADDRESS" in os.environ}
print(json.dumps(found))
"""


def test_a_cluster_of_our_own_is_on_loopback_and_its_tasks_find_it_beside_another(ray_head):
    """``ray_head`` is the other one: Ray's state API finds two clusters on this machine, were it not told which."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    told = subprocess.run(
        [sys.executable, "-c", OWN_CLUSTER], env=environment, capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["address"] == found["own"]
    assert found["nodes"] == ["127.0.0.1"]
    assert found["left"] is False
    hosts = {host.removeprefix("::ffff:") for host, _, _ in found["sockets"]}
    assert hosts == {"127.0.0.1"}, found["sockets"]
    assert any(program == "gcs_server" for _, _, program in found["sockets"])
