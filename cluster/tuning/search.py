"""Which trials are run, and which go on: Optuna's TPE and ASHA behind Ray Tune's two interfaces.

Both are functions of the ledger. A proposal is drawn by a sampler that is seeded with (seed, trial number) and told
every record of the ledger; ASHA's rungs are filled by replaying the reports of earlier submissions. So a resumed sweep
goes on as one that was never interrupted, and no state of theirs is stored.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cluster.training.micro_batches import seed_of
from cluster.tuning.ledger import FINAL, Ledger, TrialRecord
from cluster.tuning.recipe import TuneRecipe
from cluster.tuning.space import Space, Value, base_point

if TYPE_CHECKING:
    from optuna import Study

TIME = "step"
"""What ASHA measures progress by: Tune's own count of reports starts again when a trial is restarted."""

FAILURE = "failure"
"""Reported by a trial that raised an error: :class:`Failure` as JSON, since Tune flattens dictionaries."""

STARTUP_TRIALS = 8
"""Trials that are drawn uniformly before TPE has enough to go by."""


def study_of(records: Iterable[TrialRecord], space: Space, *, at_step: int | None = None) -> Study:
    """An Optuna study, in memory, that knows the records.

    A stopped trial is a pruned one with its reports, which TPE ranks below all that got further; a failed one is
    pruned without any. Records outside the space, as the base recipe may be, cannot be told and are left out.

    Args:
        records: of the ledger.
        space: of the sweep.
        at_step: take each trial's loss at this step for its result, and leave out those that have none; None: the
            loss of completed trials.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    distributions = {key: dimension.distribution() for key, dimension in space.items()}
    states = optuna.trial.TrialState
    for record in records:
        if not all(dimension.holds(record.values[key]) for key, dimension in space.items()):
            continue
        loss = record.loss if at_step is None else record.loss_at(at_step)
        finite = loss is not None and math.isfinite(loss)
        if at_step is not None and not finite:
            continue
        reports = {step: value for step, value in record.reports if math.isfinite(value)}
        ended = states.COMPLETE if finite else states.PRUNED
        state = ended if finite or record.state in FINAL else states.RUNNING
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=loss if finite else None,
                params={key: dimension.coded(record.values[key]) for key, dimension in space.items()},
                distributions=distributions,
                intermediate_values=reports,
            )
        )
    return study


def propose(records: Iterable[TrialRecord], space: Space, seed: int, number: int) -> dict[str, Value]:
    """The searched settings of trial ``number``: a function of the arguments alone."""
    import optuna

    study = study_of(records, space)
    with warnings.catch_warnings():
        # Its arguments of several parameters and of running trials are marked as experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True, seed=seed_of(seed, number) % 2**32
        )
    drawn = study.ask({key: dimension.distribution() for key, dimension in space.items()}).params
    return {key: dimension.decoded(drawn[key]) for key, dimension in space.items()}


class LedgerSearch(Searcher):
    """Hands out what the ledger has left unfinished, then new proposals.

    Args:
        ledger: of the sweep.
        recipe: of the sweep.
    """

    def __init__(self, ledger: Ledger, recipe: TuneRecipe) -> None:
        super().__init__(metric=recipe.metric, mode="min")
        self._ledger = ledger
        self._recipe = recipe
        self._unfinished = [record.number for record in ledger.in_state("running", "lost")]
        self._numbers: dict[str, int] = {}

    @property
    def remaining(self) -> int:
        """Trials to be run in this submission."""
        return max(0, self._recipe.trials - len(self._ledger.records)) + len(self._unfinished)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial's ``number``, ``folder`` and ``recipe``."""
        if self._unfinished:
            record = self._ledger.restart(self._unfinished.pop(0))
        else:
            number = len(self._ledger.records)
            space = self._recipe.searched
            values = base_point(self._recipe.train, space)
            if number > 0:
                values = propose(self._ledger.all(), space, self._recipe.seed, number)
            record = self._ledger.add(number, values)
        self._numbers[trial_id] = record.number
        return {
            "number": record.number,
            "folder": self._ledger.folder(record.number),
            "recipe": self._recipe.trial(record.values).model_dump(mode="json"),
        }

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note a trial whose processes died too often; all else is noted by :class:`LedgerHalving`."""
        number = self._numbers[trial_id]
        if error and self._ledger.records[number].state == "running":
            self._ledger.lose(number, "its processes died")

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles the search to restore it later, which never happens."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Ray Tune wants a file; nothing is read from it."""
        Path(checkpoint_path).write_text("the state of the search is the ledger\n")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""


@dataclass(frozen=True)
class Failure:
    """Why a trial ended.

    Attributes:
        error: the message.
        final: whether it would come again.
    """

    error: str
    final: bool


@dataclass(frozen=True)
class _Known:
    """A trial as ASHA knows it: by a name that is the same in every submission."""

    trial_id: str


class LedgerHalving(FIFOScheduler):
    """ASHA by training steps, over the reports of all submissions; writes the ledger.

    The base recipe's trial is never stopped: its loss at every step is what the others are compared with.

    Args:
        ledger: of the sweep; its reports are replayed.
        recipe: of the sweep.
        reported: called with each record that has a new report, has been stopped or has ended.
    """

    def __init__(self, ledger: Ledger, recipe: TuneRecipe, reported: Callable[[TrialRecord], None]) -> None:
        super().__init__()
        self._ledger = ledger
        self._recipe = recipe
        self._reported = reported
        self._asha = ASHAScheduler(
            time_attr=TIME,
            metric=recipe.metric,
            mode="min",
            max_t=recipe.trial_steps,
            grace_period=recipe.grace_steps,
            reduction_factor=recipe.reduction_factor,
            stop_last_trials=False,
        )
        self._seen: set[int] = set()
        for record in ledger.all():
            for step, loss in record.reports:
                self._decide(record.number, step, loss)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """CONTINUE, or STOP for one that is not among the best at its rung."""
        number = trial.config["number"]
        record = self._ledger.records[number]
        if FAILURE in result:
            failure = Failure(**json.loads(result[FAILURE]))
            note = self._ledger.fail if failure.final else self._ledger.lose
            self._reported(note(number, failure.error))
        elif TIME in result and self._recipe.metric in result and record.state == "running":
            step, loss = result[TIME], result[self._recipe.metric]
            if not math.isfinite(loss) and number > 0:
                self._reported(self._ledger.fail(number, f"the validation loss is {loss} at step {step}"))
                return TrialScheduler.STOP
            # A trial that was restarted may report a step again.
            if step > record.last_step:
                decision = self._decide(number, step, loss)
                self._reported(self._ledger.report(number, step, loss, stopped=decision == TrialScheduler.STOP))
                return decision
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Note how a trial ended that was not stopped."""
        number = trial.config["number"]
        if self._ledger.records[number].state != "running":
            return
        self._reported(self._ledger.settle(number))

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles the scheduler to restore it later, which never happens."""
        return {}

    def _decide(self, number: int, step: int, loss: float) -> str:
        if not math.isfinite(loss):
            return TrialScheduler.CONTINUE
        known: Any = _Known(str(number))
        controller: Any = None  # which ASHA does not look at
        if number not in self._seen:
            self._seen.add(number)
            self._asha.on_trial_add(controller, known)
        decision = self._asha.on_trial_result(controller, known, {TIME: step, self._recipe.metric: loss})
        # At its last step a trial has used up its budget.
        spared = number == 0 or step >= self._recipe.trial_steps
        return TrialScheduler.CONTINUE if spared else decision
