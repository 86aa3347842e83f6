"""Tasks on Ray: in order, bounded, repeated when a worker dies, ended by the first error of ours."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

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
