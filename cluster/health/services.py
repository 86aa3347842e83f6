"""The services that the environment names: Ray, MLflow, S3. Each is asked, not only looked up."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from cluster.health.finding import Finding
from cluster.records.tracking import TrackingConfig, open_client, resolve_tracking_uri
from lipflow.errors import LipflowError
from pipeline import storage
from pipeline.storage.s3_settings import configured_endpoint

CONNECT_TIMEOUT_S = 5.0
PROBE_TAG = "lipflow.doctor"

_LOOPBACK = ("127.0.0.1", "localhost", "::1", "auto", "local")
_AWS = "https://s3.amazonaws.com"


def ray_cluster() -> Finding:
    """The cluster that jobs join, and its token."""
    from ray import __version__

    from cluster.submitting.jobs import Jobs

    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    token = f"ray {__version__}, token authentication {_token_state()}"
    if not address:
        return Finding("ray", "ok", f"{token}; no RAY_ADDRESS: jobs start a cluster of their own on this machine")
    host, port = _host_and_port(address, default_port=8265 if "://" in address else 6379)
    unreachable = _unreachable(host, port)
    if unreachable is not None:
        remedy = "start it, correct RAY_ADDRESS and RAY_API_SERVER_ADDRESS, or unset them to run on this machine"
        return Finding("ray", "bad", f"{token}; {address} does not answer ({unreachable})", remedy)
    try:
        jobs = Jobs.at(address)
    except LipflowError as error:
        return Finding(
            "ray", "bad", f"{token}; {error}", "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to its token"
        )
    if os.environ.get("RAY_AUTH_MODE") != "token" and host not in _LOOPBACK:
        remedy = "start it with RAY_AUTH_MODE=token: whoever reaches it runs code there"
        return Finding("ray", "warn", f"{token}; {jobs.address} answers without a token", remedy)
    return Finding("ray", "ok", f"{token}; {jobs.address} answers")


def mlflow_store() -> Finding:
    """The store of runs: reached, and written to."""
    uri = resolve_tracking_uri(TrackingConfig())
    if uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///")):
        folder = os.path.dirname(uri.removeprefix("sqlite:///"))
        if not os.access(folder, os.W_OK):
            remedy = "work in a folder that you can write, or set MLFLOW_TRACKING_URI"
            return Finding("mlflow", "bad", f"{uri} cannot be made", remedy)
        return Finding("mlflow", "ok", f"{uri}, made by the first run; MLFLOW_TRACKING_URI names another store")
    try:
        config = TrackingConfig()
        client = open_client(config)
        experiment = client.get_experiment_by_name(config.experiment)
        assert experiment is not None
        client.set_experiment_tag(experiment.experiment_id, PROBE_TAG, "written")
    except Exception as error:
        return Finding("mlflow", "bad", f"{uri}: {error}", "start the server, or correct MLFLOW_TRACKING_URI")
    return Finding("mlflow", "ok", f"{uri} answers and can be written")


def s3_store() -> Finding:
    """S3's credentials and endpoint; whether a bucket can be written is asked by ``lipflow doctor s3://BUCKET``."""
    from botocore.session import Session

    credentials = Session().get_credentials()
    endpoint = configured_endpoint()
    if credentials is None:
        if endpoint is None:
            return Finding("s3", "ok", "no credentials and no endpoint: local paths only")
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, on every node"
        return Finding("s3", "bad", f"{endpoint}, but no credentials", remedy)
    address = endpoint or _AWS
    host, port = _host_and_port(address, default_port=443 if address.startswith("https") else 80)
    unreachable = _unreachable(host, port)
    found = f"{address}, credentials from {credentials.method}"
    if unreachable is not None:
        return Finding(
            "s3", "bad", f"{found}; it does not answer ({unreachable})", "start it, or correct AWS_ENDPOINT_URL"
        )
    return Finding("s3", "ok", f"{found}; it answers")


def writable(uri: str) -> Finding:
    """Whether a folder of storage can be written."""
    try:
        storage.check_writable(uri)
    except LipflowError as error:
        return Finding(uri, "bad", str(error), "correct the address, or give the credentials that right")
    return Finding(uri, "ok", "can be written")


CHECKS = {"ray": ray_cluster, "mlflow": mlflow_store, "s3": s3_store}
"""Name -> check."""


def _token_state() -> str:
    """Whether a token is used and from where; never the token."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return "off (RAY_AUTH_MODE)"
    for variable in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(variable):
            return f"on ({variable})"
    return "on (the file in the home folder)"


def _host_and_port(address: str, *, default_port: int) -> tuple[str, int]:
    parts = urlsplit(address if "://" in address else f"//{address}")
    return parts.hostname or "127.0.0.1", parts.port or default_port


def _unreachable(host: str, port: int) -> str | None:
    """Why nothing can be reached there; None if something can."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__
