"""Draws from the priors: where they come from, and what their spread is."""

import math

import pytest
import torch

from lipflow.model.avatar import Avatar
from lipflow.sampling import decode_meshes, draw_driven_latents, draw_latents, vertex_std_mm


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bend(avatar: Avatar) -> Avatar:
    """Take the flow far from the identity."""
    with torch.no_grad():
        for coupling in avatar.flow.couplings:
            coupling.hyper[-1].weight.normal_(generator=seeded())
            coupling.hyper[-1].bias.normal_(generator=seeded(1))
    return avatar


@pytest.mark.parametrize("method", ["dam", "conditional"])
def test_random_latents_without_a_flow_are_standard_normal(make_avatar, method):
    z = draw_latents(make_avatar(method=method), 5, seeded())
    assert torch.equal(z, torch.randn(5, 6, generator=seeded()))


@pytest.mark.parametrize("switches", [{"method": "flow-gaussian"}, {"flow_conditional": True}, {}])
def test_random_latents_behind_a_flow_are_standard_normal_in_y(make_avatar, switches):
    avatar = bend(make_avatar(**switches))
    z = draw_latents(avatar, 5, seeded())
    y, _ = avatar.driven_from_latent(z, avatar.prior_without_signal(5))
    noise = torch.randn(5, 6, generator=seeded())
    assert (z - noise).abs().max() > 0.5
    # measured: 1e-6
    torch.testing.assert_close(y, noise, atol=1e-4, rtol=0)


def test_draws_repeat_with_their_seed_and_differ_without(make_avatar):
    avatar = make_avatar(method="flow-gaussian")
    first, again, other = (draw_latents(avatar, 3, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("flow_conditional", [False, True])
def test_driven_draws_are_distributed_as_the_signals_say(make_avatar, batch, flow_conditional):
    avatar = bend(make_avatar(flow_conditional=flow_conditional))
    signals = ("hmc", "keypoints")
    z = draw_driven_latents(avatar, signals, batch.driving, 4000, seeded())
    assert z.shape == (4000, 2, 6)
    prior = avatar.fused_prior(signals, batch.driving)
    with torch.no_grad():
        y, _ = avatar.flow(z, prior)
        residuals = prior.whiten(y)
    # Standard errors at 4000 draws: 0.016 of a mean, 0.011 of a std.
    assert residuals.mean(0).abs().max() < 5 / math.sqrt(4000)
    assert (residuals.std(0) - 1).abs().max() < 5 / math.sqrt(8000)


def test_a_frame_that_shows_nothing_is_drawn_as_without_a_signal(make_avatar, batch):
    avatar = bend(make_avatar(flow_conditional=True))
    batch.driving.keypoints[1, :, 2] = 0
    (z,) = draw_driven_latents(avatar, ("keypoints",), batch.driving, 1, seeded())
    noise = torch.randn(2, 6, generator=seeded())
    torch.testing.assert_close(z[1], avatar.flow.inverse(noise)[1].detach())
    assert (z[0] - avatar.flow.inverse(noise)[0]).abs().max() > 0.01


def test_meshes_of_draws_are_decoded_a_few_at_a_time(make_avatar):
    avatar = make_avatar(method="dam")
    z = torch.randn(3, 5, 6, generator=seeded())
    meshes = decode_meshes(avatar, z, frames_at_once=4)
    assert meshes.shape == (3, 5, 81, 3)
    # measured: 2e-5 mm
    torch.testing.assert_close(meshes[2, 1:], avatar.decode_vertices(z[2, 1:]).detach(), atol=1e-3, rtol=0)


def test_spread_of_two_draws_by_hand():
    """Axes 0 and 2, 0 and 2, 0 and 4: variances 2, 2 and 8; a vertex at rest has none."""
    draws = torch.zeros(2, 2, 3)
    draws[1, 0] = torch.tensor([2.0, 2.0, 4.0])
    torch.testing.assert_close(vertex_std_mm(draws), torch.tensor([math.sqrt(12), 0]).double())
    with pytest.raises(ValueError, match="at least 2 draws"):
        vertex_std_mm(draws[:1])
