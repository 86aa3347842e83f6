"""What versions were measured to do: an evaluation's scores live in its run, and a version's one tag leads there.

The tag is written in one request, so that a version has the evaluation before or the new one, and never a mix. Scores
are the artifact ``evaluation/scores.json`` of the run, the document that :mod:`cluster.scores.sheet` reads; from it
versions are promoted and compared without running anything again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.records.card import update_card
from cluster.records.registry import (
    AvatarVersion,
    RegistryError,
    find_version,
    parse_model_uri,
    registry_errors,
    run_of,
)
from cluster.records.run import Run, store_errors
from cluster.records.tracking import KIND_TAG, PARENT_RUN_TAG, TrackingConfig, latest_run, open_client
from cluster.scores.sheet import SCORES_FILE, ScoreSheet, parse_scores

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

EVALUATION_TAG = "lipflow.evaluation"
EVALUATION_FOLDER = "evaluation"


@dataclass(frozen=True)
class RecordedEvaluation:
    """What a version's tag says of its last evaluation.

    Attributes:
        run_id: the run that measured.
        shards_digest: of the shard set.
        metrics: flat ones.
    """

    run_id: str
    shards_digest: str
    metrics: dict[str, float]


def log_scores(run: Run, sheet: ScoreSheet) -> None:
    """Keep the scores in the evaluation's run, for :func:`find_scores`."""
    run.log_text(sheet.to_json(), f"{EVALUATION_FOLDER}/{SCORES_FILE}")


def record_evaluation(model: AvatarVersion, run: Run, *, metrics: Mapping[str, float], shards_digest: str) -> None:
    """Tell of a version what the evaluation ``run`` measured on the shard set ``shards_digest``; replaces the last one.

    Raises:
        RegistryError: the registry refused.
    """
    found = RecordedEvaluation(run.run_id, shards_digest, {key: float(value) for key, value in metrics.items()})
    with registry_errors(model.name):
        run.client.set_model_version_tag(model.name, model.version, EVALUATION_TAG, json.dumps(asdict(found)))
        update_card(run.client, model.name, model.version, run.run_id, shards_digest, found.metrics)


def recorded_evaluation(version: ModelVersion) -> RecordedEvaluation | None:
    """The last evaluation of a version; None if it had none."""
    text = version.tags.get(EVALUATION_TAG)
    return None if text is None else RecordedEvaluation(**json.loads(text))


def version_scores(client: MlflowClient, version: ModelVersion, called: str) -> ScoreSheet:
    """The scores of a version's last evaluation, under the name ``called``.

    Raises:
        RegistryError: it was not evaluated, or its evaluation's run is gone.
    """
    found = recorded_evaluation(version)
    if found is None:
        raise RegistryError(
            f"version {version.version} of model {version.name!r} was not evaluated: "
            f"run lipflow evaluate models:/{version.name}/{version.version} SHARDS"
        )
    return _run_scores(client, found.run_id, called)


def find_scores(model: str, config: TrackingConfig, name: str | None = None) -> ScoreSheet:
    """The scores of the evaluation that a URI leads to; nothing is run again.

    Args:
        model: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``: its last evaluation. ``runs:/ID`` of an evaluation,
            or of a training: the newest evaluation that grew out of it.
        config: the tracking store.
        name: instead of the sheet's own.

    Raises:
        RegistryError: there is no such version or run, or no evaluation of it.
    """
    client = open_client(config)
    if model.startswith("models:/"):
        version = find_version(client, *parse_model_uri(model))
        return version_scores(client, version, name or f"{version.name}/{version.version}")
    run_id = run_of(model)
    with registry_errors(model):
        tags = client.get_run(run_id).data.tags
    if tags.get(KIND_TAG) == "evaluate":
        return _run_scores(client, run_id, name)
    evaluation = latest_run(config, "evaluate", {PARENT_RUN_TAG: run_id})
    if evaluation is None:
        raise RegistryError(
            f"{model} is no evaluation, and none grew out of it: run lipflow evaluate {model} SHARDS, or give the run "
            "of an evaluation"
        )
    return _run_scores(client, evaluation, name)


def _run_scores(client: MlflowClient, run_id: str, name: str | None) -> ScoreSheet:
    from mlflow.exceptions import MlflowException

    place = f"{EVALUATION_FOLDER}/{SCORES_FILE}"
    with tempfile.TemporaryDirectory() as folder, store_errors(client.tracking_uri):
        try:
            known = {item.path for item in client.list_artifacts(run_id, EVALUATION_FOLDER)}
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            known = set()
        if place not in known:
            raise RegistryError(f"there is no {place} of run {run_id}: evaluate the avatar again")
        text = Path(client.download_artifacts(run_id, place, folder)).read_text()
    return parse_scores(text, f"{place} of run {run_id}", name)


__all__ = [
    "EVALUATION_TAG",
    "RecordedEvaluation",
    "find_scores",
    "log_scores",
    "record_evaluation",
    "recorded_evaluation",
    "version_scores",
]
