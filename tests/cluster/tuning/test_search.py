"""The search and the halving are functions of the ledger: interrupted or not, they say the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import TrialScheduler

from cluster.training.recipe import TrainRecipe
from cluster.tuning.ledger import Ledger, SweepError, TrialRecord
from cluster.tuning.recipe import TuneRecipe
from cluster.tuning.search import LedgerHalving, LedgerSearch, propose, study_of
from lipflow.config import AvatarConfig
from pipeline import storage

GRACE, BUDGET = 10, 80


def recipe(**changes: Any) -> TuneRecipe:
    settings = {"trials": 12, "trial_steps": BUDGET, "grace_steps": GRACE, "reduction_factor": 2}
    return TuneRecipe(train=TrainRecipe(warmup_steps=5), **(settings | changes))


def halving(ledger: Ledger, sweep: TuneRecipe) -> LedgerHalving:
    return LedgerHalving(ledger, sweep, lambda record: None)


def reporting(scheduler: LedgerHalving, number: int, step: int, loss: float) -> str:
    trial: Any = SimpleNamespace(config={"number": number}, trial_id=f"of-this-submission-{number}")
    return scheduler.on_trial_result(None, trial, {"step": step, "val_loss": loss})


def test_proposals_depend_on_the_records_the_seed_and_the_number_alone():
    sweep = recipe()
    space = sweep.searched
    records = [
        TrialRecord(
            number,
            propose([], space, 7, number),
            state="completed",
            reports=((GRACE, 2.0), (BUDGET, 1.0 + number / 10)),
            loss=1.0 + number / 10,
        )
        for number in range(12)
    ]
    again = [propose([], space, 7, number) for number in range(12)]
    assert [record.values for record in records] == again
    assert propose(records, space, 7, 12) == propose(records, space, 7, 12)
    assert propose(records, space, 7, 12) != propose(records, space, 8, 12)
    assert propose(records, space, 7, 12) != propose(records, space, 7, 13)
    # What is learned counts: other losses, another proposal.
    turned = [TrialRecord(r.number, r.values, r.state, r.reports, 3.0 - (r.loss or 0)) for r in records]
    assert propose(records, space, 7, 12) != propose(turned, space, 7, 12)


def test_the_search_goes_where_losses_are_low():
    sweep = recipe(space={"learning_rate": {"kind": "uniform", "low": 0.001, "high": 1.0}})
    records: list[TrialRecord] = []
    for number in range(40):
        values = propose(records, sweep.searched, 0, number)
        loss = (float(values["learning_rate"]) - 0.3) ** 2  # type: ignore[arg-type]
        records.append(TrialRecord(number, values, "completed", ((BUDGET, loss),), loss))
    late = [abs(float(record.values["learning_rate"]) - 0.3) for record in records[20:]]  # type: ignore[arg-type]
    # Uniform draws have a mean distance of 0.29; measured here: 0.07.
    assert sum(late) / len(late) < 0.15


def test_a_stopped_trial_is_no_result_of_its_early_loss():
    """Ray's own wrapper tells Optuna the loss of an early step as if the trial had ended with it."""
    sweep = recipe()
    values = propose([], sweep.searched, 0, 1)
    stopped = TrialRecord(0, values, "stopped", ((GRACE, 0.1),))
    failed = TrialRecord(1, values, "failed", error="NonFiniteLossError")
    running = TrialRecord(2, values)
    states = [trial.state.name for trial in study_of([stopped, failed, running], sweep.searched).trials]
    assert states == ["PRUNED", "PRUNED", "RUNNING"]


def test_a_base_recipe_outside_the_space_is_left_out_of_the_study():
    sweep = recipe(space={"learning_rate": {"kind": "uniform", "low": 0.5, "high": 1.0}})
    base = TrialRecord(0, {"learning_rate": 1e-3}, "completed", ((BUDGET, 1.0),), 1.0)
    assert study_of([base], sweep.searched).trials == []
    assert 0.5 <= float(propose([base], sweep.searched, 0, 1)["learning_rate"]) <= 1.0  # type: ignore[arg-type]


