"""``lipflow stack``: real servers that ask for keys, listen on loopback alone, and run what is submitted."""

from __future__ import annotations

import json
import os
import pty
import signal
import stat
import time
from ipaddress import ip_address
from pathlib import Path

import boto3
import psutil
import pytest
import requests
from botocore.exceptions import ClientError

from cluster.services.processes import running
from cluster.services.servers import listening
from tests.integration.running_stack import ANSWER_S, RunningStack, stack_command

SERVERS = ["s3", "mlflow", "ray"]


def is_loopback(address: str) -> bool:
    parsed = ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def test_nothing_listens_beyond_loopback(stack: RunningStack):
    sockets = listening(stack.processes())
    ports = {port for _, port, _ in sockets}
    assert set(stack.record.ports.values()) - {stack.record.ports["ray_client"]} <= ports
    # Among them Ray's control store, raylet, agents and metrics.
    assert len(ports) >= 8
    assert [entry for entry in sockets if not is_loopback(entry[0])] == []


def test_s3_without_a_key_or_with_a_wrong_one_is_refused(stack: RunningStack):
    bucket = f"{stack.variables['AWS_ENDPOINT_URL']}/lipflow"
    assert 400 <= requests.get(bucket, timeout=30).status_code < 500
    assert 400 <= requests.put(f"{bucket}/object", data=b"x", timeout=30).status_code < 500
    credentials = {"aws_access_key_id": stack.variables["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": "0" * 40}
    endpoint = stack.variables["AWS_ENDPOINT_URL"]
    stranger = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **credentials)
    with pytest.raises(ClientError, match=r"403|Denied|SignatureDoesNotMatch"):
        stranger.put_object(Bucket="lipflow", Key="object", Body=b"x")
    assert not (stack.folder / "objects" / "lipflow" / "object").exists()


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer " + "0" * 64}])
def test_a_job_without_the_token_or_with_a_wrong_one_is_refused(stack: RunningStack, header: dict, tmp_path: Path):
    address = stack.variables["RAY_API_SERVER_ADDRESS"]
    job = {"entrypoint": f"touch {tmp_path / 'done'}", "runtime_env": {}}
    answer = requests.post(f"{address}/api/jobs/", json=job, headers=header, timeout=30)
    assert answer.status_code in (401, 403)
    (tmp_path / "wrong").write_text("0" * 64)
    changes = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")} if header else {"RAY_AUTH_MODE": None}
    refused = stack.run("submit", "doctor", **changes)
    assert refused.returncode == 2
    assert "refused" in refused.stderr
    assert "RAY_AUTH_TOKEN_PATH" in refused.stderr
    assert not (tmp_path / "done").exists()


def test_keys_are_in_files_of_their_owner_and_on_no_command_line(stack: RunningStack):
    secrets = [stack.variables["AWS_ACCESS_KEY_ID"], stack.variables["AWS_SECRET_ACCESS_KEY"]]
    secrets += [(stack.folder / "ray-token").read_text()]
    assert [len(secret) for secret in secrets] == [20, 40, 64]
    assert stat.S_IMODE(stack.folder.stat().st_mode) == 0o700
    for name in ("stack.env", "ray-token"):
        assert stat.S_IMODE((stack.folder / name).stat().st_mode) == 0o600
    lines = " ".join(" ".join(process.cmdline()) for process in stack.processes())
    assert "rclone" in lines
    assert not any(secret in lines for secret in secrets)


def test_submitted_jobs_see_the_stack_and_end_with_their_own_exit_codes(stack: RunningStack):
    doctor = stack.start("submit", "doctor", "s3://lipflow/probe", "--", "--json")
    failing = stack.run("submit", "verify", "s3://lipflow/nothing", "--submission-id", "verifying")
    assert failing.returncode == 2
    assert "lipflow: error: s3://lipflow/nothing: not a capture" in failing.stdout
    out, err = doctor.communicate(timeout=ANSWER_S)
    assert doctor.returncode == 0, out + err
    document = json.loads(out[out.index("{\n") : out.rindex("}\n") + 2])
    found = {finding["name"]: finding for finding in document["findings"]}
    assert [found[name]["state"] for name in ("ray", "mlflow", "s3", "s3://lipflow/probe")] == ["ok"] * 4
    assert stack.variables["MLFLOW_TRACKING_URI"] in found["mlflow"]["found"]
    # The keys are the cluster's own; that they were not sent is said.
    assert "not sent: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in err


def test_a_server_that_died_is_seen_and_started_again_alone(stack: RunningStack):
    before = {server.name: server.pid for server in stack.record.servers}
    again = stack_command("up", "--folder", str(stack.folder))
    assert again.returncode == 0, again.stderr
    assert "it runs already" in again.stdout
    assert {server.name: server.pid for server in stack.record.servers} == before
    psutil.Process(before["mlflow"]).kill()
    deadline = time.monotonic() + 60
    while all(running(server) for server in stack.record.servers) and time.monotonic() < deadline:
        time.sleep(0.05)
    status = stack_command("status", "--folder", str(stack.folder), "--json")
    assert status.returncode == 1
    problems = {server["name"]: server["problem"] for server in json.loads(status.stdout)["servers"]}
    assert problems == {"s3": None, "mlflow": "does not run", "ray": None}
    mended = stack_command("up", "--folder", str(stack.folder))
    assert mended.returncode == 0, mended.stderr
    after = {server.name: server.pid for server in stack.record.servers}
    assert [name for name in SERVERS if after[name] != before[name]] == ["mlflow"]
    assert requests.get(f"{stack.variables['MLFLOW_TRACKING_URI']}/health", timeout=30).ok


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_leaves_a_job_running_and_its_name_finds_it_again(stack: RunningStack):
    command = ("submit", "synth", "--submission-id", "long", "s3://lipflow/long", "--", "--cameras", "30")
    command += ("--segments", "20", "--frames-per-segment", "50", "--image-size", "512x384")
    # What a shell runs in the background ignores Ctrl-C, and so would what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    first = stack.start(*command)
    _wait_for_line(first.stdout, "Running entrypoint")
    first.send_signal(signal.SIGINT)
    _wait_for_line(first.stderr, "Ctrl-C again leaves it")
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=ANSWER_S)
    assert first.returncode == 130, out + err
    assert "long goes on. Follow it: ray job logs --follow --address" in err
    assert "RUNNING" in _status(stack, "long")
    second = stack.run("submit", "--no-wait", *command[1:])
    assert second.returncode == 0
    assert "long: runs already" in second.stderr
    other = stack.run("submit", "doctor", "--submission-id", "long")
    assert other.returncode == 2
    assert "a job of that name runs another command" in other.stderr
    # On a terminal it asks.
    terminal, stdin = pty.openpty()
    third = stack.start(*command, stdin=stdin)
    _wait_for_line(third.stderr, "long: runs already")
    _wait_for_line(third.stdout, "Running entrypoint")
    third.send_signal(signal.SIGINT)
    os.write(terminal, b"s\n")
    out, err = third.communicate(timeout=ANSWER_S)
    assert third.returncode not in (0, 2, 130), out + err
    assert "stop it (s), leave it running (l), or follow on (enter)?" in out + err
    assert "long was asked to stop" in err
    assert "long: stopped" in err
    assert "Job 'long' was stopped" in _status(stack, "long")


def _wait_for_line(stream, text: str) -> None:
    while text not in (line := stream.readline()):
        assert line, f"it ended without saying {text!r}"


def _status(stack: RunningStack, name: str) -> str:
    done = stack.run_ray("job", "status", name)
    return done.stdout + done.stderr
