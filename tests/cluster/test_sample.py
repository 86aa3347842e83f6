"""``lipflow sample``: its figures by hand, its pictures, and the whole job on the session's Ray cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from cluster import cli
from cluster.records.tracking import TrackingConfig, open_client
from cluster.reports.pictures import heat_map, heat_over_face
from cluster.sample import SampleRecipe, sample
from cluster.scores.sample_tasks import (
    NO_SIGNAL,
    ComparedSet,
    DrawFigures,
    OpenSpread,
    SpreadResult,
    compare,
    compare_sets,
    open_spread,
)
from cluster.scores.samples import random_sheet, spread_sheet, summarised
from cluster.scores.scene import context_of
from lipflow.checkpoint import load_avatar, save_avatar
from lipflow.config import AvatarConfig, RenderConfig
from lipflow.errors import ConfigError
from lipflow.model.avatar import Avatar
from lipflow.sample_metrics import diversity_mm, fit_mesh_pca
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.loading.loader import ShardSet
from pipeline.sharding.shards import ShardConfig, write_shards

# Raised inside MLflow, about its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

DOME = DomeConfig(
    cameras=3,
    image_size_hw=(24, 18),
    texture_size=32,
    segments=5,
    frames_per_segment=3,
    headset_image_size_hw=(8, 8),
    supersampling=1,
)
TINY = {
    "texture_size": 32,
    "latent_size": 6,
    "hidden_size": 12,
    "encoder_channels": (6, 5, 4),
    "decoder_channels": (6, 5, 4),
    "driver_image_size": 16,
    "driver_channels": (5, 4),
    "driver_hidden_size": 12,
    "flow_hidden_size": 8,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    root = tmp_path_factory.mktemp("sample")
    write_dome(DOME, str(root / "dome"))
    write_shards(open_capture(str(root / "dome")), ShardConfig(frames_per_shard=5), str(root / "shards"))
    return ShardSet.open(str(root / "shards"))


@pytest.fixture(scope="module")
def avatars(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Untrained avatars of three methods, with decoders that move."""
    root = tmp_path_factory.mktemp("avatars")
    for method in ("dam", "flow-gaussian", "lipflow"):
        signals = ("keypoints",) if method == "lipflow" else None
        avatar = Avatar(AvatarConfig(**TINY, method=method, signals=signals), context_of(shards))
        save_avatar(avatar, root / method)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def recipe(tracking_config: TrackingConfig) -> SampleRecipe:
    return SampleRecipe(count=8, repeats=2, neighbours=2, spread_frames=1, spread_draws=4, rows=1, columns=4,
                        tracking=tracking_config)  # fmt: skip


def shapes(count: int, seed: int) -> torch.Tensor:
    return 10 * torch.randn(count, 5, 3, generator=torch.Generator().manual_seed(seed))


def test_real_meshes_compared_with_themselves_are_perfect_and_with_a_point_are_not():
    real = shapes(12, seed=0)
    space = fit_mesh_pca(real, 4)
    same = compare(real, real.flip(0), space, neighbours=3)
    # measured: 0
    assert same.frechet_mm2 < 1e-9
    assert (same.precision, same.recall) == (1, 1)
    assert same.diversity_mm == pytest.approx(diversity_mm(real))
    collapsed = compare(real, real[:1].expand(12, -1, -1), space, neighbours=3)
    variance = space.project(real).var(0).sum()
    distance = (space.project(real).mean(0) - space.project(real[:1])[0]).square().sum()
    assert collapsed.frechet_mm2 == pytest.approx(float(variance + distance), rel=1e-6)
    assert (collapsed.precision, collapsed.diversity_mm) == (1, 0)
    # Balls of radius 0 around one real mesh hold that mesh alone.
    assert collapsed.recall == pytest.approx(1 / 12)
    with pytest.raises(ValueError, match="equal counts"):
        compare(real, real[:6], space, neighbours=3)


def test_repeats_are_summarised_by_mean_and_standard_deviation():
    figures = (DrawFigures(1, 0.5, 0.2, 3), DrawFigures(3, 0.5, 0.4, 7))
    row = summarised(ComparedSet("random", "train", 9, figures))
    assert (row.count, row.repeats) == (9, 2)
    assert (row.frechet_mm2.mean, row.frechet_mm2.std) == (2, pytest.approx(2**0.5))
    assert (row.precision.mean, row.precision.std) == (0.5, 0)
    assert (row.diversity_mm.mean, row.diversity_mm.std) == (5, pytest.approx(8**0.5))
    assert summarised(ComparedSet("real", "test", 9, figures[:1])).recall.std is None


def test_sets_are_compared_at_equal_counts_and_repeat_with_their_seeds(shards, avatars):
    train, test = shards.frame_ids("train")[:8], shards.frame_ids("test")[:3]
    arguments = (avatars["dam"], shards.uri, train, test)
    found, again = (compare_sets(*arguments, seeds=(0, 1), components=3, neighbours=2) for _ in range(2))
    assert found == again
    assert [(one.meshes, one.against, one.count, len(one.figures)) for one in found.sets] == [
        ("random", "train", 8, 2),
        ("reconstructed", "train", 8, 1),
        ("random", "test", 3, 2),
        ("reconstructed", "test", 3, 1),
        ("real", "test", 3, 1),
    ]
    first, second = found.sets[0].figures
    assert first != second
    assert found.components == 3
    assert 0.5 < found.explained <= 1
    # Two held-out frames have no second neighbour.
    few = compare_sets(*arguments[:3], test[:2], seeds=(0, 1), components=3, neighbours=2)
    assert few.sets == found.sets[:2]


