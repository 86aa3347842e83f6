"""The one door to MLflow: where runs are kept, and how a job records what it did.

A job opens a run with :func:`tracked_run`. The run carries the recipe (as parameters and as an artifact), the
version of the code, the digest of the shard set and the run it grew out of, so that any number can be traced
back to what made it. A job that fails marks its run FAILED and says why; one that is interrupted, KILLED.

A store that goes away while a job runs does not stop it: metrics wait in memory until it is back. At its end a job
waits ``tracking.wait_s`` for it; then metrics go into files, the run stays without an end, and warnings say so. The
job's result stands all the same.

MLflow takes seconds to import, so it is imported when a run is opened, not when this module is.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from cluster.records.code_version import code_version
from cluster.records.outbox import TrackingError
from cluster.records.redaction import flatten, redact, redact_text
from cluster.records.run import Run, store_errors
from cluster.records.unsent import UnsentMetrics
from lipflow.config import StrictConfig
from lipflow.errors import ConfigError

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

RunKind = Literal["shard", "train", "tune", "evaluate", "fit", "sample", "promote", "demo"]

KIND_TAG = "lipflow.kind"
SHARDS_DIGEST_TAG = "lipflow.shards_digest"
PARENT_RUN_TAG = "lipflow.parent_run"
MODEL_TAG = "lipflow.model"
CODE_VERSION_TAG = "lipflow.code_version"
ERROR_TAG = "lipflow.error"
RECIPE_FILE = "recipe.json"

_RAY_JOB_FOLDER = "/runtime_resources/working_dir_files/"
_SQLITE = "sqlite:///"
_PARAMS_PER_REQUEST = 100
_LONGEST_PARAM = 500
_LONGEST_TAG = 4000
_SERVER_TRIES = 4
_SERVER_TIMEOUT_S = 10.0
_WAIT_AFTER_ERROR_S = 10.0

_logger = logging.getLogger(__name__)


class TrackingConfig(StrictConfig):
    """Where runs and their artifacts are kept.

    Attributes:
        uri: an MLflow tracking URI; None: ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working folder.
        experiment: the experiment that all runs belong to.
        artifact_uri: where a *new* experiment keeps its artifacts, such as ``s3://bucket/artifacts``; None:
            ``LIPFLOW_ARTIFACT_URI``, else ``mlartifacts`` beside the database, or what the server decides.
        wait_s: how long a job waits, at its end, for a store that does not answer.
        most_waiting_metrics: so many wait in memory at most (300 bytes each) while the store does not answer.
        unsent_dir: where ``unsent-metrics/`` goes if metrics could not be sent; None: the job's OUT if it has one, else
            the working folder.
    """

    uri: str | None = None
    experiment: str = "lipflow"
    artifact_uri: str | None = None
    wait_s: float = Field(60.0, ge=0)
    most_waiting_metrics: int = Field(100_000, ge=1000)
    unsent_dir: str | None = None


def resolve_tracking_uri(config: TrackingConfig) -> str:
    """The tracking URI that ``config`` and the environment ask for; SQLite paths become absolute.

    Raises:
        ConfigError: nothing was asked for, and the working folder is a Ray job's own, which Ray deletes.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        folder = Path.cwd()
        if _RAY_JOB_FOLDER in f"{folder.as_posix()}/":
            raise ConfigError(
                f"the runs would be kept in {folder}, which Ray deletes after the job: "
                "set MLFLOW_TRACKING_URI (or tracking.uri) to a server or to a database on a shared disk"
            )
        uri = f"{_SQLITE}mlflow.db"
    if uri.startswith(_SQLITE):
        return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).absolute()}"
    return uri


def initialise(config: TrackingConfig) -> str:
    """Create the database and the experiment where they are missing; returns the tracking URI.

    To be called once before workers start: MLflow's own first use of a fresh database is not safe against a
    concurrent one.

    Raises:
        TrackingError: the store cannot be reached or written.
    """
    uri, _, _ = _open_store(config)
    return uri


def open_client(config: TrackingConfig) -> MlflowClient:
    """An MLflow client of the store, for what this module does not cover.

    Raises:
        TrackingError: the store cannot be reached or written.
    """
    return _open_store(config)[1]


