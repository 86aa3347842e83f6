"""``lipflow submit``: what is packed, what is sent, and what is never sent; a log through lost connections."""

from __future__ import annotations

import os
import subprocess
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.records.code_version import tree_version
from cluster.runtime import ClusterError
from cluster.submit import submit_job
from cluster.submitting import package
from cluster.submitting.environment import check_arguments, environment_to_send
from cluster.submitting.following import Follower
from cluster.submitting.jobs import JobEnd
from cluster.submitting.package import pack, working_tree
from lipflow.errors import ConfigError

GIT = ("git", "-c", "user.name=Nobody", "-c", "user.email=nobody@example.com", "-c", "init.defaultBranch=main")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git work tree with code, ignored data, keys, and links out of it."""
    root = tmp_path / "tree"
    files = {
        "cluster/train.py": "train",
        "recipes/small.yaml": "steps: 1",
        "new.py": "not yet tracked",
        ".gitignore": "ignored/\n*.tmp\n",
        "ignored/capture.bin": "data",
        "a.tmp": "scratch",
        ".venv/lib/x.py": "environment",
        "data/shard.tar": "data",
        "pkg/__pycache__/x.pyc": "compiled",
        ".env": "AWS_SECRET_ACCESS_KEY=abc",
        "deploy/stack.env": "TOKEN=abc",
        "deploy/server.pem": "key",
        "deploy/ray-token": "abc",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "outside.txt").write_text("outside")
    (root / "link.txt").symlink_to(tmp_path / "outside.txt")
    for arguments in (("init", "-q"), ("add", "cluster", "recipes", ".gitignore"), ("commit", "-qm", "first")):
        subprocess.run([*GIT, *arguments], cwd=root, check=True)
    return root


def names_in(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as opened:
        return set(opened.namelist())


SENT = {"cluster/train.py", "recipes/small.yaml", "new.py", ".gitignore"}
KEYS = (".env", "deploy/ray-token", "deploy/server.pem", "deploy/stack.env")


def test_a_package_holds_what_git_would_without_environments_data_keys_and_links(tree: Path, tmp_path: Path):
    packed = pack(tree, tmp_path / "tree.zip")
    assert names_in(packed.archive) == SENT
    assert packed.keys_left_out == KEYS
    assert packed.files == 4


def test_without_git_a_folder_is_packed_by_the_same_names(tree: Path, tmp_path: Path):
    subprocess.run(["rm", "-rf", str(tree / ".git")], check=True)
    packed = pack(tree, tmp_path / "tree.zip")
    # What .gitignore says is git's to know.
    assert names_in(packed.archive) == SENT | {"ignored/capture.bin", "a.tmp"}
    assert packed.keys_left_out == KEYS


def test_an_unchanged_tree_is_the_same_bytes(tree: Path, tmp_path: Path):
    first = pack(tree, tmp_path / "1.zip").archive.read_bytes()
    os.utime(tree / "new.py", (1, 1))
    assert pack(tree, tmp_path / "2.zip").archive.read_bytes() == first
    (tree / "new.py").write_text("changed")
    assert pack(tree, tmp_path / "3.zip").archive.read_bytes() != first


def test_a_tree_that_is_too_large_is_refused_with_its_largest_files(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(package, "LARGEST_PACKAGE_BYTES", 5000)
    (tree / "weights.bin").write_bytes(bytes(4000))
    (tree / "video.bin").write_bytes(bytes(3000))
    with pytest.raises(
        ConfigError, match=r"at most 5\.0 kB.*largest: weights\.bin \(4\.0 kB\), video\.bin \(3\.0 kB\)"
    ):
        pack(tree, tmp_path / "tree.zip")
    assert not (tmp_path / "tree.zip").exists()
    with pytest.raises(ConfigError, match="holds nothing to send"):
        pack(tree / "ignored", tmp_path / "tree.zip")


def test_the_tree_is_that_of_git_and_its_version_says_whether_it_was_changed(tree: Path, tmp_path: Path):
    assert working_tree(tree / "recipes") == tree
    version = tree_version(tree)
    assert version is not None
    assert len(version) == 40
    (tree / "cluster" / "train.py").write_text("changed")
    assert tree_version(tree) == f"{version}+dirty"
    (tmp_path / "plain").mkdir()
    assert working_tree(tmp_path / "plain") == tmp_path / "plain"
    assert tree_version(tmp_path / "plain") is None


SECRET = "c2VjcmV0LXZhbHVl"


def test_addresses_are_sent_and_secrets_are_not():
    environment = {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "AWS_ENDPOINT_URL": "http://s3:9000",
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "LIPFLOW_S3_MAX_ATTEMPTS": "3",
        "LIPFLOW_STACK_FOLDER": "/home/nobody",
        "LIPFLOW_API_TOKEN": SECRET,
        "RAY_AUTH_TOKEN": SECRET,
        "HOME": "/home/nobody",
    }
    sent = environment_to_send(environment)
    assert set(sent.variables) == {"MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "LIPFLOW_S3_MAX_ATTEMPTS"}
    assert sent.held_back == ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "LIPFLOW_API_TOKEN")
    in_address = environment_to_send({"MLFLOW_TRACKING_URI": f"http://me:{SECRET}@mlflow:5000"})
    assert (in_address.variables, in_address.held_back) == ({}, ("MLFLOW_TRACKING_URI",))


def test_a_variable_that_was_asked_for_is_sent_unless_it_is_a_secret():
    assert environment_to_send({"HOME": "/h"}, ["HOME", "STAGE=2"]).variables == {"HOME": "/h", "STAGE": "2"}
    for asked in ("DB_PASSWORD", f"X_TOKEN={SECRET}", f"STORE=http://me:{SECRET}@db"):
        with pytest.raises(ConfigError, match="job records in clear") as refused:
            environment_to_send({"DB_PASSWORD": SECRET}, [asked])
        assert SECRET not in str(refused.value).replace(asked, "")
    with pytest.raises(ConfigError, match="it is not set here"):
        environment_to_send({}, ["MISSING"])


def test_a_command_line_with_a_secret_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    for argument in (f"s3://me:{SECRET}@host/x", f"--token={SECRET}", f"x={SECRET}", "store.password=hunter2"):
        with pytest.raises(ConfigError, match="argument 2 of the job holds a secret") as refused:
            check_arguments(["s3://bucket/shards", argument])
        assert SECRET not in str(refused.value)
    check_arguments(["s3://bucket/shards", "--set", "loss.keypoints=3", "--recipe", "tokens.yaml"])


def test_wrong_use_is_refused_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="submit stack: expected one of synth"):
        submit_job("stack", [])
    with pytest.raises(ConfigError, match="no such file"):
        submit_job("train", ["a", "b", "--recipe", str(tmp_path / "none.yaml")])
    with pytest.raises(ConfigError, match=r"no such folder"):
        submit_job("train", ["a", "b"], working_dir=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"no cluster to submit to: give --address"):
        submit_job("train", ["a", "b"])


def test_recipes_go_along_from_inside_and_outside_of_the_tree(tree: Path, tmp_path: Path):
    from cluster.submit import _with_recipes

    outside = tmp_path / "mine.yaml"
    outside.write_text("steps: 2")
    arguments = ["s3://b/s", "out", "--recipe", str(tree / "recipes" / "small.yaml"), f"--recipe={outside}"]
    changed, files = _with_recipes([*arguments, "--recipe", "s3://b/r.yaml"], tree)
    sent = ["--recipe", "recipes/small.yaml", "--recipe=lipflow-sent/1-mine.yaml", "--recipe", "s3://b/r.yaml"]
    assert changed == ["s3://b/s", "out", *sent]
    packed = pack(tree, tmp_path / "tree.zip", files)
    assert names_in(packed.archive) == SENT | {"lipflow-sent/1-mine.yaml"}


class BreakingConnection:
    """A job's log of which each connection tells a little more, from the beginning; then the job ends."""

    address = "http://nowhere:8265"

    def __init__(self, *connections: list[str]) -> None:
        self._connections = list(connections)

    async def log(self, name: str) -> AsyncIterator[str]:
        for text in self._connections.pop(0):
            yield text
        if len(self._connections) == 1:
            raise ClusterError("away")

    def end_of(self, name: str) -> JobEnd | None:
        return JobEnd(name, "FAILED", 3, "") if not self._connections else None


def test_a_log_is_written_once_whatever_becomes_of_the_connection(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.submitting.following.RECONNECT_WAIT_S", 0.0)
    written: list[str] = []
    connections = (["ab", "c"], ["a", "bcde", "f"], ["abcdefg", "h"])
    follower = Follower(BreakingConnection(*connections), "job", written.append)  # type: ignore[arg-type]
    end = follower.follow()
    assert "".join(written) == "abcdefgh"
    assert end == JobEnd("job", "FAILED", 3, "")
