"""The same capture and recipe give the same set to the byte, however many workers write it and in whichever order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster import shard as shard_job
from cluster.runtime import map_tasks
from cluster.shard import ShardRecipe, shard
from pipeline.sharding.shards import ShardConfig, write_shards

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

CLUSTER_CPUS = 2
CONFIG = ShardConfig(frames_per_shard=1, codec="webp")
ORDERS: dict[str, Callable[[int], list[int]]] = {
    "planned": lambda count: list(range(count)),
    "reversed": lambda count: list(reversed(range(count))),
    "shuffled": lambda count: random.Random(7).sample(range(count), count),
}


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def of_one_process(shards, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the set as one process writes it, shard after shard."""
    folder = tmp_path_factory.mktemp("one-process")
    write_shards(shards.capture, CONFIG, str(folder))
    return _bytes_of(folder)


@pytest.mark.parametrize(("workers", "order"), [(1, "reversed"), (2, "shuffled"), (3, "shuffled"), (3, "planned")])
def test_the_job_writes_the_same_bytes_with_any_number_of_workers_in_any_order(
    shards, of_one_process: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, order: str
):
    """So many tasks fit on the cluster at once; statistics, which are sums of floats, are among the files."""
    submitted: list[int] = []

    def reordered(function: Callable[..., Any], arguments: Sequence[tuple], **settings: Any) -> list[Any]:
        places = ORDERS[order](len(arguments))
        submitted.extend(places)
        cpus_per_task = int(100 * CLUSTER_CPUS / workers) / 100
        chosen = [arguments[place] for place in places]
        results = map_tasks(function, chosen, cpus_per_task=cpus_per_task, **settings)
        return [results[places.index(place)] for place in range(len(places))]

    monkeypatch.setattr(shard_job, "map_tasks", reordered)
    summary = shard(shards.capture, str(tmp_path / "out"), ShardRecipe(shard=CONFIG, tracking=shards.tracking))
    assert summary.shards_written == len(submitted) == 12
    assert _bytes_of(tmp_path / "out") == of_one_process
    assert "normalization.npz" in of_one_process
