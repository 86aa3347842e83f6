"""Synthesise, shard, train, evaluate, promote, on the session's Ray cluster and one MLflow store."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.compare import CompareRecipe, compare
from cluster.evaluate import EvaluateRecipe, evaluate, evaluate_models
from cluster.promote import PromoteRecipe, promote_model
from cluster.records.evaluations import find_scores
from cluster.records.promotion import PromotionDecision
from cluster.records.registry import download_model, find_version
from cluster.records.tracking import KIND_TAG, MODEL_TAG, PARENT_RUN_TAG, SHARDS_DIGEST_TAG, load_table, open_client
from cluster.scores.evaluation import Evaluation
from cluster.scores.scoring import calibrate_colors
from cluster.shard import ShardRecipe, shard
from cluster.synth import synthesise
from cluster.train import TrainSummary, train
from lipflow.checkpoint import load_avatar
from lipflow.config import FitConfig, RenderConfig
from lipflow.regions import face_regions, vertex_regions
from lipflow.render.renderer import Renderer
from lipflow.types import DRIVING_SIGNALS
from pipeline import storage
from pipeline.loading.loader import ShardSet

# Raised inside MLflow, about its own use of SQLAlchemy and pandas.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
]


@dataclass(frozen=True)
class Finished:
    """What all jobs came to."""

    out: Path
    trained: TrainSummary
    evaluation: Evaluation
    decision: PromotionDecision


@pytest.fixture(scope="module")
def finished(shards, tiny_training, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("pipeline")
    trained = train(shards.uri, str(out / "avatar"), tiny_training(shards.tracking))
    evaluation = evaluate(
        trained.model or "",
        shards.uri,
        str(out / "evaluation"),
        EvaluateRecipe(fit=FitConfig(iterations=2), tracking=shards.tracking, picture_frames=1, failure_frames=1),
        parent_run=trained.run_id,
    )
    decision = promote_model(trained.model or "", PromoteRecipe(tracking=shards.tracking))
    return Finished(out, trained, evaluation, decision)


def _modification_times(folder: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in storage.local_path(folder).rglob("*")}


def test_synthesis_and_shards_have_what_was_planned(shards):
    assert (shards.synth.segments, shards.synth.frames) == (4, 12)
    # Seven dome cameras and the headset's.
    assert shards.synth.views > 12 * shards.dome.cameras
    assert sum(shards.summary.frames.values()) == 12
    assert set(shards.summary.frames) == {"train", "val", "test"}
    assert (shards.summary.cameras, len(shards.summary.held_out_cameras)) == (7, 2)
    assert shards.summary.written


def test_a_second_synthesis_and_a_second_sharding_write_nothing(shards):
    before = _modification_times(shards.capture) | _modification_times(shards.uri)
    again = synthesise(shards.capture, shards.dome)
    assert again.views == 0
    summary = shard(shards.capture, shards.uri, ShardRecipe(shard=shards.config, tracking=shards.tracking))
    assert not summary.written
    assert summary.digest == shards.summary.digest
    assert _modification_times(shards.capture) | _modification_times(shards.uri) == before


def test_every_job_is_a_finished_run_linked_to_what_it_grew_out_of(shards, finished: Finished):
    client = open_client(shards.tracking)
    experiment = client.get_experiment_by_name(shards.tracking.experiment)
    runs = {run.data.tags[KIND_TAG]: run for run in client.search_runs([experiment.experiment_id])}
    assert {"shard", "train", "evaluate", "promote"} <= set(runs)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {run.data.tags[SHARDS_DIGEST_TAG] for run in runs.values()} == {shards.summary.digest}
    train_id = finished.trained.run_id
    assert runs["train"].info.run_id == train_id
    assert runs["evaluate"].data.tags[PARENT_RUN_TAG] == train_id
    assert runs["promote"].data.tags[PARENT_RUN_TAG] == train_id
    pictures = {file.path for file in client.list_artifacts(finished.evaluation.run_id, "pictures")}
    assert pictures == {f"pictures/{name}.png" for name in ("encoder", *DRIVING_SIGNALS)}


def test_metric_histories_have_every_step(shards, finished: Finished):
    client = open_client(shards.tracking)

    def steps(metric: str) -> list[int]:
        return [point.step for point in client.get_metric_history(finished.trained.run_id, metric)]

    terms = [key for key in client.get_run(finished.trained.run_id).data.metrics if key.startswith("train/")]
    residuals = {f"train/prior_residual_rms_{signal}" for signal in DRIVING_SIGNALS}
    assert {"train/total", "train/image", "train/geometry", "train/gradient_norm"} <= set(terms)
    assert {"train/posterior_std"} | residuals <= set(terms)
    assert all(steps(term) == [1, 2, 3, 4, 5, 6] for term in terms)
    assert steps("val/loss") == [3, 6]
    losses = {point.step: point.value for point in client.get_metric_history(finished.trained.run_id, "val/loss")}
    assert finished.trained.validation_loss == losses[finished.trained.best_step] == min(losses.values())


def test_the_model_is_champion_and_loads(shards, finished: Finished, tmp_path: Path):
    client = open_client(shards.tracking)
    challenger, champion = (find_version(client, "lipflow", alias) for alias in ("challenger", "champion"))
    assert finished.decision.promoted
    assert finished.trained.model == f"models:/lipflow/{champion.version}"
    assert challenger.version == champion.version
    registered = load_avatar(download_model("models:/lipflow@champion", tmp_path, shards.tracking))
    written = load_avatar(storage.local_path(finished.trained.avatar))
    for name, weights in written.state_dict().items():
        assert torch.equal(weights, registered.state_dict()[name]), name


def test_the_version_and_its_runs_lead_to_the_scores_and_the_card_tells_them(shards, finished: Finished):
    sheet = finished.evaluation.sheet
    for uri in (finished.trained.model, f"runs:/{finished.trained.run_id}", f"runs:/{finished.evaluation.run_id}"):
        assert find_scores(uri or "", shards.tracking, sheet.name) == sheet, uri
    rows = load_table(shards.tracking, finished.evaluation.run_id, "scores.json")
    assert [(row["frame_id"], row["latent"], row["iterations"]) for row in rows] == [
        (score.frame_id, score.latent, score.iterations) for score in sheet.scores
    ]
    client = open_client(shards.tracking)
    assert client.get_run(finished.evaluation.run_id).data.tags[MODEL_TAG] == finished.trained.model
    card = find_version(client, "lipflow", "champion").description
    assert f"| fitted.psnr_db | {finished.evaluation.metrics()['fitted.psnr_db']:.6g} |" in card
    assert f"captures: {ShardSet.open(shards.uri).manifest.captures[0].uri}" in card
    assert {row.signal for row in finished.decision.rows} == {"fitted", "encoder", *DRIVING_SIGNALS}


def test_evaluation_has_all_quadrants_and_every_signal_before_and_after_the_fit(finished: Finished):
    rows = {
        (row.latent, row.iterations, row.cameras, row.expressions, row.calibrated): row
        for row in finished.evaluation.rows
    }
    quadrants = {key[2:] for key in rows if key[0] == "encoder"}
    assert quadrants == {
        (cameras, expressions, calibrated)
        for expressions in ("train", "held-out")
        for cameras, calibrated in (("train", False), ("held-out", False), ("held-out", True))
    }
    for signal in DRIVING_SIGNALS:
        assert {(signal, iterations, "train", "held-out", False) for iterations in (0, 2)} <= set(rows)
        assert len(finished.evaluation.fit_traces[signal]) > 0
    assert ("mean face", 0, "train", "held-out", False) in rows
    for row in rows.values():
        assert row.psnr_db.low <= row.psnr_db.mean <= row.psnr_db.high
        assert np.isfinite([row.psnr_db.mean, row.ssim.mean, row.geometry_rmse_mm.mean]).all()
    # Solving a camera's colours must not make them worse than gain 1 and bias 0.
    for expressions in ("train", "held-out"):
        uncalibrated, calibrated = (
            rows["encoder", 0, "held-out", expressions, solved].psnr_db.mean for solved in (False, True)
        )
        assert calibrated > uncalibrated
    document = json.loads((finished.out / "evaluation" / "evaluation.json").read_text())
    assert len(document["rows"]) == len(rows)


def test_an_evaluation_is_written_whole_and_its_scores_give_its_tables_again(finished: Finished, tmp_path: Path):
    out = finished.out / "evaluation"
    names = {"quadrants", "training-quadrant", "quadrant-regions", "driven", "driven-regions", "driven-ratios"}
    assert {path.stem for path in (out / "tables").iterdir()} == names
    page = (out / "report.html").read_text()
    assert "Driven by one signal, by region" in page
    assert "Worst frames: lipflow, hmc" in page
    latents = ("encoder", *DRIVING_SIGNALS)
    metrics = ("image_mse", "geometry_rmse_mm")
    assert {path.stem for path in (out / "failures").iterdir()} == {f"{a}-{b}" for a in latents for b in metrics}
    again = compare([str(out)], str(tmp_path), CompareRecipe())
    assert (tmp_path / "tables.md").read_text() == (out / "tables.md").read_text()
    assert again.sheets[0] == finished.evaluation.sheet


def four_samples_a_pixel(renderer, vertices, textures, batch) -> tuple[np.ndarray, np.ndarray]:
    """Mean image ``(K, 3, H, W)``, and ``(K, H, W)`` the triangle of a pixel that is covered whole, else -1."""
    height, width = batch.images.shape[-2:]
    fine = replace(batch.cameras, intrinsics=batch.cameras.intrinsics * torch.tensor([[2.0], [2.0], [1.0]]))
    drawn = renderer.render(vertices, textures, fine, (2 * height, 2 * width))
    image = drawn.image[0].numpy().reshape(-1, 3, height, 2, width, 2).mean((3, 5))
    triangles = drawn.triangle_id[0].numpy().reshape(-1, height, 2, width, 2)
    return image, np.where((triangles >= 0).all((2, 4)), triangles[:, :, 1, :, 1], -1)


def test_scores_agree_with_metrics_of_a_rendering_by_hand(shards, finished: Finished):
    """The encoder's row of one held-out frame, rendered and measured here view by view and region by region."""
    shard_set = ShardSet.open(shards.uri)
    sheet = finished.evaluation.sheet
    frame_id = sheet.held_out_frames[0]
    score = next(
        score
        for score in sheet.scores
        if (score.frame_id, score.latent, score.cameras) == (frame_id, "encoder", "train")
    )
    avatar, renderer = load_avatar(storage.local_path(finished.trained.avatar)).eval(), Renderer(shard_set.topology)
    labels = vertex_regions(shard_set.topology, shard_set.normalization.vertices_mean)
    of_faces = face_regions(shard_set.topology, labels)
    assert shard_set.frontal_camera_id not in sheet.train_cameras
    batch = shard_set.frames([frame_id], list(sheet.train_cameras))
    with torch.no_grad():
        z = avatar.encode(batch.vertices, batch.average_texture).mean
        decoded = avatar.decode(z, batch.cameras.view_vectors())
        textures = avatar.correct_color(decoded.textures, batch.camera_index)
        image, _ = four_samples_a_pixel(renderer, decoded.vertices, textures, batch)
        _, triangles = four_samples_a_pixel(renderer, batch.vertices, textures, batch)
        ours = image.clip(0, 255)
    errors = ((ours - batch.images[0].numpy().astype(np.float64)) ** 2).mean(1)
    seen = triangles >= 0
    mse = np.mean([error[mask].mean() for error, mask in zip(errors, seen, strict=True)])
    assert score.image_mse == pytest.approx(mse, rel=1e-5)
    mouth = seen & (of_faces[triangles] == 0)
    assert score.image_mse_mouth == pytest.approx(errors[mouth].mean(), rel=1e-5)
    distance = np.linalg.norm(decoded.vertices[0].numpy() - batch.vertices[0].numpy(), axis=-1)
    assert score.geometry_rmse_mm_eyes == pytest.approx(np.sqrt((distance[labels == 1] ** 2).mean()), rel=1e-5)
    mean_texture = textures[0].mean(0).numpy() - batch.average_texture[0].numpy()
    compared = shard_set.topology.weight_mask > 0
    assert score.texture_mse == pytest.approx((mean_texture[:, compared] ** 2).mean(), rel=1e-4)


