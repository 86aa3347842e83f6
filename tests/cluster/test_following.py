"""Ctrl-C while a job's log is followed, at moments that a test with real servers cannot choose."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from cluster.submitting import following
from cluster.submitting.following import Follower


class InterruptedJobs:
    """A job whose log is followed until Ctrl-C comes."""

    def how_to_stop(self, name: str) -> str:
        return f"stop {name}"

    def how_to_follow(self, name: str) -> str:
        return f"follow {name}"

    async def log(self, name: str) -> AsyncIterator[str]:
        yield f"{name} works"
        raise KeyboardInterrupt


def test_a_second_ctrl_c_that_comes_while_the_first_is_answered_leaves_the_job_and_says_how_to_follow(
    monkeypatch: pytest.MonkeyPatch,
):
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(following, "_say", say)
    log: list[str] = []
    assert Follower(InterruptedJobs(), "long", log.append).follow() is None
    assert log == ["long works"]
    assert said == [
        "long goes on; Ctrl-C again leaves it; stop long",
        "long goes on. Follow it: follow long; stop it: stop long",
    ]
