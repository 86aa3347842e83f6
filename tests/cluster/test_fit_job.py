"""``lipflow fit`` on the session's Ray cluster: what it writes, and what it refuses before Ray starts."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from trimesh import load_mesh

from cluster import cli, command
from cluster.records.tracking import TrackingConfig, load_table
from cluster.scores.frame_fits import FittingConfig, FrameFit
from cluster.scores.scene import context_of
from lipflow.checkpoint import load_avatar, save_avatar
from lipflow.config import AvatarConfig, FitConfig
from lipflow.fitting import fit, fit_sequence
from lipflow.model.avatar import Avatar
from lipflow.render.renderer import Renderer
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.driving.driven import DrivingConfig, with_driving
from pipeline.loading.loader import ShardSet
from pipeline.sharding.shards import ShardConfig, write_shards
from pipeline.sharding.splits import SplitConfig

# Raised inside MLflow, about its own use of SQLAlchemy and pandas.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
]

DOME = DomeConfig(
    cameras=4,
    image_size_hw=(48, 36),
    texture_size=32,
    segments=3,
    frames_per_segment=3,
    headset_image_size_hw=(16, 20),
    supersampling=1,
)
SMALL = AvatarConfig.small(
    texture_size=32,
    latent_size=6,
    hidden_size=12,
    encoder_channels=(6, 5, 4),
    decoder_channels=(6, 5, 4),
    driver_image_size=16,
    driver_channels=(5, 4),
    driver_hidden_size=12,
    flow_hidden_size=8,
)
FIT = FitConfig(iterations=4, optimizer="lbfgs")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    root = tmp_path_factory.mktemp("fit")
    write_dome(DOME, str(root / "capture"))
    splits = SplitConfig(test_fraction=0.67, val_fraction=0.0, test_camera_count=1)
    capture = with_driving(open_capture(root / "capture"), DrivingConfig())
    write_shards(capture, ShardConfig(splits=splits, frames_per_shard=3), str(root / "shards"))
    opened = ShardSet.open(root / "shards")
    assert len({frame_id.split("/")[0] for frame_id in opened.frame_ids("test")}) == 2
    return opened


@pytest.fixture(scope="module")
def model(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An avatar that knows nothing yet: what a fit does with it is the same."""
    folder = tmp_path_factory.mktemp("model")
    save_avatar(Avatar(SMALL, context_of(shards)), folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch, tracking_config: TrackingConfig) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_config.uri or "")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["lipflow", "fit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def codes(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    with safe_open(str(folder / "latents.safetensors"), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["frame_ids"])  # noqa: SIM118


SETTINGS = [f"--set=frames.fit.iterations={FIT.iterations}", "--set=frames.fit.optimizer=lbfgs"]


@pytest.mark.usefixtures("ray_session")
def test_tasks_answer_what_one_fit_of_all_frames_does(shards, model, tmp_path, monkeypatch, capsys, tracking_config):
    extras = ["--meshes", "--set=frames_per_task=4", "--set=frames.uncertainty_samples=4"]
    assert (
        run(
            monkeypatch,
            model,
            shards.uri,
            "--signal",
            "keypoints",
            "--out",
            str(tmp_path),
            "--json",
            *SETTINGS,
            *extras,
        )
        == 0
    )
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((tmp_path / "fit.json").read_text())
    assert (summary["frames"], summary["unseen"], summary["diverged"]) == (6, 0, 0)

    frame_ids = shards.frame_ids("test")
    avatar = load_avatar(model).eval()
    driving = shards.frames(frame_ids, shards.train_camera_ids[:1]).driving
    expected = fit(avatar, Renderer(shards.topology), driving, "keypoints", FIT)
    tensors, named = codes(tmp_path)
    assert named == frame_ids
    assert set(tensors) == {"z", "start", "z_std"}
    # Batches of 4 and 2 instead of 6 round differently; measured worst case 2e-7.
    torch.testing.assert_close(tensors["z"], expected.z, atol=1e-4, rtol=0)
    torch.testing.assert_close(tensors["start"], expected.start, atol=1e-5, rtol=0)
    assert (tensors["z_std"] > 0).all()

    frames = [FrameFit(**row) for row in json.loads((tmp_path / "frames.json").read_text())]
    assert [frame.frame_id for frame in frames] == frame_ids
    assert all(frame.objective <= frame.objective_start for frame in frames)
    assert [frame.stopped for frame in frames] == list(expected.stopped)
    assert load_table(tracking_config, summary["run_id"], "frames.json")[0]["frame_id"] == frame_ids[0]
    with torch.no_grad():
        vertices = avatar.decode_vertices(tensors["z"])
    for row, frame_id in enumerate(frame_ids):
        mesh = load_mesh(tmp_path / "meshes" / f"{frame_id}.ply", process=False)
        np.testing.assert_allclose(mesh.vertices, vertices[row].numpy(), atol=1e-3)
        assert mesh.faces.shape == shards.topology.faces.shape
        spread = np.load(io.BytesIO((tmp_path / "uncertainty" / f"{frame_id}.npy").read_bytes()), allow_pickle=False)
        assert spread.shape == (shards.topology.num_vertices,)
        assert frames[row].vertex_std_mm == pytest.approx(np.sqrt((spread**2).mean()))


@pytest.mark.usefixtures("ray_session")
def test_sequences_follow_a_segment_and_several_signals_are_fitted_at_once(
    shards, model, tmp_path, monkeypatch, capsys
):
    segment = shards.frame_ids("test")[0].split("/")[0]
    signals = ["--signal", "keypoints", "--signal", "frontal"]
    arguments = [model, shards.uri, *signals, "--out", str(tmp_path), "--segment", segment, "--sequences", *SETTINGS]
    assert run(monkeypatch, *arguments, "--set=frames.fit.temporal_weight=0.1") == 0
    assert "3 frames fitted to frontal, keypoints" in capsys.readouterr().out
    tensors, frame_ids = codes(tmp_path)
    assert frame_ids == [frame_id for frame_id in shards.frame_ids("test") if frame_id.startswith(f"{segment}/")]
    driving = shards.frames(frame_ids, shards.train_camera_ids[:1]).driving
    config = FIT.model_copy(update={"temporal_weight": 0.1})
    avatar = load_avatar(model).eval()
    expected = fit_sequence(avatar, Renderer(shards.topology), driving, ("frontal", "keypoints"), config)
    torch.testing.assert_close(tensors["z"], expected.z, atol=1e-5, rtol=0)
    assert not (tmp_path / "meshes").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--signal", "sound"], "--signal sound: the avatar cannot be driven by it, but by hmc, frontal, keypoints"),
        (["--signal", "hmc", "--segment", "NOPE*"], "no segment of the test split is like 'NOPE*'"),
        (["--signal", "hmc", "--split", "val"], "has no val frames"),
        (["--signal", "hmc", "--set", "frames.fit.temporal_weight=1"], "needs sequences=true"),
        (["--signal", "hmc", "--set", "frames.fit.itertions=1"], "did you mean 'iterations'?"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_ray_starts(
    shards, model, tmp_path, monkeypatch, capsys, arguments, expected
):
    monkeypatch.setattr("cluster.fit.ray_cluster", lambda: pytest.fail("Ray was started"))
    assert run(monkeypatch, model, shards.uri, "--out", str(tmp_path / "out"), *arguments) == command.EXIT_USAGE
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out" / "fit.json").exists()


def test_an_avatar_of_another_capture_is_refused(shards, tmp_path, monkeypatch, capsys):
    context = context_of(shards)
    save_avatar(Avatar(SMALL, replace(context, keypoint_names=context.keypoint_names[:-1])), tmp_path / "other")
    arguments = [str(tmp_path / "other"), shards.uri, "--signal", "keypoints", "--out", str(tmp_path / "out")]
    assert run(monkeypatch, *arguments) == command.EXIT_USAGE
    assert "the avatar was made for keypoints" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"uncertainty_samples": 1}, "one sample has no spread"),
        ({"uncertainty_samples": 8, "fit": FitConfig(prior_weight=0.0)}, "prior_weight is 0"),
        ({"fit": FitConfig(temporal_weight=0.5)}, "needs sequences=true"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings, expected):
    with pytest.raises(ValidationError, match=expected):
        FittingConfig(**settings)
