"""The Deep Appearance Model as published: its sizes, its heads, its conditioning, its weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lipflow.config import AvatarConfig, LossConfig
from lipflow.losses import reconstruction_loss, training_loss
from lipflow.model.avatar import Avatar
from lipflow.model.context import AvatarContext
from lipflow.render.renderer import Renderer
from tests.lipflow.conftest import make_batch, make_context

PUBLIC_VERTICES = 7306


def test_loss_weights_default_to_the_papers():
    config = LossConfig()
    assert (config.image_weight, config.geometry_weight, config.latent_weight) == (1.0, 1.0, 0.01)
    assert config.average_texture_weight == 0
    assert config.reverse_weight == 0


def test_encoder_heads_are_scaled_by_a_tenth_and_a_hundredth(make_avatar, batch):
    scaled = make_avatar(method="dam").encode(batch.vertices, batch.average_texture)
    plain = make_avatar(method="dam", mean_scale=1, log_std_scale=1).encode(batch.vertices, batch.average_texture)
    assert (AvatarConfig().mean_scale, AvatarConfig().log_std_scale) == (0.1, 0.01)
    torch.testing.assert_close(scaled.mean, 0.1 * plain.mean)
    torch.testing.assert_close(scaled.log_std, 0.01 * plain.log_std)


def test_image_term_is_weighted_by_the_weight_mask_as_each_view_sees_it(make_avatar, renderer, batch):
    avatar = make_avatar(method="dam")
    z = torch.zeros(2, 6)
    with torch.no_grad():
        decoded = avatar.decode(z, batch.cameras.view_vectors())
        textures = avatar.correct_color(decoded.textures, batch.camera_index)
        rendered = renderer.render(decoded.vertices, textures, batch.cameras, (32, 24))
    error = ((rendered.image - batch.images.float()) / avatar.texture_std).square().mean(2)
    assert rendered.weight.max() > 2.5
    assert rendered.weight[rendered.mask].min() == pytest.approx(1.0)
    expected = (rendered.weight * error).sum() / rendered.weight.sum()
    found = reconstruction_loss(avatar, renderer, z, batch, LossConfig()).terms["image"]
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_a_step_at_full_size_reaches_every_parameter():
    """1024 x 1024 textures, 7,306 vertices, photos of 2048 x 1334, all three cameras."""
    context = _full_size_context()
    avatar = Avatar(AvatarConfig(method="dam"), context)
    batch = make_batch(context, frames=1, image_hw=(2048, 1334), views=3)
    loss = training_loss(avatar, Renderer(context.topology), batch, LossConfig(), torch.Generator().manual_seed(0))
    loss.total.backward()
    assert batch.vertices.shape == (1, PUBLIC_VERTICES, 3)
    assert batch.average_texture.shape == (1, 3, 1024, 1024)
    for name, parameter in avatar.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def _full_size_context() -> AvatarContext:
    """A sheet of 85 x 85 vertices, and as many more without a triangle as the public topology has."""
    context = make_context(85, 1024)
    mean = np.zeros((PUBLIC_VERTICES, 3), np.float32)
    mean[: 85 * 85] = context.normalization.vertices_mean
    return dataclasses.replace(
        context,
        topology=dataclasses.replace(context.topology, num_vertices=PUBLIC_VERTICES),
        normalization=dataclasses.replace(context.normalization, vertices_mean=mean),
    )
