"""What a job writes to MLflow can be found again, and how it ended is told truly."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.records.code_version import code_version
from cluster.records.redaction import REDACTED, flatten, is_secret_name, redact, redact_text
from cluster.records.tracking import (
    CODE_VERSION_TAG,
    ERROR_TAG,
    KIND_TAG,
    PARENT_RUN_TAG,
    SHARDS_DIGEST_TAG,
    TrackingConfig,
    TrackingError,
    attached_run,
    initialise,
    latest_run,
    load_table,
    resolve_tracking_uri,
    tracked_run,
)
from lipflow.config import StrictConfig
from lipflow.errors import ConfigError

# Raised inside MLflow, about its own use of SQLAlchemy and pandas.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
]


@pytest.fixture(scope="module")
def config(tracking_config) -> TrackingConfig:
    return tracking_config


def test_run_carries_kind_parent_digest_code_version_and_recipe_without_secrets(config, monkeypatch):
    class Model(StrictConfig):
        latent_size: int = 16

    class Recipe(StrictConfig):
        model: Model = Model()
        out: str = "s3://bucket/out"
        store: str = "http://user:hunter22@host/x"
        aws_secret_access_key: str = "in-the-recipe"
        note: str = "uses from-environment twice"

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "from-environment")
    with tracked_run("train", "first", config=config, recipe=Recipe(), shards_digest="d1") as train:
        train.log_text("hello", "notes/hello.txt")
    with tracked_run("evaluate", "second", config=config, shards_digest="d1", parent_run=train.run_id) as child:
        pass

    found = train.client.get_run(train.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags[KIND_TAG] == "train"
    assert found.data.tags[SHARDS_DIGEST_TAG] == "d1"
    assert found.data.tags[CODE_VERSION_TAG] == code_version()
    assert found.data.params["model.latent_size"] == "16"
    assert found.data.params["aws_secret_access_key"] == REDACTED
    everything = str(found.data.params) + str(found.data.tags)
    for secret in ("hunter22", "in-the-recipe", "from-environment"):
        assert secret not in everything
    recipe = train.client.download_artifacts(train.run_id, "recipe.json")
    assert "in-the-recipe" not in Path(recipe).read_text()

    assert child.client.get_run(child.run_id).data.tags[PARENT_RUN_TAG] == train.run_id
    assert latest_run(config, "evaluate", {PARENT_RUN_TAG: train.run_id}) == child.run_id
    assert latest_run(config, "evaluate", {PARENT_RUN_TAG: "another"}) is None


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("loss is nan"), "FAILED", "ValueError: loss is nan"),
        (KeyboardInterrupt(), "KILLED", "interrupted"),
    ],
)
def test_run_that_ends_in_an_error_says_so_and_keeps_its_metrics(config, error, status, reason):
    with pytest.raises(type(error)), tracked_run("train", "bad", config=config) as run:  # noqa: PT012
        run.log_metrics({"loss": 1.5}, step=3)
        raise error
    found = run.client.get_run(run.run_id)
    assert found.info.status == status
    assert found.data.tags[ERROR_TAG] == reason
    assert found.data.metrics["loss"] == 1.5


def test_buffered_metrics_arrive_exactly_and_in_order(config):
    values = np.random.default_rng(0).normal(size=1203)
    with tracked_run("train", "metrics", config=config) as run:
        started = time.monotonic()
        for step, value in enumerate(values):
            run.log_metrics({"loss": value}, step=step)
        assert time.monotonic() - started < 5
    history = run.client.get_metric_history(run.run_id, "loss")
    assert [point.step for point in history] == list(range(len(values)))
    assert [point.value for point in history] == values.tolist()


def test_interrupted_run_is_continued_under_its_own_id(config):
    with pytest.raises(KeyboardInterrupt), tracked_run("train", "job", config=config, recipe={"lr": 1}) as first:
        raise KeyboardInterrupt
    with tracked_run("train", "job", config=config, recipe={"lr": 1}, run_id=first.run_id) as second:
        assert second.client.get_run(second.run_id).info.status == "RUNNING"
        second.log_metrics({"loss": 0.5}, step=7)
    assert second.run_id == first.run_id
    found = second.client.get_run(first.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["loss"] == 0.5


def test_continuing_a_run_that_the_store_lost_starts_a_new_one(config):
    with tracked_run("train", "job", config=config, run_id="0" * 32) as run:
        pass
    assert run.run_id != "0" * 32
    assert run.client.get_run(run.run_id).data.tags["lipflow.continues"] == "0" * 32


def test_attached_run_logs_without_ending_the_run(config):
    with tracked_run("train", "job", config=config) as run:
        with attached_run(config, run.run_id) as same:
            same.log_metrics({"loss": 2.0}, step=1)
        assert run.client.get_run(run.run_id).info.status == "RUNNING"
    assert run.client.get_run(run.run_id).data.metrics["loss"] == 2.0
    with pytest.raises(TrackingError, match="no run"), attached_run(config, "0" * 32):
        pass


def test_tables_and_pictures_can_be_loaded_back(config):
    rows = [{"signal": "hmc", "psnr": 31.25}, {"signal": "keypoints", "psnr": 28.5}]
    picture = np.random.default_rng(1).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    with tracked_run("evaluate", "table", config=config) as run:
        run.log_table(rows, "tables/fitted.json")
        run.log_image(picture, "pictures/hmc.png")
    assert load_table(config, run.run_id, "tables/fitted.json") == rows
    from PIL import Image

    loaded = Image.open(run.client.download_artifacts(run.run_id, "pictures/hmc.png"))
    assert np.array_equal(np.asarray(loaded), picture)
    with pytest.raises(TrackingError):
        load_table(config, run.run_id, "tables/absent.json")


def test_concurrent_first_use_and_writing_do_not_crash(tmp_path):
    # Forked after the import, which takes as long as all the rest.
    script = (
        "import multiprocessing, sys\n"
        "import mlflow.tracking\n"
        "from cluster.records.tracking import TrackingConfig, tracked_run\n"
        "def write(name):\n"
        "    with tracked_run('train', name, config=TrackingConfig(uri=sys.argv[1])) as run:\n"
        "        for step in range(600):\n"
        "            run.log_metrics({'loss': step}, step=step)\n"
        "        run.log_text('done', 'done.txt')\n"
        "fork = multiprocessing.get_context('fork')\n"
        "workers = [fork.Process(target=write, args=(name,)) for name in ('w0', 'w1')]\n"
        "[worker.start() for worker in workers]\n"
        "[worker.join() for worker in workers]\n"
        "assert [worker.exitcode for worker in workers] == [0, 0]\n"
    )
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    done = subprocess.run([sys.executable, "-c", script, uri], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    client = _client(uri)
    runs = client.search_runs([client.get_experiment_by_name("lipflow").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["w0", "w1"]
    assert all(len(client.get_metric_history(run.info.run_id, "loss")) == 600 for run in runs)


def test_default_store_is_a_database_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri(TrackingConfig()) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert resolve_tracking_uri(TrackingConfig()) == f"sqlite:///{tmp_path}/other.db"
    assert resolve_tracking_uri(TrackingConfig(uri="http://127.0.0.1:1")) == "http://127.0.0.1:1"


def test_default_store_is_refused_in_a_folder_that_ray_deletes(tmp_path, monkeypatch):
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        resolve_tracking_uri(TrackingConfig())


def test_store_that_cannot_be_used_is_a_quick_one_line_error(tmp_path, monkeypatch):
    with pytest.raises(TrackingError, match="cannot write the tracking database"):
        initialise(TrackingConfig(uri=f"sqlite:///{tmp_path}/absent/mlflow.db"))
    monkeypatch.setattr("cluster.records.tracking._SERVER_TRIES", 1)
    with pytest.raises(TrackingError, match="no MLflow server answers") as caught:
        initialise(TrackingConfig(uri="http://user:hunter22@127.0.0.1:9"))
    assert "hunter22" not in str(caught.value)


def test_secrets_are_known_by_name_and_by_value(monkeypatch):
    assert is_secret_name("AWS_SECRET_ACCESS_KEY")
    assert is_secret_name("mlflow_tracking_password")
    assert is_secret_name("hf-token")
    assert not is_secret_name("keypoints")
    assert not is_secret_name("tokens_per_batch")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "opensesame")
    assert redact_text("say opensesame") == f"say {REDACTED}"
    assert redact({"a": [{"token": "x"}], "b": None, "c": 3}) == {"a": [{"token": REDACTED}], "b": None, "c": 3}


def test_settings_are_flattened_with_dotted_names():
    assert flatten({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": {}}) == {"a.b": "1", "a.c.d": "[1, 2]", "e": "{}"}


def _client(uri):
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)