def test_jitter_is_that_of_three_neighbours_by_hand(shards, finished: Finished):
    """Every segment has three frames, so the middle one alone has neighbours on both sides."""
    shard_set = ShardSet.open(shards.uri)
    sheet = finished.evaluation.sheet
    middle = sheet.held_out_frames[1]
    scores = [score for score in sheet.scores if score.latent == "hmc" and score.cameras == "train"]
    assert {score.frame_id for score in scores if score.jitter_mm is not None} == {middle}
    before, at, after = shard_set.frames(list(sheet.held_out_frames), [], signals=()).vertices.numpy()
    expected = np.linalg.norm(after - 2 * at + before, axis=-1).mean()
    score = next(score for score in scores if score.frame_id == middle)
    assert score.target_jitter_mm == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_several_models_are_scored_on_the_same_frames_and_stand_in_one_table(
    shards, finished: Finished, tmp_path: Path
):
    recipe = EvaluateRecipe(
        protocol="lipflow",
        fit_iterations=(0, 1, 3),
        signals=("keypoints",),
        tracking=shards.tracking,
        picture_frames=1,
        failure_frames=1,
    )
    avatar = finished.trained.avatar
    models = [f"a={avatar}", f"b={avatar}", f"b={avatar}"]
    comparison, evaluations = evaluate_models(models, shards.uri, str(tmp_path), recipe)
    assert [evaluation.sheet.name for evaluation in evaluations] == ["a", "b", "b"]
    driven, ratios = (next(t for t in comparison.tables if t.name == name) for name in ("driven", "driven-ratios"))
    kept = [row.labels for row in driven.rows if row.labels[0] == "keypoints"]
    assert kept == [("keypoints", name, iterations) for name in "ab" for iterations in ("0", "1", "3")]
    assert "over 2 seeds" in driven.note
    # The same avatar: its own last row over the baseline's is exactly 1.
    (same,) = (row.cells for row in ratios.rows if row.labels == ("keypoints", "b", "3"))
    assert [(cell.mean, cell.low, cell.high) for cell in same] == [(1, 1, 1)] * 2
    # One fit gives all rows, and the start is that of the other protocol's evaluation.
    first = evaluations[0].sheet.scores
    starts = {s.frame_id: s.image_mse for s in first if (s.latent, s.iterations) == ("keypoints", 0)}
    assert starts == {
        score.frame_id: pytest.approx(score.image_mse, rel=1e-5)
        for score in finished.evaluation.sheet.scores
        if (score.latent, score.iterations) == ("keypoints", 0)
    }
    assert evaluations[0].sheet.train_frames == ()
    assert {path.name for path in tmp_path.iterdir()} >= {
        "a",
        "b-0",
        "b-1",
        "tables.md",
        "report.html",
        "evaluation.json",
    }


