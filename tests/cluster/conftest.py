"""One MLflow store for all tests of this folder: a fresh database takes five seconds to make."""

from __future__ import annotations

import pytest

from cluster.records.tracking import TrackingConfig, initialise


@pytest.fixture(scope="session")
def tracking_config(tmp_path_factory) -> TrackingConfig:
    config = TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db")
    initialise(config)
    return config