def test_unfinished_trials_come_first_and_none_is_lost_or_doubled(tmp_path: Path):
    sweep = recipe(trials=6)
    first = LedgerSearch(Ledger(str(tmp_path)), sweep)
    handed = [first.suggest(f"a{index}") for index in range(4)]
    assert first.remaining == 2
    assert [item and item["number"] for item in handed] == [0, 1, 2, 3]
    assert handed[0] is not None
    assert handed[0]["recipe"] == sweep.trial({}).model_dump(mode="json")
    ledger = Ledger.load(str(tmp_path))
    ledger.report(1, GRACE, 9.0, stopped=True)
    ledger.fail(3, "NonFiniteLossError: no")

    second = LedgerSearch(Ledger.load(str(tmp_path)), sweep)
    assert second.remaining == 4
    again = [second.suggest(f"b{index}") for index in range(4)]
    assert [item and item["number"] for item in again] == [0, 2, 4, 5]
    assert again[1] == handed[2]


def test_a_trial_that_is_lost_twice_has_failed(tmp_path: Path):
    ledger = Ledger(str(tmp_path))
    ledger.add(0, {})
    assert ledger.lose(0, "a machine went away").state == "lost"
    ledger = Ledger.load(str(tmp_path))
    ledger.restart(0)
    assert ledger.lose(0, "and again").state == "failed"
    assert Ledger.load(str(tmp_path)).records == ledger.records


def test_halving_stops_the_worse_and_spares_the_base_and_the_last_step(tmp_path: Path):
    sweep = recipe()
    ledger = Ledger(str(tmp_path))
    for number in range(4):
        ledger.add(number, {})
    scheduler = halving(ledger, sweep)
    assert reporting(scheduler, 1, GRACE, 1.0) == TrialScheduler.CONTINUE
    assert reporting(scheduler, 2, GRACE, 2.0) == TrialScheduler.STOP
    # Worse than all, but what the others are compared with.
    assert reporting(scheduler, 0, GRACE, 5.0) == TrialScheduler.CONTINUE
    assert ledger.records[2].state == "stopped"
    assert ledger.records[0].state == "running"
    for step in range(2 * GRACE, BUDGET, GRACE):
        reporting(scheduler, 1, step, 0.5)
        reporting(scheduler, 3, step, 0.4)
    assert reporting(scheduler, 3, BUDGET, 0.1) == TrialScheduler.CONTINUE
    assert reporting(scheduler, 1, BUDGET, 7.0) == TrialScheduler.CONTINUE


def test_a_loss_that_is_no_number_ends_a_trial_and_never_wins(tmp_path: Path):
    ledger = Ledger(str(tmp_path))
    for number in range(3):
        ledger.add(number, {})
    assert reporting(halving(ledger, recipe()), 1, GRACE, math.nan) == TrialScheduler.STOP
    assert ledger.records[1].state == "failed"
    for number, loss in ((0, math.nan), (2, 3.0)):
        storage.write_bytes(f"{ledger.folder(number)}/train.json", json.dumps({"validation_loss": loss}).encode())
        ledger.settle(number)
    assert ledger.winner().number == 2


def test_a_reported_error_ends_a_trial_for_good_or_for_now(tmp_path: Path):
    ledger = Ledger(str(tmp_path))
    ledger.add(0, {})
    ledger.add(1, {})
    scheduler = halving(ledger, recipe())
    for number, final in ((0, True), (1, False)):
        trial: Any = SimpleNamespace(config={"number": number})
        result = {"failure": json.dumps({"error": "why", "final": final})}
        scheduler.on_trial_result(None, trial, result)
        scheduler.on_trial_complete(None, trial, result)
    assert [record.state for record in ledger.all()] == ["failed", "lost"]
    assert ledger.records[0].error == "why"


