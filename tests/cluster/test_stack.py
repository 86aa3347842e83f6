"""The stack's parts: processes that are ended whole and never mistaken, files of their owner, ports, failing starts."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.services import folder as stack_folder
from cluster.services.folder import StackError
from cluster.services.processes import MARK_VARIABLE, end, family, running, start
from cluster.services.servers import StackConfig, plan_servers
from cluster.services.stack import stack_down, stack_status, stack_up

# A server with a child and a grandchild; the latter leaves the family's session and ignores requests to end.
GRANDCHILD = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""
CHILD = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {GRANDCHILD!r}], start_new_session=True)
time.sleep(600)
"""
FAMILY = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {CHILD!r}])
time.sleep(600)
"""


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray's folder goes if its name would be too long, so that nothing stays behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def server(tmp_path: Path):
    """``FAMILY``, running, and its mark."""
    mark, log = os.urandom(16).hex(), tmp_path / "log"
    started = start(
        "family", [sys.executable, "-c", FAMILY], os.environ | {MARK_VARIABLE: mark}, folder=tmp_path, log=log
    )
    _wait_for(lambda: "up" in log.read_text())
    yield started, mark
    end([started], mark)


def test_a_server_is_ended_with_all_that_it_started(server):
    started, mark = server
    assert len(family([started], mark)) == 3
    assert end([started], mark) == 3
    assert family([started], mark) == []
    assert running(started) is None


def test_what_a_killed_server_leaves_behind_is_found_by_its_mark(server):
    started, mark = server
    psutil.Process(started.pid).kill()
    _wait_for(lambda: running(started) is None)
    assert len(family([started], mark)) == 2
    assert end([started], mark) == 2
    assert family([started], mark) == []


def test_a_process_that_has_got_the_id_of_another_is_never_touched():
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        known = psutil.Process(stranger.pid)
        mistaken = stack_folder.ServerProcess("s3", stranger.pid, known.create_time() - 60, "log")
        assert running(replace(mistaken, started_s=known.create_time())) is not None
        assert running(mistaken) is None
        assert end([mistaken], "no such mark") == 0
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_variables_come_back_from_the_file_and_from_a_shell(tmp_path: Path):
    path = tmp_path / "stack.env"
    variables = {"LIPFLOW_A": "plain", "LIPFLOW_B": "with space, 'quotes' and \"more\" $HOME", "LIPFLOW_C": ""}
    stack_folder.write_env_file(path, variables)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stack_folder.read_env_file(path) == variables
    script = f"set -a; . {path}; set +a; {sys.executable} -c 'import os; print(repr(dict(os.environ)))'"
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert all(f"{name!r}: {value!r}" in shown for name, value in variables.items())


@pytest.mark.usefixtures("own_temporary_folder")
def test_servers_get_no_secrets_but_the_stack_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    foreign = {
        "GITHUB_TOKEN": "ghp_foreign",
        "AWS_PROFILE": "foreign",
        "AWS_SECRET_ACCESS_KEY": "foreign-key",
        "RAY_AUTH_TOKEN": "foreign-token",
        "MLFLOW_TRACKING_URI": "http://foreign",
    }
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    stack_folder.make_folder(tmp_path)
    record = replace(stack_folder.new_record(tmp_path, "lipflow"), ports=dict.fromkeys(_PORTS, 1))
    drawn = stack_folder.Credentials.drawn()
    for planned in plan_servers(tmp_path, record, drawn, StackConfig()):
        assert "foreign" not in str(dict(planned.environment)), planned.name
        assert not any(secret in " ".join(planned.arguments) for secret in (drawn.s3_key_id, drawn.s3_secret))
        # The folder of this Python comes first, so that `python` of a job is this one.
        assert planned.environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert drawn != stack_folder.Credentials.drawn()


_PORTS = ("s3", "mlflow", "ray", "dashboard", "dashboard_agent", "ray_client")


@pytest.mark.usefixtures("own_temporary_folder")
def test_a_port_that_is_taken_or_is_one_of_ray_s_workers_is_refused(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=f"s3_port {port} is taken"):
            stack_up(tmp_path, StackConfig(s3_port=port))
    with pytest.raises(StackError, match="dashboard_port 10500: Ray gives 10002 to 19999"):
        stack_up(tmp_path, StackConfig(dashboard_port=10500))
    assert stack_folder.open_record(tmp_path) is None


@pytest.mark.usefixtures("own_temporary_folder")
def test_a_server_that_cannot_start_is_named_with_its_log_and_nothing_stays_up(tmp_path: Path):
    stack_folder.make_folder(tmp_path)
    (tmp_path / "mlflow.db").write_text("this is no database" * 100)
    with pytest.raises(StackError, match=r"the server mlflow .*its log .*mlflow\.log ends: .*database") as failed:
        stack_up(tmp_path, StackConfig())
    record = stack_folder.open_record(tmp_path)
    assert record is not None
    assert record.servers == ()
    assert family((), record.mark) == []
    secrets = stack_folder.load_credentials(tmp_path)
    assert secrets.s3_secret not in str(failed.value)
    # The first one had been up.
    assert "Starting s3 server" in (tmp_path / "logs" / "s3.log").read_text()


def test_ray_s_folder_has_a_short_name_and_is_out_of_the_reach_of_others(tmp_path: Path):
    inside = stack_folder.new_record(Path("/home/nobody/.lipflow/stack"), "lipflow").ray_folder
    assert inside == "/home/nobody/.lipflow/stack/ray"
    outside = Path(stack_folder.new_record(tmp_path / ("x" * 60), "lipflow").ray_folder)
    try:
        assert len(str(outside)) <= stack_folder.LONGEST_RAY_FOLDER
        assert stat.S_IMODE(outside.parent.stat().st_mode) == 0o700
    finally:
        outside.parent.rmdir()


def test_without_a_stack_there_is_nothing_to_show_or_to_end(tmp_path: Path):
    for action in (stack_down, stack_status):
        with pytest.raises(StackError, match=r"there is no stack in .*lipflow stack up"):
            action(tmp_path)
    (tmp_path / "stack.json").write_text("{")
    with pytest.raises(StackError, match=r"stack\.json cannot be read"):
        stack_down(tmp_path)