def test_fitted_latents_load_back_from_the_store_and_from_the_output(shards, finished: Finished):
    logged = load_table(shards.tracking, finished.evaluation.run_id, "latents.json")
    written = json.loads((finished.out / "evaluation" / "latents.json").read_text())
    assert [(row["latent"], row["frame_id"]) for row in logged] == [(row["latent"], row["frame_id"]) for row in written]
    # MLflow keeps ten decimals.
    np.testing.assert_allclose([row["z"] for row in logged], [row["z"] for row in written], rtol=0, atol=1e-10)
    shard_set = ShardSet.open(shards.uri)
    held_out = set(shard_set.frame_ids("test"))
    for latent in DRIVING_SIGNALS:
        assert {row["frame_id"] for row in logged if row["latent"] == latent} == held_out
    avatar = load_avatar(storage.local_path(finished.trained.avatar))
    assert {len(row["z"]) for row in logged} == {avatar.config.latent_size}
    # The encoder's latents are what the registered avatar's encoder gives.
    row = next(row for row in logged if row["latent"] == "encoder")
    batch = shard_set.frames([row["frame_id"]], shard_set.train_camera_ids[:1])
    with torch.no_grad():
        mean = avatar.eval().encode(batch.vertices, batch.average_texture).mean[0]
    np.testing.assert_allclose(row["z"], mean.numpy(), atol=1e-5)