reports = st.lists(
    st.tuples(st.integers(1, 5), st.floats(0.1, 10.0)),
    min_size=1,
    max_size=30,
)


SWEEP = recipe()


@settings(max_examples=40, deadline=None)
@given(events=reports, cut=st.integers(0, 30))
def test_a_halving_that_was_interrupted_decides_as_one_that_was_not(tmp_path_factory, events, cut: int):
    """ASHA's rungs are replayed from the ledger, under names that outlive a submission."""
    whole, parted = (Ledger(str(tmp_path_factory.mktemp("ledger"))) for _ in range(2))
    for ledger in (whole, parted):
        for number in range(6):
            ledger.add(number, {})
    steps = dict.fromkeys(range(6), 0)
    undisturbed, interrupted = halving(whole, SWEEP), halving(parted, SWEEP)
    for index, (number, loss) in enumerate(events):
        if index == cut:
            parted = Ledger.load(parted.out_uri)
            interrupted = halving(parted, SWEEP)
        if whole.records[number].state != "running" or steps[number] == BUDGET:
            continue
        steps[number] += GRACE
        expected = reporting(undisturbed, number, steps[number], loss)
        assert reporting(interrupted, number, steps[number], loss) == expected
    assert Ledger.load(parted.out_uri).records == whole.records


def test_a_step_that_is_reported_again_after_a_restart_counts_once(tmp_path: Path):
    ledger = Ledger(str(tmp_path))
    ledger.add(0, {})
    scheduler = halving(ledger, recipe())
    for loss in (1.0, 1.5):
        reporting(scheduler, 0, GRACE, loss)
    assert ledger.records[0].reports == ((GRACE, 1.0),)


@pytest.mark.parametrize("method", ["dam", "lipflow"])
def test_every_proposal_is_a_legal_training(method: str):
    sweep = TuneRecipe(train=TrainRecipe(avatar=AvatarConfig(method=method)))  # type: ignore[arg-type]
    for number in range(1, 20):
        sweep.trial(propose([], sweep.searched, 3, number))


def test_a_sweep_without_a_result_names_the_first_failure(tmp_path: Path):
    ledger = Ledger(str(tmp_path))
    for number in range(3):
        ledger.add(number, {})
        ledger.fail(number, f"NonFiniteLossError: image at step {number}")
    with pytest.raises(SweepError, match=r"3 of 3 failed; the first, trial 0: NonFiniteLossError: image at step 0"):
        ledger.winner()


def test_a_sweep_with_lost_trials_is_not_finished(tmp_path: Path):
    ledger = Ledger(str(tmp_path))
    ledger.add(0, {})
    ledger.add(1, {})
    storage.write_bytes(f"{ledger.folder(0)}/train.json", json.dumps({"validation_loss": 1.0}).encode())
    assert ledger.settle(0).loss == 1.0
    ledger.lose(1, "its processes died")
    with pytest.raises(SweepError, match=r"1 of 2 trials were lost; the first, trial 1: its processes died; run"):
        ledger.winner()


def test_a_trial_that_ended_after_its_last_record_is_completed_when_the_ledger_is_loaded(tmp_path: Path):
    """The submitter may be killed between a training's end and its note of it."""
    ledger = Ledger(str(tmp_path))
    ledger.add(0, {})
    storage.write_bytes(f"{ledger.folder(0)}/train.json", json.dumps({"validation_loss": 1.5}).encode())
    assert Ledger.load(str(tmp_path)).records[0].state == "completed"


def test_a_ledger_on_s3_reads_back(s3_server):
    ledger = Ledger(s3_server.uri("sweeps", "ledger"))
    ledger.add(0, {"learning_rate": 1e-3, "loader.signals": ["hmc"]})
    ledger.report(0, GRACE, 1.5, stopped=False)
    ledger.add(1, {})
    ledger.report(1, GRACE, 2.5, stopped=True)
    assert Ledger.load(ledger.out_uri).records == ledger.records
    assert [record.state for record in ledger.all()] == ["running", "stopped"]
