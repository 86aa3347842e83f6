"""The variants of the Deep Appearance Model are independent switches: all combinations train."""

import itertools

import pytest
import torch

from lipflow.config import LossConfig
from lipflow.losses import training_loss

SWITCHES = [
    {"spatial_bias": bias, "warp_field": warp, "residual": residual, "upsample": upsample}
    for bias, warp, residual, upsample in itertools.product(
        (True, False), (True, False), (True, False), ("transposed", "bilinear")
    )
]


@pytest.fixture
def smooth_batch(batch):
    """Frames that can be learned: every picture is a blurred one."""
    generator = torch.Generator().manual_seed(3)
    frames, views, _, height, width = batch.images.shape
    coarse = torch.rand(frames * views, 3, 3, 3, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    batch.images = (60 + 140 * pictures).to(torch.uint8).view_as(batch.images)
    return batch


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_every_combination_of_variants_learns(make_avatar, renderer, smooth_batch, switches):
    """30 steps of Adam on one batch; measured: at most 0.75 of the image error is left."""
    avatar = make_avatar(method="dam", **switches)
    optimizer = torch.optim.Adam(avatar.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(30):
        optimizer.zero_grad()
        terms = training_loss(avatar, renderer, smooth_batch, LossConfig(), generator)
        terms.total.backward()
        optimizer.step()
        errors.append(terms.terms["image"].item())
    assert sum(errors[-5:]) / 5 < 0.85 * errors[0]