@contextmanager
def tracked_run(
    kind: RunKind,
    name: str,
    *,
    config: TrackingConfig,
    recipe: BaseModel | Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    shards_digest: str | None = None,
    parent_run: str | None = None,
    run_id: str | None = None,
) -> Iterator[Run]:
    """Record what happens inside the ``with`` block as one MLflow run.

    Args:
        kind: the job; becomes the tag ``lipflow.kind``.
        name: the run's name, for people.
        config: where the run is kept.
        recipe: the job's settings; logged as ``recipe.json`` and as flat parameters, without secrets.
        tags: further tags.
        shards_digest: digest of the shard set that is written or read.
        parent_run: id of the run that this one grew out of, e.g. the training of an evaluated avatar.
        run_id: continue this run instead of starting a new one. If the store does not hold it, a new run is
            started and says so in its tag ``lipflow.continues``.

    Raises:
        TrackingError: the store cannot be reached when the run is opened.
    """
    uri, client, experiment_id = _open_store(config)
    all_tags = {KIND_TAG: kind, CODE_VERSION_TAG: code_version()}
    if shards_digest is not None:
        all_tags[SHARDS_DIGEST_TAG] = shards_digest
    if parent_run is not None:
        all_tags |= {PARENT_RUN_TAG: parent_run, "mlflow.parentRunId": parent_run}
    all_tags |= {key: redact_text(value)[:_LONGEST_TAG] for key, value in (tags or {}).items()}

    with store_errors(uri):
        mlflow_run = _find_run(client, run_id) if run_id is not None else None
    if run_id is not None and mlflow_run is None:
        _logger.warning("run %s is not in %s: a new run is started", run_id, redact_text(uri))
        all_tags["lipflow.continues"] = run_id
    with store_errors(uri):
        if mlflow_run is None:
            mlflow_run = client.create_run(experiment_id, run_name=name, tags=all_tags)
        else:
            client.update_run(mlflow_run.info.run_id, status="RUNNING")
        if recipe is not None:
            _log_recipe(client, mlflow_run, recipe)
    run = _run_of(client, mlflow_run.info.run_id, uri, experiment_id, config)
    try:
        yield run
    except (KeyboardInterrupt, SystemExit):
        _close_after_error(run, config, "KILLED", "interrupted")
        raise
    except Exception as error:
        _close_after_error(run, config, "FAILED", f"{type(error).__name__}: {error}")
        raise
    run.close(config.wait_s, take_back=True)
    _set_terminated(run, "FINISHED")


@contextmanager
def attached_run(config: TrackingConfig, run_id: str) -> Iterator[Run]:
    """Log into a run that another process owns, such as a worker into its job's run; its status is untouched.

    A store that is away costs a warning here, too: a worker that starts again goes on without it.

    Raises:
        TrackingError: the store answers, and does not hold the run.
    """
    uri = resolve_tracking_uri(config)
    try:
        uri, client, experiment_id = _open_store(config)
        with store_errors(uri):
            known = _find_run(client, run_id) is not None
    except TrackingError as error:
        _logger.warning("run %s is continued without having been looked up: %s", run_id, error)
        client, experiment_id, known = _client(uri), "", True
    if not known:
        raise TrackingError(f"no run {run_id} in {redact_text(uri)}: give the id of a run in this store")
    run = _run_of(client, run_id, uri, experiment_id, config)
    try:
        yield run
    finally:
        run.close(config.wait_s)


