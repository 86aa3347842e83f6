"""The training loop in plain processes: its result depends neither on the number of workers nor on interruptions."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from cluster.training.checkpoints import CheckpointStore
from cluster.training.loop import Training
from tests.cluster.training.training_runs import (
    LEFT_EARLY,
    Leaves,
    differing,
    end_of,
    largest_difference,
    tiny,
    train_alone,
    train_as_a_ray_worker_does,
    train_together,
)


@pytest.fixture(scope="module")
def undisturbed(tiny_shards: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The end of the tiny training in one go, by one worker."""
    root = tmp_path_factory.mktemp("undisturbed")
    alone = Training(tiny(), tiny_shards, str(root / "out"))
    assert train_alone(alone)[0] == 6
    return end_of(alone, root)


@pytest.mark.slow
def test_two_workers_and_one_end_in_the_same_weights_bit_for_bit(training, undisturbed, tmp_path: Path):
    together = training("together", workers=2)
    train_together(together, 2)
    assert differing(end_of(together, tmp_path), undisturbed) == []


def test_two_workers_that_leave_and_one_that_goes_on_end_in_the_same_weights(training, undisturbed, tmp_path: Path):
    # Only the second worker is asked, at a step after which no checkpoint is due: both leave there.
    interrupted = training("interrupted")
    train_together(interrupted, 2, last_asks_to_leave_after=4)
    left = CheckpointStore(interrupted.out).complete()
    assert [(one.step, one.validation_loss is None) for one in left] == [(3, False), (4, True)]
    steps, reports = train_alone(interrupted)
    assert steps == 6
    assert [report["step"] for report in reports] == [6]
    assert differing(end_of(interrupted, tmp_path), undisturbed) == []


def test_a_process_that_gets_sigterm_leaves_with_a_checkpoint_and_another_one_goes_on(training):
    """A process without Ray; under Ray it is ``tests/integration/test_sigterm.py``."""
    told = training("told", steps=100_000, checkpoint_every_steps=5)
    process = multiprocessing.get_context("spawn").Process(target=train_as_a_ray_worker_does, args=(told,))
    process.start()
    store, deadline = CheckpointStore(told.out), time.monotonic() + 240
    while not store.complete() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(240)
    assert process.exitcode == LEFT_EARLY
    left = store.complete()[-1]
    assert 5 <= left.step < 100_000
    assert (left.validation_loss is None) == (left.step % 5 > 0)
    assert train_alone(told, Leaves(2))[0] == left.step + 2


@pytest.mark.slow
def test_uneven_shares_of_three_micro_batches_differ_by_rounding_alone(training, tmp_path: Path):
    one, two = training("one", micro_batches=3), training("two", micro_batches=3)
    train_alone(one)
    train_together(two, 2)
    ours, theirs = end_of(two, tmp_path / "two-end"), end_of(one, tmp_path / "one-end")
    # 1.4e-5 of the largest weight of a tensor was measured after six steps, with equal validation losses.
    assert largest_difference(ours, theirs) < 3e-4
    # What a tenth more or less comes to by the same measure: 0.47.
    other = training("other", micro_batches=3, learning_rate=1.1e-3)
    train_alone(other)
    assert largest_difference(end_of(other, tmp_path / "other-end"), theirs) > 0.1


def test_a_training_goes_on_bit_for_bit_with_an_average_of_its_weights_in_bfloat16(training, tmp_path: Path):
    settings = {"ema_decay": 0.5, "precision": "bfloat16", "channels_last": True}
    straight, interrupted = training("straight", **settings), training("interrupted", **settings)
    train_alone(straight)
    for steps in (2, 4, 6):
        assert train_alone(interrupted, Leaves(2))[0] == steps
    end = end_of(straight, tmp_path / "straight-end")
    assert differing(end_of(interrupted, tmp_path / "interrupted-end"), end) == []
    # The exported weights are the average, which is no longer where the weights are.
    assert not torch.equal(end["avatar.decoder.texture_fc.weight"], end["weights.decoder.texture_fc.weight"])
    kept = [value for name, value in end.items() if name.startswith(("avatar.", "weights.", "adam."))]
    assert {value.dtype for value in kept if value.is_floating_point()} == {torch.float32}


def test_what_bfloat16_trains_is_close_to_what_float32_does(training, undisturbed, tmp_path: Path):
    rounded = training("rounded", precision="bfloat16")
    train_alone(rounded)
    end = end_of(rounded, tmp_path)
    # They differ by 2e-5 of it.
    assert end["validation_loss"] == pytest.approx(undisturbed["validation_loss"], rel=5e-4)
    assert differing(end, undisturbed) != []


def test_the_average_is_that_of_the_weights_after_each_step(training, tmp_path: Path):
    averaged, expected = training("averaged", ema_decay=0.75, checkpoint_every_steps=1, keep_checkpoints=9), None
    train_alone(averaged)
    store = CheckpointStore(averaged.out)
    for checkpoint in store.complete():
        store.fetch(checkpoint, tmp_path / checkpoint.name)
        saved = torch.load(tmp_path / checkpoint.name / "state.pt", weights_only=True)["weights"]
        expected = saved if expected is None else {
            name: 0.75 * value + 0.25 * saved[name] if value.is_floating_point() else saved[name]
            for name, value in expected.items()
        }  # fmt: skip
    end = end_of(averaged, tmp_path / "end")
    for name, value in expected.items():
        torch.testing.assert_close(end[f"avatar.{name}"], value, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.slow
def test_a_compiled_training_is_close_and_its_checkpoints_have_the_same_names(training, undisturbed, tmp_path: Path):
    compiled = training("compiled", compile=True)
    train_alone(compiled)
    end = end_of(compiled, tmp_path)
    assert end.keys() == undisturbed.keys()
    assert end["validation_loss"] == pytest.approx(undisturbed["validation_loss"], rel=1e-3)


def test_nothing_but_the_damaged_checkpoint_is_lost(training, undisturbed, tmp_path: Path):
    """A folder without a record and one whose weights were cut short are passed over for the one before them."""
    damaged = training("damaged")
    train_alone(damaged, Leaves(3))
    train_alone(damaged, Leaves(2))
    store = CheckpointStore(damaged.out)
    assert [checkpoint.step for checkpoint in store.complete()] == [3, 5]
    latest = Path(damaged.out, "checkpoints", store.complete()[-1].name)
    shutil.copytree(latest, latest.with_name("step-00000006-0rphan00"))
    (latest.with_name("step-00000006-0rphan00") / "checkpoint.json").unlink()
    weights = latest / "avatar" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    steps, reports = train_alone(damaged)
    assert (steps, [report["step"] for report in reports]) == (6, [6])
    assert differing(end_of(damaged, tmp_path), undisturbed) == []
