"""What Ray Tune runs for a trial: a training job like any other, which reports to the sweep."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from cluster.records.redaction import redact_text
from cluster.train import train
from cluster.training.recipe import TrainRecipe
from cluster.tuning.search import FAILURE, Failure
from lipflow.errors import ConfigError
from lipflow.losses import NonFiniteLossError, PosteriorCollapseError

FINAL_ERRORS = (NonFiniteLossError, PosteriorCollapseError, ConfigError)
"""What a training with these settings would raise again."""


def run_trial(config: dict[str, Any]) -> None:
    """Train one trial, or go on with it.

    Args:
        config: ``shards``; ``folder`` of the trial; ``recipe``, a :class:`TrainRecipe` as a dictionary; and
            ``parent_run``, the sweep's MLflow run.
    """
    try:
        train(
            config["shards"],
            config["folder"],
            TrainRecipe.model_validate(config["recipe"]),
            callbacks=[TuneReportCallback()],
            parent_run=config["parent_run"],
        )
    except Exception as error:
        # As a report, not as an error of Tune's: those are pickles and long tracebacks.
        message = f"{type(error).__name__}: {' '.join(redact_text(str(error)).split())}"
        failure = Failure(message, isinstance(error, FINAL_ERRORS))
        tune.report({FAILURE: json.dumps(asdict(failure))})
