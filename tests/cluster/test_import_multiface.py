"""``lipflow import-multiface``: a checkpoint and its capture become an avatar, on disk or S3, or one clear error."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cluster import cli
from cluster.import_multiface import import_multiface
from lipflow.checkpoint import CheckpointError, load_avatar
from lipflow.errors import CaptureError, ConfigError
from pipeline import storage
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from tests.lipflow.public_multiface import public_weights


@pytest.fixture(scope="module")
def capture_folder(tmp_path_factory):
    """A capture with as many cameras as the weights, and statistics at the public texture size."""
    folder = tmp_path_factory.mktemp("capture")
    config = DomeConfig(
        cameras=4, image_size_hw=(24, 18), texture_size=32, segments=2, frames_per_segment=1, supersampling=1
    )
    write_dome(config, str(folder))
    with Image.open(folder / "tex_mean.png") as mean:
        mean.resize((1024, 1024)).save(folder / "tex_mean.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(capture_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    capture = open_capture(capture_folder)
    weights = public_weights("non", vertices=capture.topology.num_vertices)
    torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, path)
    return path


def test_avatar_has_the_capture_s_statistics_and_the_checkpoint_s_weights(capture_folder, checkpoint, tmp_path):
    summary = import_multiface(str(checkpoint), str(tmp_path / "avatar"), str(capture_folder))
    avatar = load_avatar(tmp_path / "avatar")
    assert not summary.spatial_bias
    assert summary.cameras == 4
    assert avatar.context.camera_ids == tuple(camera.camera_id for camera in open_capture(capture_folder).cameras)
    statistics = open_capture(capture_folder).normalization()
    np.testing.assert_array_equal(avatar.context.normalization.vertices_mean, statistics.vertices_mean)
    read = torch.load(checkpoint, weights_only=True)
    torch.testing.assert_close(avatar.encoder.head.weight, read["module.enc.fc.weight"], atol=0, rtol=0)
    with pytest.raises(ConfigError, match="an avatar lies there already"):
        import_multiface(str(checkpoint), str(tmp_path / "avatar"), str(capture_folder))


def test_command_reads_and_writes_s3(capture_folder, checkpoint, s3_server, monkeypatch, capsys):
    source, out = s3_server.uri("import-multiface", "model.pth"), s3_server.uri("import-multiface", "avatar")
    storage.write_bytes(source, checkpoint.read_bytes())
    arguments = ["lipflow", "import-multiface", source, out, "--capture", str(capture_folder), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["avatar"] == out
    assert {"avatar.json", "context.npz", "weights.safetensors"} == set(storage.listdir(out))


def test_what_cannot_be_imported_leaves_nothing(capture_folder, checkpoint, tmp_path):
    other = tmp_path / "other"
    write_dome(DomeConfig(cameras=3, image_size_hw=(24, 18), texture_size=32, segments=2, frames_per_segment=1), other)
    with pytest.raises(ConfigError, match="texture_size is 1024, but the capture's mean texture has 32"):
        import_multiface(str(checkpoint), str(tmp_path / "avatar"), str(other))
    (other / "tex_mean.png").unlink()
    with pytest.raises(CaptureError, match=r"no statistics of its own.*fetch its tex_mean\.png"):
        import_multiface(str(checkpoint), str(tmp_path / "avatar"), str(other))
    (tmp_path / "model.pth").write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"model\.pth: no PyTorch checkpoint of plain tensors"):
        import_multiface(str(tmp_path / "model.pth"), str(tmp_path / "avatar"), str(capture_folder))
    assert not (tmp_path / "avatar").exists()
