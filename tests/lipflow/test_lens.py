"""Lens distortion against its formula, its derivative and its inverse."""

import math

import pytest
import torch

from lipflow.render.lens import distort, undistort, valid_radius

WIDE = (-0.3, 0.08, 0.001, -0.002, 0.0)
"""A barrel lens, of the size that dome calibrations have."""
STRONG = (-0.5, 0.3, 0.004, 0.003, -0.05)
PINCUSHION = (0.2, 0.1, 0.01, -0.01, 0.05)


def by_hand(x, y, k1, k2, p1, p2, k3):
    """Brown's equations as OpenCV's documentation prints them, one point, in Python floats."""
    r = math.hypot(x, y)
    factor = 1 + k1 * r**2 + k2 * r**4 + k3 * r**6
    return (
        x * factor + 2 * p1 * x * y + p2 * (r**2 + 2 * x**2),
        y * factor + p1 * (r**2 + 2 * y**2) + 2 * p2 * x * y,
    )


def disc(radius, count=2000, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    angle, share = torch.rand(2, count, generator=generator, dtype=torch.float64)
    distance = radius * share.sqrt()
    return torch.stack([distance * (angle * math.tau).cos(), distance * (angle * math.tau).sin()], -1).to(dtype)


@pytest.mark.parametrize("coefficients", [WIDE, STRONG, PINCUSHION])
def test_distortion_is_the_published_formula(coefficients):
    points = disc(0.8, 50)
    expected = torch.tensor([by_hand(x, y, *coefficients) for x, y in points.tolist()], dtype=torch.float64)
    found = distort(points, torch.tensor(coefficients, dtype=torch.float64))
    torch.testing.assert_close(found, expected, atol=1e-15, rtol=0)  # measured 2.2e-16
    single = distort(points.float(), torch.tensor(coefficients))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, atol=3e-7, rtol=0)  # measured 8.3e-8


def test_distortion_of_numbers_worked_out_by_hand():
    # r^2 = 0.25 at (0.3, 0.4); 1 + 0.1 r^2 + 0.2 r^4 + 0.4 r^6 = 1.04375; 2xy = 0.24.
    lens = torch.tensor([0.1, 0.2, 0.01, 0.02, 0.4], dtype=torch.float64)
    found = distort(torch.tensor([[0.3, 0.4]], dtype=torch.float64), lens)
    expected = torch.tensor([[0.313125 + 0.0024 + 0.0086, 0.4175 + 0.0057 + 0.0048]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-15, rtol=0)


def test_zero_coefficients_are_the_identity_exactly():
    points = disc(3.0)
    assert torch.equal(distort(points, torch.zeros(5, dtype=torch.float64)), points)
    assert torch.equal(undistort(points, torch.zeros(5, dtype=torch.float64)), points)


def test_coefficients_broadcast_over_cameras():
    lenses = torch.tensor([WIDE, STRONG, PINCUSHION])
    points = disc(0.5, 12, torch.float32)
    together = distort(points.expand(2, 3, -1, -1), lenses)
    assert together.shape == (2, 3, 12, 2)
    for index, lens in enumerate(lenses):
        assert torch.equal(together[1, index], distort(points, lens))


def test_derivatives_are_those_of_finite_differences():
    points = disc(0.6, 6).requires_grad_()
    coefficients = torch.tensor(STRONG, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(distort, (points, coefficients), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("coefficients", [WIDE, STRONG, PINCUSHION])
def test_undistort_is_the_inverse_of_distort(coefficients):
    lens = torch.tensor(coefficients, dtype=torch.float64)
    points = disc(min(0.95 * valid_radius(lens), 1.0))
    # Measured worst case 4.4e-16, and 2.4e-7 in float32.
    torch.testing.assert_close(undistort(distort(points, lens), lens), points, atol=2e-15, rtol=0)
    single = undistort(distort(points.float(), lens.float()), lens.float())
    torch.testing.assert_close(single, points.float(), atol=1e-6, rtol=0)


def test_points_that_no_ray_is_imaged_to_have_no_inverse():
    lens = torch.tensor([-0.3, 0, 0, 0, 0], dtype=torch.float64)
    radius = valid_radius(lens)
    farthest = radius * (1 - 0.3 * radius**2)
    points = torch.tensor([[farthest * 1.001, 0], [0, farthest * 0.999]], dtype=torch.float64)
    found = undistort(points, lens)
    assert found[0].isnan().all()
    assert found[1].norm() < radius


def test_valid_radius_of_a_cubic_lens_is_closed_form():
    # d/dr (r - 0.3 r^3) = 0 at r = 1 / sqrt(0.9).
    assert valid_radius(torch.tensor([-0.3, 0, 5, 5, 0], dtype=torch.float64)) == pytest.approx(
        1 / math.sqrt(0.9), abs=1e-12
    )


@pytest.mark.parametrize(
    "coefficients",
    [(0, 0, 0, 0, 0), (0.4, 0, 0, 0, 0), (-0.3, 0.1, 0, 0, 0), (-2 / 3, 1 / 5, 0, 0, 0)],
    ids=["none", "pincushion", "bends-back-only-a-little", "touches-zero-once"],
)
def test_maps_that_never_fold_have_no_radius(coefficients):
    lens = torch.tensor(coefficients, dtype=torch.float64)
    assert valid_radius(lens) == math.inf
    axis = torch.linspace(0, 5, 5001, dtype=torch.float64)
    along = distort(torch.stack([axis, torch.zeros_like(axis)], -1), lens)[:, 0]
    assert (along.diff() > -1e-12).all()


@pytest.mark.parametrize(
    "coefficients", [(-0.3, 0, 0, 0, 0), (0.1, -0.2, 0, 0, 0), STRONG, (-1.2, 1.0, 0, 0, -0.2), (0, 0, 0, 0, -0.1)]
)
def test_the_radial_map_rises_up_to_the_valid_radius_and_falls_beyond(coefficients):
    lens = torch.tensor(coefficients, dtype=torch.float64) * torch.tensor([1, 1, 0, 0, 1])
    radius = valid_radius(lens)
    assert math.isfinite(radius)
    axis = torch.linspace(0, 1.02 * radius, 10_201, dtype=torch.float64)
    along = distort(torch.stack([axis, torch.zeros_like(axis)], -1), lens)[:, 0]
    assert (along[:10_001].diff() > 0).all()
    assert (along[10_001:].diff() < 0).all()
