"""Antialiased training: outlines are compared over what the photo shows beside them."""

import pytest
import torch

from lipflow.config import LossConfig
from lipflow.losses import reconstruction_loss
from lipflow.render.outline import over_photo
from lipflow.render.renderer import Renderer

GREY = 90.0


@pytest.fixture
def smooth(context):
    return Renderer(context.topology, antialias=True)


@pytest.fixture
def disc(smooth, batch, context):
    """A white mean face, antialiased, in a batch's cameras."""
    vertices = torch.from_numpy(context.normalization.vertices_mean).expand(2, -1, -1)
    return smooth.render(vertices, torch.full((2, 1, 3, 4, 4), 200.0), batch.cameras, (32, 24))


def test_the_renderer_blends_where_it_is_told_once(disc, renderer, smooth, batch, context):
    vertices = torch.from_numpy(context.normalization.vertices_mean).expand(2, -1, -1)
    texture = torch.full((2, 1, 3, 4, 4), 200.0)
    told = renderer.render(vertices, texture, batch.cameras, (32, 24), antialias=True)
    assert torch.equal(disc.image, told.image)
    plain = smooth.render(vertices, texture, batch.cameras, (32, 24), antialias=False)
    assert torch.equal(plain.coverage, plain.mask.float())
    assert not torch.equal(disc.image, plain.image)


def test_outline_over_a_flat_background_is_the_exact_blend(disc):
    image = over_photo(disc, torch.full_like(disc.image, GREY))
    coverage, mask = disc.coverage[:, :, None], disc.mask[:, :, None].expand_as(image)
    blended = mask & (coverage < 1)
    assert blended.sum() > 100
    expected = coverage * 200 + (1 - coverage) * GREY
    torch.testing.assert_close(image[mask], expected.expand_as(image)[mask], atol=1e-3, rtol=0)  # measured 3e-5
    assert torch.equal(image[~mask], disc.image[~mask])


def test_background_is_taken_from_outside_of_the_mask_alone(disc):
    """What the photo shows inside of the mask has no influence, and no gradient reaches the photo's place there."""
    photos = torch.full_like(disc.image, GREY)
    inside = disc.mask[:, :, None].expand_as(photos)
    other = photos.masked_fill(inside, 250.0)
    assert torch.equal(over_photo(disc, photos), over_photo(disc, other))


def test_photos_of_another_shape_are_refused(disc):
    with pytest.raises(ValueError, match="differ in shape"):
        over_photo(disc, disc.image[:, :1])


def test_training_compares_outlines_over_the_photos_background(make_avatar, smooth, renderer, batch):
    """A perfect avatar before a grey wall: no image error with blending, and some without."""
    avatar = make_avatar(method="dam")
    z = torch.zeros(2, 6)
    with torch.no_grad():
        decoded = avatar.decode(z, batch.cameras.view_vectors())
        rendered = smooth.render(decoded.vertices, decoded.textures, batch.cameras, (32, 24))
        wall = torch.full_like(rendered.image, GREY)
        photo = torch.where(rendered.mask[:, :, None], over_photo(rendered, wall), wall)
    batch.images = photo.clamp(0, 255).round().to(torch.uint8)
    blended = reconstruction_loss(avatar, smooth, z, batch, LossConfig()).terms["image"].item()
    plain = reconstruction_loss(avatar, renderer, z, batch, LossConfig()).terms["image"].item()
    assert blended < 2e-4  # rounding to 8 bits: 1/12 grey levels squared, over 40 squared; measured 5e-5
    assert plain > 20 * blended
