"""A job whose MLflow goes away: it never waits for it, and what it logged arrives once it is back, or is kept."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.records.outbox import TrackingError
from cluster.records.run import LOST_METRICS_TAG
from cluster.records.tracking import TrackingConfig, attached_run, open_client, tracked_run
from tests.cluster.records.mlflow_server import mlflow_server

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

LONG_S = 240.0


def history(config: TrackingConfig, run_id: str, key: str = "loss") -> list[tuple[int, float]]:
    points = open_client(config).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def away(*arguments, **named):
    from mlflow.exceptions import MlflowException

    raise MlflowException("the server is away\nfor a moment")


@pytest.fixture
def brief(tracking_config, tmp_path) -> TrackingConfig:
    """A job that waits for no store, and whose OUT is the test's folder."""
    return tracking_config.model_copy(update={"wait_s": 0.2, "unsent_dir": str(tmp_path)})


def test_job_whose_store_stays_away_ends_well_and_keeps_its_metrics_in_a_file(brief, tmp_path, monkeypatch, caplog):
    with tracked_run("train", "lost", config=brief) as run:
        monkeypatch.setattr(run.client, "log_batch", away)
        monkeypatch.setattr(run.client, "set_terminated", away)
        run.log_metrics({"loss": 1.5, "other": float("nan")}, step=3)
        run.log_metrics({"loss": 0.5}, step=4)
    (kept,) = (tmp_path / "unsent-metrics").iterdir()
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(line["key"], line["step"]) for line in lines] == [("loss", 3), ("other", 3), ("loss", 4)]
    assert [line["value"] for line in lines if line["key"] == "loss"] == [1.5, 0.5]
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert f"run {run.run_id} lacks 3 metrics; they are kept in file://{kept}: " in told[1]
    assert told[2].startswith(f"the end of run {run.run_id} (FINISHED) was not recorded: ")
    assert not any("\n" in line for line in told)


def test_what_a_worker_could_not_send_is_sent_by_its_job(brief, tmp_path, monkeypatch):
    with tracked_run("train", "job", config=brief) as run:
        with attached_run(brief, run.run_id) as worker:
            monkeypatch.setattr(worker.client, "log_batch", away)
            for step in range(10):
                worker.log_metrics({"loss": step / 8}, step)
        assert list((tmp_path / "unsent-metrics").iterdir())
        assert history(brief, run.run_id) == []
        run.close(LONG_S, take_back=True)
    assert history(brief, run.run_id) == [(step, step / 8) for step in range(10)]
    assert list((tmp_path / "unsent-metrics").iterdir()) == []


def test_checkpoint_in_an_outage_keeps_the_metrics_in_a_file_until_they_are_sent(brief, tmp_path, monkeypatch):
    with tracked_run("train", "job", config=brief) as run:
        with monkeypatch.context() as patch:
            patch.setattr("cluster.records.run.FLUSH_WAIT_S", 0.2)
            patch.setattr(run.client, "log_batch", away)
            run.log_metrics({"loss": 0.25}, 1)
            run.try_flush()
            (kept,) = (tmp_path / "unsent-metrics").iterdir()
            assert json.loads(kept.read_text())["value"] == 0.25
            with pytest.raises(TrackingError, match=r"not taken within 0 s: .*the server is away"):
                run.flush(0.0)
        run.flush(LONG_S)
        run.try_flush()
        assert not kept.exists()
    assert history(brief, run.run_id) == [(1, 0.25)]


def test_answer_that_got_lost_makes_no_duplicates(brief, monkeypatch):
    with tracked_run("train", "job", config=brief) as run:
        send, answers = run.client.log_batch, []

        def lose_the_first_answer(*arguments, **named):
            send(*arguments, **named)
            answers.append(len(named["metrics"]))
            if len(answers) == 1:
                away()

        monkeypatch.setattr(run.client, "log_batch", lose_the_first_answer)
        for step in range(20):
            run.log_metrics({"loss": step / 8, "bad": float("nan")}, step)
        run.flush(LONG_S)
        assert len(answers) > 1
    assert history(brief, run.run_id) == [(step, step / 8) for step in range(20)]
    assert [step for step, _ in history(brief, run.run_id, "bad")] == list(range(20))


def test_losses_are_stated_in_the_run_beside_those_of_earlier_processes(tracking_config, tmp_path, monkeypatch):
    small = tracking_config.model_copy(update={"most_waiting_metrics": 1000, "unsent_dir": str(tmp_path)})
    with tracked_run("train", "job", config=small) as run:
        for first_step in (0, 5000):
            with attached_run(small, run.run_id) as worker:
                with monkeypatch.context() as patch:
                    patch.setattr(worker.client, "log_batch", away)
                    worker.log_metrics({f"m{index}": 0.0 for index in range(1000)}, first_step)
                    worker._outbox.drain(0.5)
                    # All of the thousand above are on their way now, so that the next thousand just fit.
                    for step in range(first_step + 1, first_step + 1031):
                        worker.log_metrics({"loss": step / 8}, step)
                worker.flush(LONG_S)
    tags = open_client(small).get_run(run.run_id).data.tags
    assert tags[LOST_METRICS_TAG] == "30 metrics of steps 1 to 30; 30 metrics of steps 5001 to 5030"
    assert [step for step, _ in history(small, run.run_id)] == [*range(31, 1031), *range(5031, 6031)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_server_costs_a_step_nothing_and_all_metrics_arrive_once(tmp_path: Path, caplog):
    picture = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    with mlflow_server(tmp_path) as server:
        config = TrackingConfig(uri=server.uri, wait_s=LONG_S, unsent_dir=str(tmp_path / "out"))
        with tracked_run("train", "outage", config=config) as run:
            for step in range(600):
                run.log_metrics({"loss": step / 8, "norm": step}, step)
            run.flush(LONG_S)
            server.kill()
            longest_s = flush_s = 0.0
            for step in range(600, 4600):
                began = time.perf_counter()
                run.log_metrics({"loss": step / 8, "norm": step}, step)
                longest_s = max(longest_s, time.perf_counter() - began)
                if step % 1000 == 0:
                    began = time.perf_counter()
                    run.try_flush()
                    flush_s = max(flush_s, time.perf_counter() - began)
            began = time.perf_counter()
            run.try_log_image(picture, "pictures/face.png")
            picture_s = time.perf_counter() - began
            with pytest.raises(TrackingError, match="refused"):
                run.log_text("not from the background", "note.txt")
            # A worker that starts again in the outage does not need the store either.
            with attached_run(config.model_copy(update={"wait_s": 0.0}), run.run_id) as worker:
                worker.log_metrics({"late": 1.0}, 1)
            assert len(list((tmp_path / "out" / "unsent-metrics").iterdir())) == 2
            server.start()
        found = run.client.get_run(run.run_id)
        assert found.info.status == "FINISHED"
        assert LOST_METRICS_TAG not in found.data.tags
        assert history(config, run.run_id) == [(step, step / 8) for step in range(4600)]
        assert history(config, run.run_id, "norm") == [(step, step) for step in range(4600)]
        assert history(config, run.run_id, "late") == [(1, 1.0)]
        assert Path(run.client.download_artifacts(run.run_id, "pictures/face.png")).stat().st_size > 0
        assert list((tmp_path / "out" / "unsent-metrics").iterdir()) == []
    # Measured 0.005, 0.0001 and 5.1 s; a request to a server that is away takes 4 s, the first checkpoint waits 5 s.
    assert longest_s < 2
    assert picture_s < 2
    assert flush_s < 20
