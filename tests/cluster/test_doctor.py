"""``lipflow doctor``: what it finds here, what it says of services that are away, and that it tells no secret."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cluster import command
from cluster.doctor import diagnose, doctor_command
from cluster.health import machine, services
from cluster.health.finding import Finding, checked

SECRET = "c2VjcmV0LXZhbHVl"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment that names no services, in a folder of its own."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
    for name in (*names, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def _by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_machine_without_services_is_fit_for_local_jobs(bare: pytest.MonkeyPatch, tmp_path: Path):
    findings = _by_name(diagnose([str(tmp_path / "out")]))
    assert list(findings) == [*machine.CHECKS, *services.CHECKS, str(tmp_path / "out")]
    assert [name for name, finding in findings.items() if finding.state == "bad"] == []
    assert "own on this machine" in findings["ray"].found
    assert "local paths only" in findings["s3"].found
    assert str(tmp_path / "mlflow.db") in findings["mlflow"].found
    # Looking makes nothing.
    assert not (tmp_path / "mlflow.db").exists()


def test_services_that_do_not_answer_are_bad_with_a_remedy_and_no_secret(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    bare.setattr("cluster.records.tracking._SERVER_TRIES", 1)
    bare.setenv("LIPFLOW_S3_MAX_ATTEMPTS", "1")
    for name, value in {
        "RAY_ADDRESS": "127.0.0.1:1",
        "MLFLOW_TRACKING_URI": f"http://me:{SECRET}@127.0.0.1:1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": f"id-{SECRET}",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "RAY_AUTH_TOKEN": SECRET,
    }.items():
        bare.setenv(name, value)
    bare.setattr(sys, "argv", ["doctor", "s3://bucket/x", "--json"])
    with pytest.raises(SystemExit) as stopped:
        command.run(doctor_command)
    assert stopped.value.code == command.EXIT_BAD
    out, err = capsys.readouterr()
    assert SECRET not in out + err
    document = json.loads(out)
    bad = {entry["name"]: entry for entry in document["findings"] if entry["state"] == "bad"}
    assert set(bad) == {"ray", "mlflow", "s3", "s3://bucket/x"}
    assert all(entry["remedy"] for entry in bad.values())
    assert (document["good"], document["bad"]) == (False, 4)
    assert "127.0.0.1:1 does not answer" in bad["ray"]["found"]


def test_an_endpoint_without_credentials_is_bad(bare: pytest.MonkeyPatch):
    bare.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    finding = services.s3_store()
    assert (finding.state, finding.found) == ("bad", "http://127.0.0.1:1, but no credentials")


def test_an_mlflow_store_is_written_to(bare: pytest.MonkeyPatch, tracking_config):
    bare.setenv("MLFLOW_TRACKING_URI", tracking_config.uri)
    assert services.mlflow_store().state == "ok"


def test_s3_is_asked_and_written_to(s3_server):
    assert services.s3_store().state == "ok"
    assert services.writable(s3_server.uri("doctor")).state == "ok"
    assert services.writable("s3://no-such-bucket/x").state == "bad"
    assert list((s3_server.folder / s3_server.bucket / "doctor").glob("*")) == []


def test_little_room_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(machine, "LEAST_FREE_DISK_GIB", 1e9)
    monkeypatch.setattr(machine, "LEAST_MEMORY_GIB", 1e9)
    monkeypatch.setattr(machine, "FEWEST_CORES", 10**6)
    assert [machine.disk().state, machine.memory().state, machine.cores().state] == ["bad", "bad", "warn"]


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_TOKEN", SECRET)

    def breaks() -> Finding:
        raise RuntimeError(f"no idea\nabout {SECRET}")

    finding = checked("this", breaks)
    assert (finding.name, finding.state) == ("this", "bad")
    assert "RuntimeError: no idea about [redacted]" in finding.found
