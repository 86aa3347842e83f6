"""The flow's mathematics in float64, and the Gaussians around it by hand and in closed form."""

import itertools
import math
from functools import cache
from typing import Literal

import pytest
import torch

from lipflow.model.flow import IdentityFlow, LatentFlow, standardised
from lipflow.model.gaussian import DiagonalGaussian, product_of_gaussians

KINDS = ("affine", "spline")
SWITCHES = tuple(itertools.product(KINDS, (False, True)))
ALL_SWITCHES = pytest.mark.parametrize(
    ("transform", "conditional"), SWITCHES, ids=["affine", "affine-conditional", "spline", "spline-conditional"]
)
Transform = Literal["affine", "spline"]


def random_flow(
    features: int,
    seed: int = 0,
    spread: float = 1.0,
    steps: int = 4,
    transform: Transform = "affine",
    conditional: bool = False,
) -> LatentFlow:
    """A flow far from the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = LatentFlow(features, steps, 16, transform, conditional=conditional).double()
        with torch.no_grad():
            for coupling in flow.couplings:
                coupling.hyper[-1].weight.normal_(0, spread)
                coupling.hyper[-1].bias.normal_(0, spread)
    return flow


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_prior(*shape: int, seed: int = 4) -> DiagonalGaussian:
    """Means of a few units and standard deviations from 0.002 to 20, as drivers may give."""
    return DiagonalGaussian(3 * normal(*shape, seed=seed), (1.5 * normal(*shape, seed=seed + 1) - 1).clamp(-6, 3))


def curved_samples(count: int, features: int, seed: int) -> tuple[torch.Tensor, DiagonalGaussian]:
    """Latents on a bent, correlated sheet, and for each of them a prior that knows its coarse place."""
    first, second = normal(count, features, seed=seed), normal(count, features, seed=seed + 1)
    z = first + 0.8 * first.roll(1, -1).square() - 0.5 * first.roll(2, -1) + 0.2 * second
    return z, DiagonalGaussian(first.round(), torch.full_like(z, math.log(0.5)))


@cache
def trained_flow(transform: Transform, conditional: bool) -> LatentFlow:
    """60 steps of maximum likelihood on a density that no affine map makes normal; D = 6, four couplings of 32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = LatentFlow(6, 4, 32, transform, conditional=conditional).double()
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for step in range(60):
        z, prior = curved_samples(128, 6, seed=2 * step)
        y, log_det = flow(z, prior)
        optimizer.zero_grad()
        (-prior.log_prob(y) - log_det).mean().backward()
        optimizer.step()
    return flow.requires_grad_(False)


@ALL_SWITCHES
@pytest.mark.parametrize("features", [2, 5, 8])
def test_flow_inverse_recovers_input_in_float64(features, transform, conditional):
    flow, z = random_flow(features, transform=transform, conditional=conditional), 3 * normal(64, features)
    prior = random_prior(64, features)
    y, _ = flow(z, prior)
    assert (y - z).abs().max() > 0.5
    # measured worst case: affine 9e-14, spline 6e-12 (30 seeds)
    torch.testing.assert_close(flow.inverse(y, prior), z, atol=1e-9, rtol=0)


@ALL_SWITCHES
@pytest.mark.parametrize("features", [2, 5, 8])
def test_flow_log_determinant_matches_autograd_jacobian(features, transform, conditional):
    flow, z = random_flow(features, seed=2, transform=transform, conditional=conditional), normal(6, features)
    prior = random_prior(6, features)
    # measured worst case: affine 3e-15, spline 6e-14 (30 seeds)
    torch.testing.assert_close(flow(z, prior)[1], log_determinants(flow, z, prior), atol=1e-8, rtol=0)


@ALL_SWITCHES
def test_trained_flow_is_invertible_and_its_log_determinant_exact(transform, conditional):
    flow = trained_flow(transform, conditional)
    z, prior = curved_samples(256, 6, seed=1000)
    y, log_det = flow(z, prior)
    assert (y - z).abs().max() > 1
    # measured worst case over 2560 samples: inverse 2e-14, log-determinant 2e-14 (40 samples)
    torch.testing.assert_close(flow.inverse(y, prior), z, atol=1e-9, rtol=0)
    few = DiagonalGaussian(prior.mean[:6], prior.log_std[:6])
    torch.testing.assert_close(log_det[:6], log_determinants(flow, z[:6], few), atol=1e-8, rtol=0)


def log_determinants(flow: LatentFlow, z: torch.Tensor, prior: DiagonalGaussian) -> torch.Tensor:
    """``(B,)`` log |det| of autograd's Jacobians of each row, each under its own prior."""
    jacobians = []
    for index, row in enumerate(z):
        own = DiagonalGaussian(prior.mean[index], prior.log_std[index])
        jacobians.append(torch.autograd.functional.jacobian(lambda x, own=own: flow(x, own)[0], row))
    return torch.linalg.slogdet(torch.stack(jacobians))[1]


def test_conditional_flow_uses_its_prior_and_none_means_no_signal():
    flow, z = random_flow(5, conditional=True), normal(7, 5)
    with_signal, without = flow(z, random_prior(7, 5))[0], flow(z)[0]
    assert (with_signal - without).abs().max() > 0.5
    assert torch.equal(without, flow(z, DiagonalGaussian.standard(z))[0])
    assert not standardised(DiagonalGaussian.standard(z)).any()
    far = DiagonalGaussian(torch.full((1, 5), 1e6), torch.full((1, 5), -6.0))
    assert standardised(far).abs().max() < 16


def test_unconditional_flow_ignores_the_prior():
    flow, z = random_flow(5), normal(7, 5)
    assert torch.equal(flow(z, random_prior(7, 5))[0], flow(z)[0])


def test_conditioning_raises_the_likelihood_of_what_depends_on_the_signal():
    """Latents whose shape depends on the signal: -7.1 nats against -10.1 of a flow that does not see it."""
    z, prior = curved_samples(512, 6, seed=5000)
    likelihoods = []
    for conditional in (False, True):
        y, log_det = trained_flow("affine", conditional)(z, prior)
        likelihoods.append((prior.log_prob(y) + log_det).mean().item())
    assert likelihoods[1] > likelihoods[0] + 2, likelihoods


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


@ALL_SWITCHES
def test_flow_starts_near_the_identity(transform, conditional):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = LatentFlow(32, 4, 64, transform, conditional=conditional).double()
    z = normal(100, 32)
    y, log_det = flow(z, random_prior(100, 32))
    assert 0 < (y - z).abs().max() < 0.05
    assert log_det.abs().max() < 0.1


def test_every_feature_is_transformed_and_kept_in_turn():
    flow = random_flow(7)
    masks = torch.stack([coupling.mask for coupling in flow.couplings])
    assert (masks[0] ^ masks[1]).all()
    assert (masks[2] ^ masks[3]).all()
    assert not torch.equal(masks[0], masks[2])


@ALL_SWITCHES
def test_flow_weights_have_gradients_at_the_start(transform, conditional):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = LatentFlow(5, 4, 8, transform, conditional=conditional).double()
    y, log_det = flow(normal(32, 5), random_prior(32, 5))
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
