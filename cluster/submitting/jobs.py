"""A job on a Ray cluster, from its submission to its exit code."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.runtime import ClusterError
from lipflow.errors import ConfigError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
NO_AGENT_WAIT_S = 120.0


@dataclass(frozen=True)
class Job:
    """What is submitted.

    Attributes:
        entrypoint: its shell command.
        submission_id: its name; None: Ray makes one.
        runtime_env: for Ray.
        metadata: kept in the job's record.
    """

    entrypoint: str
    submission_id: str | None
    runtime_env: Mapping[str, Any]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        submission_id: its name.
        status: SUCCEEDED, FAILED or STOPPED.
        exit_code: of its process, 128 + N if signal N ended it; 1 if it had none.
        message: what Ray says about it.
    """

    submission_id: str
    status: str
    exit_code: int
    message: str


class Jobs:
    """The jobs of one cluster.

    Attributes:
        address: where its dashboard answers.
    """

    def __init__(self, client: JobSubmissionClient) -> None:
        self._client = client
        self.address: str = client.get_address()

    @classmethod
    def at(cls, address: str | None) -> Jobs:
        """Those of the cluster at ``address``, else at ``RAY_API_SERVER_ADDRESS`` or ``RAY_ADDRESS``.

        Raises:
            ConfigError: no address is known.
            ClusterError: nobody answers there, or the token is refused.
        """
        address = address or os.environ.get(ADDRESS_VARIABLE) or os.environ.get("RAY_ADDRESS")
        if not address:
            raise ConfigError(
                "no cluster to submit to: give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS "
                "(`lipflow stack up` starts a cluster on this machine)"
            )
        # Ray lets the variable win over what its client is given.
        os.environ[ADDRESS_VARIABLE] = address
        from ray.job_submission import JobSubmissionClient

        # Its notes of uploads and connections, which Ray shows by default.
        if os.environ.get("LIPFLOW_DEBUG") != "1":
            for module in ("dashboard_sdk", "job.sdk"):
                logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        with _cluster_errors(address):
            return cls(JobSubmissionClient(address))

    def submit(self, job: Job) -> tuple[str, bool]:
        """Submit ``job``; returns its name and whether it is new.

        A job of that name that still runs is not submitted a second time. One that has ended is submitted again,
        with ``-2``, ``-3`` ... at the end of its name, since Ray takes each name once.

        Raises:
            ConfigError: a job of that name runs another command.
            ClusterError: the cluster refuses.
        """
        name = job.submission_id
        if name is not None:
            name, running = self._free_name(name)
            if running is not None:
                if running.entrypoint != job.entrypoint:
                    raise ConfigError(
                        f"--submission-id {name}: a job of that name runs another command "
                        f"({running.entrypoint}); choose another name, or stop it: {self.how_to_stop(name)}"
                    )
                return name, False
        deadline = time.monotonic() + NO_AGENT_WAIT_S
        while True:
            try:
                with _cluster_errors(self.address):
                    return (
                        self._client.submit_job(
                            entrypoint=job.entrypoint,
                            submission_id=name,
                            runtime_env=dict(job.runtime_env),
                            metadata=dict(job.metadata),
                        ),
                        True,
                    )
            except ClusterError as error:
                # A head that has only just come up asks to try again.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def log(self, name: str) -> AsyncIterator[str]:
        """The log of a job from its beginning, as it comes, until the job or the connection has ended."""
        return self._client.tail_job_logs(name)

    def end_of(self, name: str) -> JobEnd | None:
        """How a job ended; None while it has not.

        Raises:
            ClusterError: the cluster does not answer.
        """
        with _cluster_errors(self.address):
            details = self._client.get_job_info(name)
        return _end(name, details) if details.status.is_terminal() else None

    def stop(self, name: str) -> None:
        """Ask a job to end.

        Raises:
            ClusterError: the cluster refuses.
        """
        with _cluster_errors(self.address):
            self._client.stop_job(name)

    def how_to_follow(self, name: str) -> str:
        """The command that follows a job's log."""
        return f"ray job logs --follow --address {self.address} {name}"

    def how_to_stop(self, name: str) -> str:
        """The command that stops a job."""
        return f"ray job stop --address {self.address} {name}"

    def _free_name(self, wished: str) -> tuple[str, JobDetails | None]:
        """``wished`` or what follows it, and the job of that name if it still runs."""
        with _cluster_errors(self.address):
            known = {job.submission_id: job for job in self._client.list_jobs()}
        for name in _numbered(wished):
            job = known.get(name)
            if job is None or not job.status.is_terminal():
                return name, job
        raise AssertionError("names do not end")


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def _end(name: str, details: JobDetails) -> JobEnd:
    succeeded = details.status.value == "SUCCEEDED"
    code = details.driver_exit_code or 1
    # Ended by a signal: as a shell says it.
    exit_code = 0 if succeeded else code if code > 0 else 128 - code
    return JobEnd(name, details.status.value, exit_code, " ".join((details.message or "").split()))


@contextmanager
def _cluster_errors(address: str) -> Iterator[None]:
    """What Ray's client raises, as one line of ours."""
    from ray.exceptions import RayError
    from requests import RequestException

    try:
        yield
    except (RayError, RuntimeError, ValueError, RequestException, OSError) as error:
        reason = " ".join(str(error).split())
        if any(word in reason for word in ("401", "403", "uthenticat", "token", "nauthorized")):
            raise ClusterError(
                f"the Ray cluster at {address} refused: {reason[:300]}; set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to its token"
            ) from error
        raise ClusterError(f"the Ray cluster at {address} refused: {reason[:300]}; correct --address") from error
