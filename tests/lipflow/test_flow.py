"""The flow's mathematics in float64, and the Gaussians around it by hand and in closed form."""

import math
from typing import Literal

import pytest
import torch

from lipflow.model.flow import IdentityFlow, LatentFlow
from lipflow.model.gaussian import DiagonalGaussian, product_of_gaussians

KINDS = ("affine", "spline")


def random_flow(
    features: int, seed: int = 0, spread: float = 1.0, steps: int = 4, transform: Literal["affine", "spline"] = "affine"
) -> LatentFlow:
    """A flow far from the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = LatentFlow(features, steps, 16, transform).double()
        with torch.no_grad():
            for coupling in flow.couplings:
                coupling.hyper[-1].weight.normal_(0, spread)
                coupling.hyper[-1].bias.normal_(0, spread)
    return flow


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("transform", KINDS)
@pytest.mark.parametrize("features", [2, 5, 8])
def test_flow_inverse_recovers_input_in_float64(features, transform):
    flow, z = random_flow(features, transform=transform), 3 * normal(64, features)
    y, _ = flow(z)
    assert (y - z).abs().max() > 0.5
    # measured worst case: affine 7e-14, spline 2e-12 (30 seeds)
    torch.testing.assert_close(flow.inverse(y), z, atol=1e-9, rtol=0)


@pytest.mark.parametrize("transform", KINDS)
@pytest.mark.parametrize("features", [2, 5, 8])
def test_flow_log_determinant_matches_autograd_jacobian(features, transform):
    flow, z = random_flow(features, seed=2, transform=transform), normal(6, features)
    _, log_det = flow(z)
    jacobians = torch.stack([torch.autograd.functional.jacobian(lambda x: flow(x)[0], row) for row in z])
    # measured worst case: affine 4e-15, spline 9e-14 (30 seeds)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobians)[1], atol=1e-8, rtol=0)


def test_flow_log_scale_is_bounded_by_one_a_step():
    """However wild the weights, no feature is stretched by more than e for each coupling that moves it."""
    flow, z = random_flow(6, spread=1e4, steps=2), normal(100, 6)
    _, log_det = flow(z)
    assert log_det.abs().max() <= 6
    assert log_det.abs().max() > 1


def test_spline_is_the_identity_beyond_its_interval():
    flow, z = random_flow(6, transform="spline"), torch.tensor([[-9.0, 7, 5.5, -5.1, 100, 6]]).double()
    y, log_det = flow(z)
    assert torch.equal(y, z)
    assert not log_det.any()


@pytest.mark.parametrize("transform", KINDS)
def test_flow_starts_near_the_identity(transform):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = LatentFlow(32, 4, 64, transform).double()
    z = normal(100, 32)
    y, log_det = flow(z)
    assert 0 < (y - z).abs().max() < 0.05
    assert log_det.abs().max() < 0.1


def test_every_feature_is_transformed_and_kept_in_turn():
    flow = random_flow(7)
    masks = torch.stack([coupling.mask for coupling in flow.couplings])
    assert (masks[0] ^ masks[1]).all()
    assert (masks[2] ^ masks[3]).all()
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("transform", KINDS)
def test_flow_weights_have_gradients_at_the_start(transform):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = LatentFlow(5, 4, 8, transform)
    y, log_det = flow(normal(32, 5).float())
    (y.square().sum() + log_det.sum()).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_density_through_the_flow_integrates_to_one():
    flow = random_flow(2, seed=5, spread=0.3)
    axis = torch.linspace(-12, 12, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    y, log_det = flow(grid)
    density = (DiagonalGaussian(torch.zeros(2).double(), torch.zeros(2).double()).log_prob(y) + log_det).exp()
    total = density.sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-3)


def test_identity_flow_changes_nothing():
    z = normal(3, 4)
    y, log_det = IdentityFlow()(z)
    assert torch.equal(y, z)
    assert torch.equal(log_det, torch.zeros(3).double())
    assert torch.equal(IdentityFlow().inverse(y), z)


def test_gaussian_agrees_with_torch_distributions():
    gaussian = DiagonalGaussian(normal(5, 3, seed=1), 0.5 * normal(5, 3, seed=2))
    reference = torch.distributions.Normal(gaussian.mean, gaussian.log_std.exp())
    standard = torch.distributions.Normal(torch.zeros(5, 3).double(), torch.ones(5, 3).double())
    x = normal(5, 3, seed=3)
    torch.testing.assert_close(gaussian.log_prob(x), reference.log_prob(x).sum(-1))
    torch.testing.assert_close(gaussian.entropy(), reference.entropy().sum(-1))
    expected = torch.distributions.kl_divergence(reference, standard).sum(-1)
    torch.testing.assert_close(gaussian.kl_to_standard(), expected)


def test_gaussian_samples_repeat_with_their_generator():
    gaussian = DiagonalGaussian(torch.zeros(4, 3), torch.full((4, 3), math.log(2.0)))
    samples = [gaussian.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_product_of_two_gaussians_by_hand():
    """N(0, 1) x N(3, 1/2): precisions 1 and 4, so mean 12 / 5 and std 1 / sqrt 5."""
    experts = [
        DiagonalGaussian(torch.zeros(1, 1), torch.zeros(1, 1)),
        DiagonalGaussian(torch.full((1, 1), 3.0), torch.full((1, 1), math.log(0.5))),
    ]
    fused = product_of_gaussians(experts, [torch.tensor([True])] * 2)
    assert fused.mean.item() == pytest.approx(2.4, abs=1e-6)
    assert fused.log_std.exp().item() == pytest.approx(5**-0.5, abs=1e-6)


def test_product_leaves_absent_experts_out_and_is_standard_without_any():
    expert = DiagonalGaussian(torch.full((3, 2), 3.0), torch.full((3, 2), -1.0))
    other = DiagonalGaussian(torch.full((3, 2), -9.0), torch.full((3, 2), -6.0))
    fused = product_of_gaussians(
        [expert, other], [torch.tensor([True, False, False]), torch.tensor([False, True, False])]
    )
    torch.testing.assert_close(fused.mean[:, 0], torch.tensor([3.0, -9.0, 0.0]))
    torch.testing.assert_close(fused.log_std[:, 0], torch.tensor([-1.0, -6.0, 0.0]))
