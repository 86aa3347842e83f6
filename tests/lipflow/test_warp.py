"""The integrated warp never folds: whatever its weights, and in float32."""

import pytest
import torch

from lipflow.model.warp import MIN_STRETCH, integrate_increments


def folds(grid: torch.Tensor) -> bool:
    """Whether x does not grow strictly along a row, y along a column, or a position leaves the texture."""
    x, y = grid[..., 0].diff(dim=-1), grid[..., 1].diff(dim=-2)
    return not bool((x > 0).all() and (y > 0).all() and (grid.abs() < 1).all())


def test_grid_is_strictly_monotone_for_1000_draws_of_weights_of_any_size(make_avatar):
    """Every draw has its own weights, of scales from 0.01 to a million, and its own codes."""
    warp = make_avatar(warp_field=True, residual=True).decoder.warp
    generator = torch.Generator().manual_seed(0)
    steepest = 1.0
    for _ in range(1000):
        scale = 10 ** (-2 + 8 * torch.rand((), generator=generator).item())
        with torch.no_grad():
            for parameter in warp.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            grid = warp.grid(torch.randn(2, 12, generator=generator))
        assert grid.shape == (2, 32, 32, 2)
        assert grid.dtype == torch.float32
        assert not folds(grid), f"weights of scale {scale:.3g}"
        steepest = max(steepest, grid[..., 0].diff(dim=-1).max().item() * 16)
    # The draws bend the grid as far as it goes: one cell takes all that the floors of the 31 others leave.
    assert steepest == pytest.approx(0.5 * (1 + 31 * (1 - MIN_STRETCH)) + 0.5 * MIN_STRETCH, rel=0.02)


@pytest.mark.parametrize("cells", [32, 128, 1024])
def test_increments_of_any_size_give_growing_centres_in_float32(cells):
    """1,000 rows of logits each, from equal ones to those of 1e30; neighbours are at least 10 % of a cell apart."""
    generator = torch.Generator().manual_seed(cells)
    scale = 10 ** (-3 + 33 * torch.rand(1000, 1, generator=generator))
    centres = integrate_increments(scale * torch.randn(1000, cells, generator=generator), -1)
    gaps = centres.diff(dim=-1)
    # Rounding: measured 1.2e-7 below the floor, of 2e-4 at 1,024 cells.
    assert gaps.min().item() >= 2 * MIN_STRETCH / cells - 5e-7
    assert centres.abs().max() < 1


def test_equal_increments_give_the_identity_and_a_cell_keeps_its_least_width():
    centres = integrate_increments(torch.zeros(4), 0)
    torch.testing.assert_close(centres, torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    crushed = integrate_increments(torch.tensor([100.0, 0, 0, 0]), 0)
    assert (crushed[-1] - crushed[-2]).item() == pytest.approx(2 * MIN_STRETCH / 4, rel=1e-4)


def test_warp_with_equal_increments_leaves_the_texture_as_it_is(make_avatar, generator):
    warp = make_avatar(warp_field=True).decoder.warp
    with torch.no_grad():
        warp.head.gain.zero_()
        warp.head.bias.zero_()
    textures = torch.randn(2, 3, 3, 32, 32, generator=generator)
    warped = warp(textures, torch.zeros(2, 6), torch.randn(2, 12, generator=generator))
    torch.testing.assert_close(warped, textures, atol=1e-4, rtol=0)  # measured 2e-5
