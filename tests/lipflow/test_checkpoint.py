"""Avatars survive the disk bit for bit; damaged ones are refused by name."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch

from lipflow import Avatar, AvatarConfig, load_avatar, save_avatar
from lipflow.checkpoint import FORMAT_VERSION, CheckpointError
from lipflow.errors import LipflowError


def outputs(avatar, batch) -> list[torch.Tensor]:
    """Something of every network."""
    z = torch.linspace(-1, 1, 12).view(2, 6)
    decoded = avatar.decode(z, batch.cameras.view_vectors())
    posterior = avatar.encode(batch.vertices, batch.average_texture)
    tensors = [decoded.vertices, avatar.correct_color(decoded.textures, batch.camera_index), posterior.mean]
    for signal in batch.driving.available() if not avatar.config.has_drivers else avatar.signals:
        prior = avatar.prior(signal, batch.driving)
        tensors += [prior.mean, avatar.start(prior), avatar.log_prior(z, prior)]
    return tensors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "dam", "warp_field": True},
        {"method": "conditional", "signals": ("keypoints",), "residual": True},
        {"method": "flow-gaussian", "flow_transform": "spline"},
        {"flow_conditional": True},
    ],
)
def test_round_trip_gives_bit_equal_outputs(make_avatar, batch, tmp_path, changes):
    avatar = make_avatar(**changes)
    with torch.no_grad():
        avatar.color.gain.add_(0.3)
    save_avatar(avatar, tmp_path / "avatar")
    loaded = load_avatar(tmp_path / "avatar")
    assert loaded.config == avatar.config
    assert not loaded.training
    for first, second in zip(outputs(avatar, batch), outputs(loaded, batch), strict=True):
        assert torch.equal(first, second)


def test_context_survives(make_avatar, tmp_path):
    avatar = make_avatar()
    save_avatar(avatar, tmp_path / "avatar")
    before, after = avatar.context, load_avatar(tmp_path / "avatar").context
    for name in ("camera_ids", "train_camera_ids", "frontal_camera_id", "frontal_image_hw", "keypoint_names"):
        assert getattr(before, name) == getattr(after, name)
    for part in ("topology", "normalization"):
        for item in dataclasses.fields(getattr(before, part)):
            first, second = (getattr(getattr(c, part), item.name) for c in (before, after))
            np.testing.assert_equal(first, second)
    for first, second in zip(before.headset_cameras, after.headset_cameras, strict=True):
        np.testing.assert_equal(dataclasses.asdict(first), dataclasses.asdict(second))


def test_a_capture_without_headset_survives(context, tmp_path):
    bare = dataclasses.replace(context, headset_cameras=(), frontal_camera_id=None, frontal_image_hw=None)
    save_avatar(Avatar(AvatarConfig.small(texture_size=32), bare), tmp_path / "avatar")
    assert load_avatar(tmp_path / "avatar").signals == ("keypoints",)


def test_saving_twice_writes_the_same_bytes(make_avatar, tmp_path):
    for name in ("first", "second"):
        save_avatar(make_avatar(), tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_a_folder_in_use_is_not_overwritten_and_nothing_is_left_behind(make_avatar, tmp_path):
    folder = tmp_path / "avatar"
    folder.mkdir()
    save_avatar(make_avatar(), folder)
    with pytest.raises(CheckpointError, match="not an empty folder"):
        save_avatar(make_avatar(), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["avatar"]
    assert sorted(path.name for path in folder.iterdir()) == ["avatar.json", "context.npz", "weights.safetensors"]


@pytest.mark.parametrize("name", ["avatar.json", "context.npz", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_damaged_files_are_refused_by_name(make_avatar, tmp_path, name, damage):
    save_avatar(make_avatar(), tmp_path / "avatar")
    path = tmp_path / "avatar" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes({"truncated": content[: len(content) // 2], "flipped": content, "empty": b""}[damage])
    with pytest.raises(LipflowError, match=name):
        load_avatar(tmp_path / "avatar")


def test_another_format_and_a_foreign_folder_are_refused(make_avatar, tmp_path):
    save_avatar(make_avatar(), tmp_path / "avatar")
    path = tmp_path / "avatar" / "avatar.json"
    record = json.loads(path.read_text())
    for version in (FORMAT_VERSION - 1, FORMAT_VERSION + 1):
        path.write_text(json.dumps(record | {"format_version": version}))
        with pytest.raises(CheckpointError, match=f"format version {version}, expected {FORMAT_VERSION}: use the ver"):
            load_avatar(tmp_path / "avatar")
    path.write_text(json.dumps(record | {"surprise": 1}))
    with pytest.raises(CheckpointError, match="surprise"):
        load_avatar(tmp_path / "avatar")
    with pytest.raises(CheckpointError, match="holds no avatar"):
        load_avatar(tmp_path)


def test_weights_of_another_architecture_are_refused(make_avatar, tmp_path):
    save_avatar(make_avatar(), tmp_path / "avatar")
    path = tmp_path / "avatar" / "avatar.json"
    record = json.loads(path.read_text())
    record["config"]["hidden_size"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="does not fit its config"):
        load_avatar(tmp_path / "avatar")


def test_loading_never_unpickles(make_avatar, tmp_path):
    """An object array in the context is refused, though its digest is right."""
    save_avatar(make_avatar(), tmp_path / "avatar")
    context, record_path = tmp_path / "avatar" / "context.npz", tmp_path / "avatar" / "avatar.json"
    np.savez(context, faces=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    record = json.loads(record_path.read_text())
    record["sha256"]["context.npz"] = hashlib.sha256(context.read_bytes()).hexdigest()
    record_path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"context\.npz cannot be read"):
        load_avatar(tmp_path / "avatar")
