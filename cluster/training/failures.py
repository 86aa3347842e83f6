"""Errors of workers: which end a training at once, and what the submitter is told of them."""

from __future__ import annotations

from typing import Any

from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError

from lipflow.errors import LipflowError


class FailAtOnce(UserCallback):
    """Ends a training whose workers raised an error of ours: the same one would come again after every restart.

    It runs in Ray Train's controller, which never repeats after an error of its own. Lost workers and errors that
    are not ours are left to ``max_failures``.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first error of ours, if there is one."""
        for error in map(_raised_by_worker, worker_exceptions.values()):
            if isinstance(error, LipflowError):
                raise error


def worker_error(error: TrainingFailedError) -> BaseException:
    """What ended the training: the error that :class:`FailAtOnce` raised, or the first worker's, or ``error``."""
    if isinstance(error, ControllerError):
        return error.controller_failure
    if isinstance(error, WorkerGroupError):
        return next(map(_raised_by_worker, error.worker_failures.values()), error)
    return error


def _raised_by_worker(error: BaseException) -> BaseException:
    """What the training function raised; Ray Train offers no public way out of its wrapper."""
    return getattr(error, "_base_exc", error)
