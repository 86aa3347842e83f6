"""The S3 store's command lines, as they stand in compose.yaml and in store.yaml, run by a real rclone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.config import Config
from botocore.exceptions import ClientError

from cluster.ports import free_port
from tests.infra.manifests import COMPOSE, INFRA, documents

KEY_ID, KEY = "some-id", "some-key"
WAIT_S = 60


def compose_script() -> str:
    (script,) = yaml.safe_load(COMPOSE.read_text())["services"]["store"]["command"]
    return script.replace("$$", "$")


def kubernetes_script() -> str:
    (store,) = [item for item in documents(INFRA / "services/kubernetes/store.yaml") if item["kind"] == "StatefulSet"]
    (script,) = store["spec"]["template"]["spec"]["containers"][0]["args"]
    return script


@contextmanager
def running(script: str, folder: Path) -> Iterator[str]:
    """The script with its folders and its port moved here; yields the endpoint."""
    port = free_port()
    (folder / "s3_credentials").write_text(f"[default]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {KEY}\n")
    for found, here in (("/data", f"{folder}/data"), ("/run/secrets", str(folder)), (":9000", f"127.0.0.1:{port}")):
        assert found in script or found == "/run/secrets"
        script = script.replace(found, here)
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": KEY,
    }
    log = folder / "store.log"
    with log.open("wb") as output:
        process = subprocess.Popen(["/bin/sh", "-euc", script], env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + WAIT_S
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    yield f"http://127.0.0.1:{port}"
                    return
            time.sleep(0.05)
        raise RuntimeError(f"the store did not start: {log.read_text()}")
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.parametrize("script", [compose_script, kubernetes_script])
def test_store_starts_with_its_bucket_and_knows_its_key_alone(script, tmp_path: Path):
    def client(key: str):
        return boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id=KEY_ID, aws_secret_access_key=key, region_name="us-east-1",
            config=Config(request_checksum_calculation="when_required", response_checksum_validation="when_required"),
        )  # fmt: skip

    with running(script(), tmp_path) as endpoint:
        client(KEY).put_object(Bucket="lipflow", Key="a/b", Body=b"some bytes")
        assert client(KEY).get_object(Bucket="lipflow", Key="a/b")["Body"].read() == b"some bytes"
        assert (tmp_path / "data" / "lipflow" / "a" / "b").read_bytes() == b"some bytes"
        with pytest.raises(ClientError):
            client("another").get_object(Bucket="lipflow", Key="a/b")
