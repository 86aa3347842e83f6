"""Bad input is one line on standard error and exit code 2, before Ray is started; ``--json`` is one document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import ray

from cluster import cli, command
from cluster.records.tracking import TrackingConfig
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.sharding.shards import ShardConfig, write_shards

DOME = DomeConfig(
    cameras=3,
    image_size_hw=(24, 18),
    texture_size=32,
    segments=3,
    frames_per_segment=1,
    headset_image_size_hw=(8, 8),
    supersampling=1,
)

Refusal = Callable[..., str]

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("capture")
    write_dome(DOME, str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def shards(capture: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(open_capture(capture), ShardConfig(), str(folder))
    return str(folder)


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch, tracking_config: TrackingConfig) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_config.uri or "")
    monkeypatch.setenv("LIPFLOW_DEBUG", "0")


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """``refusal("train", SHARDS, OUT)``: the message; checks that it is one, and that Ray was not started."""

    def call(*arguments: str) -> str:
        def started(*_args, **_kwargs):
            raise AssertionError("Ray was started before the input was checked")

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", started)
        monkeypatch.setattr(sys, "argv", ["lipflow", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == command.EXIT_USAGE
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("lipflow: error: ")
        assert err.count("\n") == 1
        return err

    return call


def test_a_folder_that_is_no_capture(refusal: Refusal, tmp_path: Path):
    message = refusal("shard", str(tmp_path), str(tmp_path / "out"))
    assert str(tmp_path) in message
    assert "capture" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_a_shard_set_without_manifest(refusal: Refusal, tmp_path: Path, job: str):
    empty, out = str(tmp_path / "empty"), str(tmp_path / "out")
    Path(empty).mkdir()
    arguments = [empty, out] if job == "train" else ["models:/lipflow@champion", empty, "--out", out]
    message = refusal(job, *arguments)
    assert empty in message
    assert "manifest" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stepz=3", ["'stepz'", "did you mean 'steps'?"]),
        ("avatar.latent_sise=3", ["'avatar.latent_sise'", "did you mean 'latent_size'?"]),
        ("steps=-1", ["steps", "-1"]),
        ("steps", ["expected key=value"]),
    ],
)
def test_a_recipe_key_that_is_unknown_or_has_a_bad_value(
    refusal: Refusal, shards: str, tmp_path: Path, override: str, expected: list[str]
):
    message = refusal("train", shards, str(tmp_path / "out"), "--set", override)
    assert all(part in message for part in expected)


def test_a_missing_recipe_file(refusal: Refusal, shards: str, tmp_path: Path):
    missing = str(tmp_path / "no-recipe.yaml")
    assert missing in refusal("train", shards, str(tmp_path / "out"), "--recipe", missing)


@pytest.mark.parametrize(
    "arguments",
    [
        ("shard", "s3://bucket/capture", "s3://bucket/shards"),
        ("train", "s3://bucket/shards", "s3://bucket/out"),
        ("evaluate", "s3://bucket/avatar", "s3://bucket/shards", "--out", "s3://bucket/evaluation"),
        ("synth", "s3://bucket/capture"),
    ],
)
def test_s3_without_credentials(refusal: Refusal, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    message = refusal(*arguments)
    assert "AWS_ACCESS_KEY_ID" in message
    assert "bucket" in message


@pytest.mark.parametrize("job", ["synth", "shard", "train", "evaluate"])
def test_an_output_that_cannot_be_written(refusal: Refusal, capture: str, shards: str, tmp_path: Path, job: str):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    arguments = {
        "synth": [out],
        "shard": [capture, out],
        "train": [shards, out],
        "evaluate": [shards, shards, "--out", out],
    }
    assert out in refusal(job, *arguments[job])


@pytest.mark.parametrize(
    "model",
    ["/no/such/avatar", "models:/nobody@champion", "models:/nobody", "runs:/0123456789abcdef0123456789abcdef"],
)
def test_a_model_that_is_unknown(refusal: Refusal, shards: str, tmp_path: Path, model: str):
    message = refusal("evaluate", model, shards, "--out", str(tmp_path / "out"))
    assert model in message or "nobody" in message


def test_a_promotion_of_an_unknown_model(refusal: Refusal):
    assert "nobody" in refusal("promote", "models:/nobody@challenger")


def test_an_address_of_a_cluster_that_does_not_answer(monkeypatch, capsys, capture: str, tmp_path: Path):
    def unreachable(*_args, **_kwargs):
        raise ConnectionError("nobody there\nsecond line")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", unreachable)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(sys, "argv", ["lipflow", "shard", capture, str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == command.EXIT_USAGE
    message = capsys.readouterr().err
    assert "RAY_ADDRESS=10.0.0.1:6379: nobody there; start one" in message


def test_json_is_one_document_on_standard_output(monkeypatch, capsys, capture: str, tmp_path: Path):
    out = str(tmp_path / "out")
    digest = write_shards(open_capture(capture), ShardConfig(), out).digest
    # A finished set needs no cluster.
    monkeypatch.setattr(sys, "argv", ["lipflow", "shard", capture, out, "--json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["digest"], document["written"], document["cameras"]) == (digest, False, 3)


def test_every_command_is_there_with_its_own_help():
    for module, function in cli.COMMANDS.values():
        assert getattr(import_module(module), function).__doc__


def _run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=120, env=os.environ | variables
    )


def test_a_real_process_says_it_in_one_line_and_shows_the_traceback_when_asked(tmp_path: Path):
    arguments = ("cluster.cli", "shard", str(tmp_path), str(tmp_path / "out"))
    refused = _run(*arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("lipflow: error: ")
    assert refused.stderr.count("\n") == 1
    shown = _run(*arguments, "--debug")
    assert shown.returncode != 0
    assert "Traceback" in shown.stderr


def test_a_job_module_is_a_command_too(tmp_path: Path):
    refused = _run("cluster.train", str(tmp_path), str(tmp_path / "out"), "--set", "stepz=1")
    assert refused.returncode == 2
    assert "did you mean 'steps'?" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_list_of_commands_does_not_load_the_jobs():
    listed = _run("cluster.cli", "--help")
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in cli.COMMANDS)
