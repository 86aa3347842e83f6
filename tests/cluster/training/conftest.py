"""One tiny shard set for all trainings of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.training.loop import Training
from tests.cluster.training.training_runs import tiny, write_tiny_shards


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of the set."""
    return write_tiny_shards(tmp_path_factory.mktemp("training"))


@pytest.fixture
def training(tiny_shards: str, tmp_path: Path) -> Callable[..., Training]:
    """A tiny training to an OUT of the given name, with changed settings."""

    def make(out: str, **changes: Any) -> Training:
        return Training(tiny(**changes), tiny_shards, str(tmp_path / out))

    return make
