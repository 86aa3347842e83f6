"""What a training tells: each metric at its steps, and pictures."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from pathlib import Path

import pytest
import ray
import requests
from PIL import Image

from cluster.records.tracking import open_client, tracked_run
from tests.cluster.training.training_runs import train_alone

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


def test_losses_speeds_and_pictures_are_told_at_their_steps(training, tracking_config, tmp_path: Path):
    told = training(
        "told", tracking=tracking_config, log_every_steps=2, pictures_every_steps=3, steps=5, checkpoint_every_steps=4
    )
    with tracked_run("train", "told", config=tracking_config) as run:
        train_alone(dataclasses.replace(told, run_id=run.run_id))
    client = open_client(tracking_config)
    history = {
        name: {point.step: point.value for point in client.get_metric_history(run.run_id, name)}
        for name in client.get_run(run.run_id).data.metrics
    }
    assert all(math.isfinite(value) for points in history.values() for value in points.values())
    assert set(history.pop("val/loss")) == {4, 5}
    assert {frozenset(points) for points in history.values()} == {frozenset({2, 4, 5})}
    terms = ("total", "image", "geometry", "latent", "latent_hmc", "prior_image", "posterior_std")
    others = ("train/gradient_norm", "train/learning_rate", "train/prior_residual_rms_keypoints")
    speeds = ("speed/views_per_s", "speed/frames_per_s", "speed/data_wait_share")
    assert {f"train/{term}" for term in terms} | set(others) | set(speeds) <= set(history)
    # One frame of two views in each of two micro-batches.
    for step in (2, 4, 5):
        assert history["speed/views_per_s"][step] == pytest.approx(2 * history["speed/frames_per_s"][step])
        assert 0 <= history["speed/data_wait_share"][step] <= 1
    assert history["train/learning_rate"][2] == pytest.approx(told.recipe.learning_rate)
    (picture,) = client.list_artifacts(run.run_id, "pictures")
    assert picture.path == "pictures/step-00000003.png"
    with Image.open(client.download_artifacts(run.run_id, picture.path, str(tmp_path))) as sheet:
        assert min(sheet.size) > 200


@pytest.mark.slow
def test_ray_s_metrics_endpoint_shows_the_run_s_step_losses_and_speeds(ray_session, training, tracking_config):
    told = training("scraped", tracking=tracking_config, log_every_steps=1, steps=3, checkpoint_every_steps=3)
    with tracked_run("train", "scraped", config=tracking_config) as run:
        train_alone(dataclasses.replace(told, run_id=run.run_id))
    (node,) = ray.nodes()
    address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    shown: dict[str, float] = {}
    deadline = time.monotonic() + 60  # Ray tells every 10 s
    while "step" not in shown and time.monotonic() < deadline:
        time.sleep(0.5)
        lines = [line for line in requests.get(address, timeout=30).text.splitlines() if run.run_id in line]
        found = [re.match(r"ray_lipflow_train_(\w+)\{.*\} (\S+)$", line) for line in lines]
        shown = {match[1]: float(match[2]) for match in found if match is not None}
    history = open_client(tracking_config).get_run(run.run_id).data.metrics
    assert shown == pytest.approx(
        {
            "step": 3.0,
            "loss": history["train/total"],
            "validation_loss": history["val/loss"],
            "views_per_s": history["speed/views_per_s"],
            "data_wait_share": history["speed/data_wait_share"],
        }
    )
