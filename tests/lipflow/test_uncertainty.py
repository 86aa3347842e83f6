"""The Laplace posterior: exact where the truth is Gaussian, and the prior where nothing is seen."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from lipflow.config import FitConfig
from lipflow.errors import ConfigError
from lipflow.fitting.objective import FitObjective
from lipflow.fitting.uncertainty import laplace, posterior, vertex_std_mm
from lipflow.model.gaussian import DiagonalGaussian

FRAMES, SIZE, SEEN = 3, 6, 4
NOISE = 0.3


@dataclass
class LinearSight(FitObjective):
    """Sees ``A z`` with Gaussian noise; ``matrix (B, N, D)``, ``seen (B, N)``."""

    matrix: torch.Tensor | None = None
    seen: torch.Tensor | None = None

    def observed(self, z):
        residual = (self.matrix @ z[..., None])[..., 0] - self.seen
        # prior_weight / D times the negative log likelihood, as the objective's units are.
        return self.config.prior_weight / SIZE * residual.square().sum(-1) / (2 * NOISE**2)


@pytest.fixture
def linear(make_avatar, renderer, batch_of, generator) -> LinearSight:
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prior = DiagonalGaussian(normal(FRAMES, SIZE), 0.5 * normal(FRAMES, SIZE))
    return LinearSight(
        make_avatar(method="conditional"),
        renderer,
        batch_of(frames=FRAMES).driving,
        ("keypoints",),
        prior,
        FitConfig(prior_weight=0.2),
        matrix=normal(FRAMES, SEEN, SIZE),
        seen=normal(FRAMES, SEEN),
    )


def closed_form(linear: LinearSight) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of p(z | h, o) of the linear-Gaussian model."""
    precision = (-2 * linear.prior.log_std).exp()
    transposed = linear.matrix.transpose(-1, -2)
    covariance = torch.linalg.inv(torch.diag_embed(precision) + transposed @ linear.matrix / NOISE**2)
    weighted = precision * linear.prior.mean + (transposed @ linear.seen[..., None])[..., 0] / NOISE**2
    return (covariance @ weighted[..., None])[..., 0], covariance


@pytest.mark.parametrize("directions", [SEEN, SIZE, 2 * SIZE])
def test_linear_gaussian_posterior_is_found_exactly_once_all_that_is_seen_was_measured(linear, directions):
    mean, covariance = closed_form(linear)
    found = laplace(linear, mean, directions)
    scale = linear.prior.log_std.exp()
    # Differences of a linear gradient are exact: measured worst case 3e-14.
    torch.testing.assert_close(
        scale[:, :, None] * found.covariance() * scale[:, None, :], covariance, atol=1e-9, rtol=1e-9
    )
    torch.testing.assert_close(linear.prior.mean + scale * found.centre, mean)


def test_fewer_directions_never_make_surer(linear):
    mean, _ = closed_form(linear)
    traces = [
        laplace(linear, mean, directions).covariance().diagonal(dim1=-2, dim2=-1).sum(-1)
        for directions in range(SEEN + 1)
    ]
    assert torch.allclose(traces[0], torch.tensor(float(SIZE), dtype=torch.float64))
    assert all((fewer >= more - 1e-9).all() for fewer, more in pairwise(traces))


def test_samples_have_the_posteriors_mean_and_covariance(linear, generator):
    mean, covariance = closed_form(linear)
    z = laplace(linear, mean, SIZE).sample(linear.avatar, 40_000, generator)
    # 40,000 samples: 0.5 % of a standard deviation. Measured worst cases 0.0035 and 0.0018.
    torch.testing.assert_close(z.mean(0), mean, atol=0.02, rtol=0)
    offset = z - mean
    empirical = torch.einsum("nbd,nbe->bde", offset, offset) / len(z)
    torch.testing.assert_close(empirical, covariance, atol=0.01, rtol=0)


def test_vertices_of_a_linear_decoder_spread_as_the_covariance_says(linear, generator, monkeypatch):
    mean, covariance = closed_form(linear)
    avatar = linear.avatar
    decoder = torch.randn(*avatar.vertices_mean.shape, SIZE, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(
        avatar, "decode_vertices", lambda z: avatar.vertices_mean + torch.einsum("vcd,bd->bvc", decoder, z)
    )
    spread = vertex_std_mm(avatar, laplace(linear, mean, SIZE), 4000, generator)
    expected = torch.einsum("vcd,bde,vce->bv", decoder, covariance, decoder).sqrt()
    # 1.1 % of sampling error for a Gaussian of one dimension; measured worst case of 243 vertices 3.0 %.
    torch.testing.assert_close(spread.double(), expected, rtol=0.06, atol=0)


def test_what_shows_nothing_leaves_the_prior(make_avatar, renderer, batch_of):
    """Frame 0's keypoints are all unseen; the others' determine something."""
    avatar, driving = make_avatar(), batch_of(frames=2, seed=4).driving
    driving.keypoints[0, :, 2] = 0
    z = avatar.start_from(["keypoints"], driving).detach()
    found = posterior(avatar, renderer, driving, "keypoints", z, FitConfig(), directions=4)
    assert (found.curvature[0] == 0).all()
    assert found.curvature[1].max() > 0
    torch.testing.assert_close(found.covariance()[0], torch.eye(6))
    assert (torch.linalg.eigvalsh(found.covariance()[1]) <= 1 + 1e-5).all()


@pytest.mark.parametrize("signal", ["hmc", "frontal"])
def test_rendered_signals_have_a_posterior_too(make_avatar, renderer, batch_of, generator, signal):
    avatar, driving = make_avatar(), batch_of(frames=2, seed=4).driving
    z = avatar.start_from([signal], driving).detach()
    found = posterior(avatar, renderer, driving, signal, z, FitConfig(), directions=6)
    prior = posterior(avatar, renderer, driving, signal, z, FitConfig(), directions=0)
    surer, unsure = (vertex_std_mm(avatar, each, 64, torch.Generator().manual_seed(1)) for each in (found, prior))
    assert surer.shape == (2, len(avatar.vertices_mean))
    assert (surer.mean(1) < unsure.mean(1)).all()
    basis = found.directions
    torch.testing.assert_close(basis.transpose(-1, -2) @ basis, torch.eye(6).expand(2, 6, 6), atol=1e-5, rtol=0)


def test_a_fit_without_prior_has_no_posterior(make_avatar, renderer, batch_of):
    avatar, driving = make_avatar(), batch_of(frames=2).driving
    with pytest.raises(ConfigError, match="prior_weight is 0"):
        posterior(avatar, renderer, driving, "keypoints", torch.zeros(2, 6), FitConfig(prior_weight=0.0), 2)
