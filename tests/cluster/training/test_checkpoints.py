"""Checkpoints on the storage: complete or not there, the latest and the best kept, written beside the training."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.training import checkpoints
from cluster.training.checkpoints import CheckpointStore, CheckpointWriter, DamagedCheckpointError
from lipflow.errors import StorageError


def content(step: int) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        (folder / "avatar").mkdir()
        (folder / "avatar" / "weights").write_text(f"weights of {step}")
        (folder / "state.pt").write_text(f"state of {step}")

    return save


def read(store: CheckpointStore) -> str | None:
    texts: list[str] = []
    store.read_latest(lambda folder: texts.append((folder / "avatar" / "weights").read_text()))
    return texts[0] if texts else None


@pytest.fixture(params=["local", "s3"])
def out(request, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_server").uri(tmp_path.name)


def test_the_latest_ones_and_the_best_are_kept(out: str):
    store = CheckpointStore(out, keep=2)
    assert (store.complete(), store.best(), read(store)) == ([], None, None)
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.4), (4, None), (5, 0.1), (6, 0.3)):
        store.write(content(step), step, loss)
    assert [checkpoint.step for checkpoint in store.complete()] == [2, 5, 6]
    best = store.best()
    assert best is not None
    assert (best.step, best.validation_loss) == (2, 0.1)
    assert read(store) == "weights of 6"


def test_what_was_left_unfinished_is_never_read_and_goes_when_a_later_one_is_there(tmp_path: Path):
    store = CheckpointStore(str(tmp_path))
    store.write(content(4), 4, 0.5)
    orphan = tmp_path / "checkpoints" / "step-00000006-0rphan00"
    orphan.mkdir()
    content(6)(orphan)
    assert read(store) == "weights of 4"
    store.write(content(5), 5, 0.5)
    assert orphan.exists()
    store.write(content(7), 7, 0.5)
    assert not orphan.exists()
    assert read(store) == "weights of 7"


@pytest.mark.parametrize("harm", ["cut", "other", "gone", "record cut", "record of another kind"])
def test_a_damaged_one_is_passed_over_for_the_one_before(harm: str, tmp_path: Path, caplog):
    store = CheckpointStore(str(tmp_path))
    for step in (1, 2):
        store.write(content(step), step, 0.5)
    folder = tmp_path / "checkpoints" / store.complete()[-1].name
    weights, record = folder / "avatar" / "weights", folder / "checkpoint.json"
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif harm == "other":
        weights.write_text("weights of 3")
    elif harm == "gone":
        weights.unlink()
    elif harm == "record cut":
        record.write_bytes(record.read_bytes()[:20])
    else:
        record.write_text(json.dumps({"step": 3}))
    assert read(store) == "weights of 1"
    assert "passed over" in caplog.text


def test_a_checkpoint_that_is_gone_is_told_by_name(tmp_path: Path):
    store = CheckpointStore(str(tmp_path))
    with pytest.raises(DamagedCheckpointError, match="step-00000001-aa is not there any more"):
        store.read("step-00000001-aa", lambda folder: None)


def test_two_writers_of_one_step_do_not_mix(tmp_path: Path):
    """A worker that was given up may still be writing what its successor writes."""
    store = CheckpointStore(str(tmp_path))

    def slow(folder: Path) -> None:
        (folder / "weights").write_text("of the one that was given up")
        store.write(content(3), 3, 0.25)

    store.write(slow, 3, 0.5)
    assert [checkpoint.step for checkpoint in store.complete()] == [3, 3]
    assert {name for one in store.complete() for name in one.sha256} == {"weights", "avatar/weights", "state.pt"}
    for checkpoint in store.complete():
        store.fetch(checkpoint, tmp_path / "fetched" / checkpoint.name)


def test_the_training_goes_on_while_a_checkpoint_is_written_and_the_copy_is_that_of_its_step(tmp_path: Path):
    store, may_write = CheckpointStore(str(tmp_path)), threading.Event()
    writer, weights = CheckpointWriter(store), {"value": 1}

    def copy() -> Callable[[Path], None]:
        value = weights["value"]

        def save(folder: Path) -> None:
            assert may_write.wait(60)
            content(value)(folder)

        return save

    writer.write(copy, 1, 0.5)
    weights["value"] = 2
    assert store.complete() == []
    may_write.set()
    writer.close()
    assert read(store) == "weights of 1"


def test_one_that_cannot_be_written_costs_a_warning_and_several_the_training(tmp_path: Path, caplog):
    def fails() -> Callable[[Path], None]:
        def save(folder: Path) -> None:
            raise StorageError(f"{folder}: the disk is full")

        return save

    store = CheckpointStore(str(tmp_path))
    writer = CheckpointWriter(store)
    writer.write(fails, 1, 0.5)
    writer.write(lambda: content(2), 2, 0.5)
    writer.close()
    assert "could not be written" in caplog.text
    assert read(store) == "weights of 2"
    for step in range(checkpoints.UPLOADS_THAT_MAY_FAIL + 1):
        writer.write(fails, 3 + step, 0.5)
    with pytest.raises(StorageError, match="disk is full"):
        writer.write(fails, 9, 0.5)
    # The last one has to be there.
    writer = CheckpointWriter(store)
    writer.write(fails, 10, 0.5)
    with pytest.raises(StorageError, match="disk is full"):
        writer.close()
