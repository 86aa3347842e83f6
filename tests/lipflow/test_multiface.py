"""Public Multiface weights: an imported avatar computes what the public model does, as its formulas say."""

import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lipflow.checkpoint import CheckpointError, load_avatar, save_avatar
from lipflow.errors import ConfigError
from lipflow.model.context import AvatarContext
from lipflow.multiface import avatar_from_multiface, multiface_config, read_multiface_weights
from lipflow.types import Normalization
from tests.lipflow.conftest import grid_topology
from tests.lipflow.public_multiface import ARCHITECTURES, CAMERAS, LATENT, PublicModel, public_weights

SIDE = 5
VERTICES = SIDE * SIDE


@pytest.fixture(scope="module")
def multiface_context():
    generator = np.random.default_rng(0)
    statistics = Normalization(
        texture_mean=generator.uniform(20, 200, (3, 1024, 1024)).astype(np.float32),
        texture_std=17.5,
        vertices_mean=generator.normal(0, 50, (VERTICES, 3)).astype(np.float32),
        vertices_std=3.25,
    )
    ids = tuple(f"4000{number:02d}" for number in range(CAMERAS))
    return AvatarContext(grid_topology(SIDE), statistics, ids, ids)


def inputs(context):
    generator = torch.Generator().manual_seed(1)
    statistics = context.normalization
    texture = torch.randint(0, 256, (1, 3, 1024, 1024), generator=generator, dtype=torch.uint8)
    vertices = torch.from_numpy(statistics.vertices_mean) + 3 * torch.randn(1, VERTICES, 3, generator=generator)
    views = F.normalize(torch.randn(1, 1, 3, generator=generator), dim=-1)
    return vertices, texture, views


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_imported_avatar_equals_the_public_model(multiface_context, architecture):
    weights = public_weights(architecture, VERTICES)
    avatar, public = avatar_from_multiface(weights, multiface_context).double(), PublicModel(weights)
    vertices, texture, views = inputs(multiface_context)
    statistics = multiface_context.normalization
    mean, std = torch.from_numpy(statistics.texture_mean).double(), statistics.texture_std
    mesh_mean, mesh_std = torch.from_numpy(statistics.vertices_mean).double(), statistics.vertices_std

    found = avatar.encode(vertices, texture)
    expected = public.encode((texture.double() - mean) / std, (vertices.double() - mesh_mean) / mesh_std)
    # Measured worst case 6e-8: an avatar's heads give float32.
    for ours, theirs in zip((found.mean, found.log_std), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-6 * theirs.abs().max().item(), rtol=0)

    z = torch.randn(1, LATENT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    decoded = avatar.decode(z, views.double())
    camera = torch.tensor([ARCHITECTURES.index(architecture) % CAMERAS])
    texture, mesh = public.decode(z, views[:, 0].double(), camera)
    textures = avatar.correct_color(decoded.textures, camera[None])
    assert texture.std() > 0.05
    # Measured worst case 2e-7 of the texture's spread, for the same reason.
    torch.testing.assert_close((textures[:, 0] - mean) / std, texture, atol=2e-6 * texture.abs().max().item(), rtol=0)
    torch.testing.assert_close((decoded.vertices - mesh_mean) / mesh_std, mesh, atol=1e-5, rtol=0)  # measured 1e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture_is_told_by_names_and_shapes(architecture):
    config = multiface_config(public_weights(architecture, VERTICES))
    assert config.latent_size == LATENT
    assert config.residual == (architecture == "res")
    assert config.warp_field == (architecture == "warp")
    assert config.spatial_bias == (architecture != "non")
    assert config.upsample == ("nearest" if architecture == "bilinear" else "transposed")


def test_checkpoint_of_data_parallel_training_is_read_and_the_avatar_saved(tmp_path, multiface_context):
    weights = public_weights("base", VERTICES)
    torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, tmp_path / "model.pth")
    read = read_multiface_weights(tmp_path / "model.pth")
    assert read.keys() == weights.keys()
    save_avatar(avatar_from_multiface(read, multiface_context), tmp_path / "avatar")
    again = load_avatar(tmp_path / "avatar")
    torch.testing.assert_close(again.decoder.latent_fc.weight, weights["dec.z_fc.weight"], atol=0, rtol=0)
    assert again.config.color_correction == "deviation"


def test_what_does_not_fit_is_listed(multiface_context):
    weights = public_weights("base", VERTICES)
    del weights["enc.fc.g"]
    weights["dec.mesh_fc.bias"] = torch.zeros(7)
    weights["dec.extra"] = torch.zeros(2)
    weights["cc.weight_anchor"] = torch.full((1, 3, 1, 1), 2.0)
    weights["dec.z_fc.bias"][3] = torch.nan
    with pytest.raises(CheckpointError, match="5 tensors do not fit") as caught:
        avatar_from_multiface(weights, multiface_context)
    for part in (
        "enc.fc.g: missing, expected (48,)",
        "dec.mesh_fc.bias: (7,), expected (75,)",
        "dec.extra: (2,), unknown",
        "cc.weight_anchor: [2.0, 2.0, 2.0], expected 1.0 throughout",
        "dec.z_fc.bias: not finite",
    ):
        assert part in str(caught.value)


def test_weights_of_another_capture_or_size_are_refused(multiface_context):
    weights = public_weights("base", VERTICES)
    ids = multiface_context.camera_ids[:-1]
    fewer = AvatarContext(multiface_context.topology, multiface_context.normalization, ids, ids)
    with pytest.raises(CheckpointError, match=r"cc.weight: \(3, 3, 1, 1\), expected \(2, 3, 1, 1\)"):
        avatar_from_multiface(weights, fewer)
    small = Normalization(np.zeros((3, 512, 512), np.float32), 1.0, multiface_context.normalization.vertices_mean, 1.0)
    with pytest.raises(ConfigError, match="texture_size is 1024"):
        avatar_from_multiface(weights, AvatarContext(multiface_context.topology, small, ids, ids))
    weights["dec.texture_fc.weight"] = torch.zeros(4 * LATENT, 264)
    with pytest.raises(CheckpointError, match="--tex_size 1024"):
        multiface_config(weights)
    with pytest.raises(CheckpointError, match=r"dec\.z_fc\.weight: missing"):
        multiface_config({"some.weight": torch.zeros(1)})


class Payload:
    def __reduce__(self):
        return (exit, (3,))


@pytest.mark.parametrize(
    "body",
    [b"", b"PK\3\4 no archive", pickle.dumps(Payload(), 2), pickle.dumps([1], 2)],
    ids=["empty", "archive", "code", "list"],
)
def test_what_is_no_checkpoint_is_refused_and_never_executed(tmp_path, body):
    (tmp_path / "model.pth").write_bytes(body)
    with pytest.raises(CheckpointError, match=r"model\.pth: (no PyTorch checkpoint|a checkpoint, but)"):
        read_multiface_weights(tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_multiface_weights(tmp_path / "absent.pth")


def test_whole_objects_and_nested_states_are_refused():
    for content in (Payload(), {"model": {"enc.fc.g": torch.zeros(1)}}):
        stream = io.BytesIO()
        torch.save(content, stream)
        stream.seek(0)
        with pytest.raises(CheckpointError, match=r"no PyTorch checkpoint|no state dict"):
            read_multiface_weights(stream)