def latest_run(config: TrackingConfig, kind: RunKind, tags: Mapping[str, str] | None = None) -> str | None:
    """Id of the newest finished run of ``kind`` that carries ``tags``, or None."""
    uri, client, experiment_id = _open_store(config)
    wanted = {KIND_TAG: kind, **(tags or {})}
    if any("'" in value for value in wanted.values()):
        return None
    conditions = [f"tags.`{key}` = '{value}'" for key, value in wanted.items()]
    with store_errors(uri):
        found = client.search_runs(
            [experiment_id],
            filter_string=" and ".join([*conditions, "attributes.status = 'FINISHED'"]),
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
    return found[0].info.run_id if found else None


def load_table(config: TrackingConfig, run_id: str, name: str) -> list[dict[str, Any]]:
    """The rows of a table that a run logged with :meth:`cluster.records.run.Run.log_table`.

    Raises:
        TrackingError: the store, the run or the table is missing.
    """
    uri, client, _ = _open_store(config)
    with tempfile.TemporaryDirectory() as folder, store_errors(uri):
        try:
            table = json.loads(Path(client.download_artifacts(run_id, name, folder)).read_text())
        except OSError as error:
            raise TrackingError(f"run {run_id} has no table {name}: {error}") from error
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _open_store(config: TrackingConfig) -> tuple[str, MlflowClient, str]:
    """(tracking URI, client, experiment id); makes what is missing."""
    uri = resolve_tracking_uri(config)
    _prepare_mlflow()
    if not uri.startswith(_SQLITE):
        if uri.startswith(("http://", "https://")):
            _check_server(uri)
        return _open_experiment(uri, config, artifact_default=None)
    database = Path(uri.removeprefix(_SQLITE))
    if not os.access(database if database.exists() else database.parent, os.W_OK):
        raise TrackingError(
            f"cannot write the tracking database {database}: "
            "work in a folder that you can write, or set MLFLOW_TRACKING_URI"
        )
    from filelock import FileLock

    with FileLock(f"{database}.lock"):
        artifact_default = (database.parent / "mlartifacts" / config.experiment).as_uri()
        return _open_experiment(uri, config, artifact_default)


def _client(uri: str) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _run_of(client: MlflowClient, run_id: str, uri: str, experiment_id: str, config: TrackingConfig) -> Run:
    return Run(
        client,
        run_id,
        uri=uri,
        experiment_id=experiment_id,
        unsent=UnsentMetrics(config.unsent_dir or str(Path.cwd()), run_id),
        most_waiting_metrics=config.most_waiting_metrics,
    )


def _open_experiment(uri: str, config: TrackingConfig, artifact_default: str | None) -> tuple[str, MlflowClient, str]:
    from mlflow.exceptions import MlflowException

    artifact_uri = config.artifact_uri or os.environ.get("LIPFLOW_ARTIFACT_URI") or artifact_default
    with store_errors(uri):
        client = _client(uri)
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            raise TrackingError(
                f"the experiment {config.experiment!r} was deleted in {redact_text(uri)}: "
                "restore it (mlflow experiments restore) or choose another tracking.experiment"
            )
        if experiment is not None:
            return uri, client, experiment.experiment_id
        try:
            return uri, client, client.create_experiment(config.experiment, artifact_location=artifact_uri)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Another process was faster.
        experiment = client.get_experiment_by_name(config.experiment)
        assert experiment is not None
        return uri, client, experiment.experiment_id


def _check_server(uri: str) -> None:
    """Refuse a server that does not answer, in seconds; MLflow's own retries take minutes to say so."""
    import requests

    for attempt in range(_SERVER_TRIES):
        try:
            requests.get(f"{uri.rstrip('/')}/health", timeout=_SERVER_TIMEOUT_S)
            return
        except requests.RequestException as error:
            if attempt == _SERVER_TRIES - 1:
                raise TrackingError(
                    f"no MLflow server answers at {redact_text(uri)} ({type(error).__name__}): "
                    "start it, or correct MLFLOW_TRACKING_URI"
                ) from error
            time.sleep(1.0 + attempt)


def _prepare_mlflow() -> None:
    """Keep MLflow quiet, and its requests short.

    Standard output must stay clean, since jobs print their result as JSON there, and nothing is reported over the
    network. A request to a server that is away fails within seconds, one that hangs within two minutes: by MLflow's own
    defaults a job would stand still for longer, and what the background sends is sent again anyway.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _find_run(client: MlflowClient, run_id: str) -> MlflowRun | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _log_recipe(client: MlflowClient, mlflow_run: MlflowRun, recipe: BaseModel | Mapping[str, Any]) -> None:
    """The recipe as an artifact and as parameters; a continued run keeps the parameters that it has."""
    from mlflow.entities import Param

    settings = redact(recipe.model_dump(mode="json") if isinstance(recipe, BaseModel) else recipe)
    known = mlflow_run.data.params
    params = [Param(key, value[:_LONGEST_PARAM]) for key, value in flatten(settings).items() if key not in known]
    if not known:
        client.log_dict(mlflow_run.info.run_id, settings, RECIPE_FILE)
    for start in range(0, len(params), _PARAMS_PER_REQUEST):
        client.log_batch(mlflow_run.info.run_id, params=params[start : start + _PARAMS_PER_REQUEST])


def _close_after_error(run: Run, config: TrackingConfig, status: str, reason: str) -> None:
    """Record how the run ended; trouble with the store must not hide the error that ended it."""
    run.close(min(config.wait_s, _WAIT_AFTER_ERROR_S), take_back=True)
    _set_terminated(run, status, {ERROR_TAG: reason[:_LONGEST_TAG]})


def _set_terminated(run: Run, status: str, tags: Mapping[str, str] | None = None) -> None:
    try:
        run.set_tags(tags or {})
        with store_errors(run.uri):
            run.client.set_terminated(run.run_id, status=status)
    except TrackingError as error:
        _logger.warning("the end of run %s (%s) was not recorded: %s", run.run_id, status, error)