def test_calibration_of_held_out_cameras_is_least_squares_by_hand(shards, finished: Finished):
    shard_set = ShardSet.open(shards.uri)
    frame_id = shard_set.frame_ids("train")[0]
    colors = calibrate_colors(finished.trained.avatar, shards.uri, RenderConfig(), [frame_id])
    assert set(colors) == set(shard_set.test_camera_ids)
    avatar = load_avatar(storage.local_path(finished.trained.avatar)).eval()
    renderer = Renderer(shard_set.topology)
    camera_id = shard_set.test_camera_ids[0]
    batch = shard_set.frames([frame_id], [camera_id])
    with torch.no_grad():
        z = avatar.encode(batch.vertices, batch.average_texture).mean
        decoded = avatar.decode(z, batch.cameras.view_vectors())
        image, triangles = four_samples_a_pixel(renderer, decoded.vertices, decoded.textures, batch)
        _, tracked = four_samples_a_pixel(renderer, batch.vertices, decoded.textures, batch)
    seen = ((triangles >= 0) & (tracked >= 0))[0]
    for channel in range(3):
        predicted = image[0, channel][seen].astype(np.float64)
        target = batch.images[0, 0, channel].numpy()[seen].astype(np.float64)
        design = np.stack([predicted, np.ones_like(predicted)], -1)
        (gain, bias), *_ = np.linalg.lstsq(design, target, rcond=None)
        np.testing.assert_allclose(colors[camera_id][0][channel], gain, rtol=1e-3)
        np.testing.assert_allclose(colors[camera_id][1][channel], bias, atol=0.2)


def test_a_finished_training_is_not_run_again(shards, finished: Finished, tiny_training):
    before = _modification_times(str(finished.out / "avatar"))
    assert train(shards.uri, str(finished.out / "avatar"), tiny_training(shards.tracking)) == finished.trained
    assert _modification_times(str(finished.out / "avatar")) == before
