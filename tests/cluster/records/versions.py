"""Versions with nothing but an evaluation, which is all that the gate reads; scores of eight held-out frames."""

from __future__ import annotations

from cluster.records.evaluations import log_scores, record_evaluation
from cluster.records.registry import CHALLENGER, AvatarVersion, find_version
from cluster.records.tracking import TrackingConfig, open_client, tracked_run
from cluster.scores.sheet import ScoreSheet
from tests.cluster.score_sheets import scores_of, sheet_of

FRAMES = tuple(f"S/{number:06d}" for number in range(8))


def driven(mse: float, rmse_mm: float = 1.0, **others) -> ScoreSheet:
    """Driven by headset views, with the same errors in every frame."""
    rows = scores_of("hmc", 20, dict.fromkeys(FRAMES, mse), dict.fromkeys(FRAMES, rmse_mm), **others)
    return sheet_of("lipflow", rows, held_out_frames=FRAMES)


def add_version(config: TrackingConfig, name: str, sheet: ScoreSheet | None = None) -> str:
    """The number of a new version and challenger, evaluated by ``sheet``."""
    with tracked_run("train", "train", config=config) as training:
        client = training.client
        if not [model for model in client.search_registered_models() if model.name == name]:
            client.create_registered_model(name)
        # Servers take no other local folder than the run's.
        source = f"{client.get_run(training.run_id).info.artifact_uri}/avatar"
        created = client.create_model_version(name, source, training.run_id)
        version = AvatarVersion(name, str(created.version), training.run_id)
        client.set_registered_model_alias(name, CHALLENGER, version.version)
    if sheet is not None:
        evaluate_version(config, version, sheet)
    return version.version


def evaluate_version(config: TrackingConfig, version: AvatarVersion, sheet: ScoreSheet) -> str:
    """The id of an evaluation's run with these scores, recorded as the version's."""
    with tracked_run("evaluate", "evaluate", config=config, parent_run=version.run_id) as run:
        log_scores(run, sheet)
        metrics = {"fitted.geometry_rmse_mm": sheet.scores[0].geometry_rmse_mm}
        record_evaluation(version, run, metrics=metrics, shards_digest=sheet.shards_digest)
    return run.run_id


def champion(config: TrackingConfig, name: str) -> str:
    return str(find_version(open_client(config), name, "champion").version)