def test_the_spread_of_a_signal_is_that_of_its_draws(shards, avatars):
    frame, camera = shards.frame_ids("test")[0], shards.train_camera_ids[0]
    settings = (frame, "keypoints", camera, 5, 2, 0)
    result = open_spread(avatars["lipflow"], shards.uri, RenderConfig(), *settings)
    avatar = load_avatar(Path(avatars["lipflow"]))
    batch = shards.frames([frame], [camera])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        prior = avatar.prior("keypoints", batch.driving)
        draws = torch.cat([avatar.flow.inverse(prior.sample(generator)) for _ in range(5)])
        meshes = avatar.decode_vertices(draws).double()
        start = avatar.decode_vertices(avatar.start(prior))
    std = meshes.var(0).sum(-1).sqrt()
    assert result.row.spread_mm == pytest.approx(float(std.square().mean().sqrt()), rel=1e-4)
    assert result.row.error_mm == pytest.approx(
        float((start - batch.vertices).square().sum(-1).mean().sqrt()), rel=1e-4
    )
    inside = result.heat_mm[result.mask]
    assert float(std.min()) - 1e-4 <= inside.min() <= inside.max() <= float(std.max()) + 1e-4
    assert not result.heat_mm[~result.mask].any()
    assert 0.1 < result.mask.mean() < 0.95
    assert len(result.drawn) == 2
    assert result.start.shape == result.drawn[0].shape == (*result.mask.shape, 3)
    nothing = open_spread(avatars["dam"], shards.uri, RenderConfig(), frame, NO_SIGNAL, *settings[2:])
    assert nothing.row.error_mm is None
    assert nothing.row.spread_mm > 0


def test_heat_over_a_face_is_white_outside_and_brightest_at_full_scale():
    values = np.array([[0.0, 2.0, 5.0]])
    mask = np.array([[True, True, False]])
    face = np.full((1, 3, 3), 100, np.uint8)
    picture = heat_over_face(values, face, mask, full_scale=2.0)
    expected = np.round(0.75 * heat_map(values, 2.0)[0, :2] + 25)
    np.testing.assert_array_equal(picture[0, :2], expected)
    np.testing.assert_array_equal(picture[0, 2], 255)
    with pytest.raises(ValueError, match="differ in size"):
        heat_over_face(values, face, mask.T, full_scale=2.0)


def spread_result(signal: str, heat: float) -> SpreadResult:
    face = np.full((20, 16, 3), 90, np.uint8)
    row = OpenSpread(signal, "SEG/000001", 4, heat, None)
    return SpreadResult(row, face[:10, :8], face, [face, face], np.full((20, 16), heat, np.float32), face[..., 0] > 0)


def test_sheets_have_a_row_for_each_set_and_show_more_spread_brighter():
    little, much = (spread_sheet([spread_result("hmc", 0.2), spread_result(NO_SIGNAL, v)], "dam") for v in (0.5, 2.0))
    assert little.shape[0] == much.shape[0] > 2 * 224
    # The first row's own spread is the same: against a larger full scale it is darker.
    assert much[150:300, -100:].mean() < little[150:300, -100:].mean()
    tiles = [np.full((10, 8, 3), 120, np.uint8)] * 4
    assert random_sheet(tiles, tiles * 2, 4, "dam").shape[0] > random_sheet(tiles, tiles, 4, "dam").shape[0] + 200


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lipflow", "sample", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.usefixtures("ray_session")
def test_the_job_writes_figures_and_pictures_and_logs_them(shards, avatars, recipe, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    settings = [f"--set={name}={json.dumps(value)}" for name, value in recipe.model_dump(mode="json").items()]
    code = called(monkeypatch, avatars["lipflow"], shards.uri, "--out", str(out), "--json", *settings)
    assert code == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "samples.json").read_text())
    assert [row["signal"] for row in document["spreads"]] == ["keypoints", NO_SIGNAL]
    assert document["rows"][0]["count"] == 8
    for name in ("random", "spread"):
        with Image.open(out / "pictures" / f"{name}.png") as picture:
            assert min(picture.size) > 200
    client = open_client(recipe.tracking)
    run = client.get_run(document["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["random.train.frechet_mm2"] == pytest.approx(document["rows"][0]["frechet_mm2"]["mean"])
    assert run.data.metrics["spread.keypoints.mm"] > 0
    logged = {file.path for folder in (None, "pictures") for file in client.list_artifacts(run.info.run_id, folder)}
    assert {"samples.json", "pictures/random.png", "pictures/spread.png"} <= logged


@pytest.mark.usefixtures("ray_session")
def test_methods_without_drivers_show_the_spread_without_a_signal(shards, avatars, recipe, tmp_path):
    samples = sample(avatars["flow-gaussian"], shards.uri, str(tmp_path / "out"), recipe)
    assert samples.method == "flow-gaussian"
    assert [row.signal for row in samples.spreads] == [NO_SIGNAL]
    assert samples.rows[0].frechet_mm2.std > 0


def test_what_cannot_be_sampled_is_refused_in_one_line(shards, avatars, recipe, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out")
    for changes, message in (
        ({"signals": ("hmc",)}, "no driver for hmc"),
        ({"camera": "nowhere"}, "camera 'nowhere' is none"),
        ({"neighbours": 100}, "more than 100"),
    ):
        with pytest.raises(ConfigError, match=message):
            sample(avatars["lipflow"], shards.uri, out, recipe.model_copy(update=changes))
    with pytest.raises(ValidationError, match="columns"):
        SampleRecipe(columns=3)
    tracking = f"--set=tracking.uri={recipe.tracking.uri}"
    assert called(monkeypatch, str(tmp_path / "none"), shards.uri, "--out", out, tracking) == 2
    assert capsys.readouterr().err.count("\n") == 1
