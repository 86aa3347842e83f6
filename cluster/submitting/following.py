"""A job's log on the submitter's terminal, through lost connections and Ctrl-C."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

from cluster.command import console
from cluster.runtime import ClusterError
from cluster.submitting.jobs import JobEnd, Jobs

RECONNECT_WAIT_S = 1.0
OUTAGE_S = 300.0
"""How long a cluster may be out of reach while a log is followed."""


class Follower:
    """Follows one job."""

    def __init__(self, jobs: Jobs, name: str, write: Callable[[str], None]) -> None:
        self._jobs, self._name, self._write = jobs, name, write
        self._written = 0

    def follow(self) -> JobEnd | None:
        """Write the log until the job has ended; None if the user left it running.

        Ctrl-C on a terminal asks whether to stop the job. Elsewhere the first one says what a second one does: it
        leaves the job, which goes on.

        Raises:
            ClusterError: the cluster was out of reach for too long.
        """
        interrupts, terminal = 0, sys.stdin.isatty()
        while True:
            try:
                if interrupts and terminal:
                    interrupts = 0
                    if self._asked_to_leave():
                        break
                elif interrupts:
                    _say(f"{self._name} goes on; Ctrl-C again leaves it; {self._jobs.how_to_stop(self._name)}")
                return self._until_ended()
            except KeyboardInterrupt:
                # No more than this: another one may come while something is said.
                interrupts += 1
                if interrupts > 1:
                    break
        _say(
            f"{self._name} goes on. Follow it: {self._jobs.how_to_follow(self._name)}; "
            f"stop it: {self._jobs.how_to_stop(self._name)}"
        )
        return None

    def _until_ended(self) -> JobEnd:
        from aiohttp import ClientError

        last_answer_s = time.monotonic()
        while True:
            try:
                asyncio.run(self._tail())
                end = self._jobs.end_of(self._name)
                if end is not None:
                    return end
                last_answer_s = time.monotonic()
            except (ClusterError, ClientError, RuntimeError, OSError) as error:
                if time.monotonic() - last_answer_s > OUTAGE_S:
                    raise ClusterError(
                        f"the cluster at {self._jobs.address} has not answered for {OUTAGE_S:g} s ({error}); the job "
                        f"may still run: {self._jobs.how_to_follow(self._name)}"
                    ) from error
            time.sleep(RECONNECT_WAIT_S)

    async def _tail(self) -> None:
        """Write what was not written yet: each connection tells the log from its beginning."""
        seen = 0
        async for text in self._jobs.log(self._name):
            known = max(0, self._written - seen)
            seen += len(text)
            if seen > self._written:
                self._written = seen
                self._write(text[known:])

    def _asked_to_leave(self) -> bool:
        """Ask on the terminal; another Ctrl-C there leaves the job."""
        try:
            answer = console.input(f"\n{self._name}: stop it (s), leave it running (l), or follow on (enter)? ")
        except (KeyboardInterrupt, EOFError):
            return True
        if answer.strip().lower().startswith("s"):
            self._jobs.stop(self._name)
            _say(f"{self._name} was asked to stop; its last lines follow")
        return answer.strip().lower().startswith("l")


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
