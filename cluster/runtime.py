"""Ray as the jobs use it: one way to start or join a cluster, bounded idempotent tasks, progress bars."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import RayError, RayTaskError
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cluster.command import console
from cluster.ports import LOOPBACK, free_port
from lipflow.errors import LipflowError

OBJECT_STORE_BYTES = 512 * 2**20
"""For a cluster of our own on one machine; tasks pass settings and records, never pixels."""

FEWEST_CPUS = 2
"""A cluster of our own offers at least as many, so that two training workers start even on a single core."""

PROGRESS_LINE_EVERY_S = 60.0
"""How often a map with a note tells its progress to a file or pipe."""

CANCEL_WAIT_S = 30.0
"""How long cancelled tasks are waited for."""


class ClusterError(LipflowError):
    """A Ray cluster that cannot be reached, or a task that it could not finish."""


@contextmanager
def ray_cluster(*, dashboard: bool = False) -> Iterator[None]:
    """Join the cluster of ``RAY_ADDRESS`` (set inside a Ray job), else start one on this machine's loopback.

    A cluster that was started here is stopped at the end; nested calls share the outermost one.

    Args:
        dashboard: start one with its dashboard, without which Ray Train does not give back the CPUs of a training
            that is ended from outside, as a sweep does.

    Raises:
        ClusterError: ``RAY_ADDRESS`` names a cluster that does not answer.
    """
    if ray.is_initialized():
        yield
        return
    debug = os.environ.get("LIPFLOW_DEBUG") == "1"
    quiet: dict[str, Any] = {
        "log_to_driver": debug,
        "logging_level": logging.INFO if debug else logging.ERROR,
    }
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, RayError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ClusterError(
                f"no Ray cluster at RAY_ADDRESS={address}: {reason}; start one, correct the address or the token, "
                "or unset it to run on this machine"
            ) from error
    else:
        with _own_cluster():
            ray.init(
                address="local",
                num_cpus=max(FEWEST_CPUS, os.cpu_count() or 1),
                include_dashboard=dashboard,
                dashboard_host=LOOPBACK,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address=LOOPBACK,
                **quiet,
            )
    # Ray prints what happens to nodes and workers on standard output, whatever it is told of logs: results go there.
    with redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _own_cluster() -> Iterator[None]:
    """How a cluster that is started inside listens, and what its processes know of it.

    Ray takes an address of loopback for the machine's own one, outside of desktop systems, and listens on all
    interfaces then: who reaches them may run code here, since such a cluster has no token.

    Its address is in the environment of all its processes, since Ray's state API, which Ray Train's cleaner of
    placement groups asks, otherwise looks for *any* cluster on the machine and fails where there are two: the CPUs of
    a sweep's stopped trials would then never come free.
    """
    port = free_port()
    chosen = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"{LOOPBACK}:{port}"}
    before, replaced = {name: os.environ.get(name) for name in chosen}, ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(chosen)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = replaced
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def progress_bar(*, eta: bool = True) -> Progress:
    """A progress display on standard error; on a file or pipe it prints only what has ended.

    Args:
        eta: whether the remaining time is shown. It follows from the last half hour: tasks may take minutes each.
    """
    remaining = (TextColumn("eta"), TimeRemainingColumn()) if eta else ()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *remaining,
        TextColumn("{task.fields[note]}"),
        console=console,
        speed_estimate_period=1800,
    )


def map_tasks(
    function: Callable[..., Any],
    arguments: Sequence[tuple],
    *,
    description: str,
    cpus_per_task: float = 1.0,
    max_in_flight: int | None = None,
    stop_when: Callable[[Any], bool] | None = None,
    receive: Callable[[Any], Any] | None = None,
    note: Callable[[], str] | None = None,
) -> list[Any]:
    """Run ``function(*arguments[i])`` as Ray tasks and return the results in order.

    A task whose worker or node dies is run again, so ``function`` must be idempotent. The first error ends the
    whole map; what is still queued is cancelled.

    Args:
        function: importable on the workers.
        arguments: one tuple a task.
        description: what the progress bar says.
        cpus_per_task: what Ray reserves for each.
        max_in_flight: tasks submitted at once; by default four for each CPU that the cluster has by then.
        stop_when: called with each result as it comes; once it is true no further task is submitted, and the results
            of those that were not are None.
        receive: called with each result as it comes; what it returns is kept in its place. So what is large can be
            reduced at once.
        note: what the progress says in place of the remaining time that follows from the number of tasks. Where
            standard error is no terminal, a line with it is printed every minute.

    Raises:
        LipflowError: whatever error of ours a task raised.
        ClusterError: a task was lost more often than Ray retries.
    """
    remote = ray.remote(num_cpus=cpus_per_task, max_retries=4)(function)
    results: list[Any] = [None] * len(arguments)
    index_of: dict[ray.ObjectRef, int] = {}
    waiting = iter(enumerate(arguments))
    with progress_bar(eta=note is None) as progress:
        bar = progress.add_task(description, total=len(arguments), note="")
        exhausted, finished = False, 0
        next_line_s = time.monotonic() + PROGRESS_LINE_EVERY_S
        while index_of or not exhausted:
            # Asked again and again: an autoscaler adds nodes for the tasks that wait, so the number of both grows.
            limit = max_in_flight or max(4, 4 * int(ray.cluster_resources().get("CPU", 1)))
            while not exhausted and len(index_of) < limit:
                item = next(waiting, None)
                if item is None:
                    exhausted = True
                else:
                    index_of[remote.remote(*item[1])] = item[0]
            if not index_of:
                break
            done, _ = ray.wait(list(index_of), num_returns=1, timeout=0.5)
            for reference in done:
                index = index_of.pop(reference)
                try:
                    results[index] = ray.get(reference)
                except RayError as error:
                    for pending in index_of:
                        ray.cancel(pending, force=False)
                    # So that none of them writes anything after this function was left.
                    if index_of:
                        ray.wait(list(index_of), num_returns=len(index_of), timeout=CANCEL_WAIT_S)
                    raise unwrapped(error) from error
                exhausted = exhausted or (stop_when is not None and stop_when(results[index]))
                if receive is not None:
                    results[index] = receive(results[index])
                finished += 1
                progress.update(bar, advance=1, note=note() if note is not None else "")
            if note is not None and not console.is_terminal and time.monotonic() >= next_line_s:
                next_line_s += PROGRESS_LINE_EVERY_S
                console.print(f"{description}: {finished} of {len(arguments)}, {note()}", highlight=False)
    return results


def unwrapped(error: BaseException) -> BaseException:
    """The error of ours inside Ray's, or a :class:`ClusterError`; other errors come back as they are."""
    cause: BaseException | None = error
    while cause is not None:
        # First: Ray derives its error from ours as well, with the remote traceback for a message.
        if isinstance(cause, RayTaskError):
            if isinstance(cause.cause, LipflowError):
                return cause.cause
        elif isinstance(cause, LipflowError):
            return cause
        cause = cause.__cause__
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):
        return ClusterError(f"a task was lost and could not be repeated: {str(error).splitlines()[0]}")
    return error
