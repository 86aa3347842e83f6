"""Texture look-up against closed forms, float64 derivatives, torch's own look-up, and the two implementations."""

import math

import pytest
import torch
from torch.nn import functional

from lipflow.render.texture import (
    coarse_levels,
    level_of_detail,
    max_mip_level,
    sample_bilinear,
    sample_bilinear_cpu,
    sample_bilinear_torch,
    sample_trilinear,
    sample_trilinear_cpu,
    sample_trilinear_torch,
    sample_weighted,
)

BILINEAR = pytest.mark.parametrize("sample", [sample_bilinear_cpu, sample_bilinear_torch])
TRILINEAR = pytest.mark.parametrize("sample", [sample_trilinear_cpu, sample_trilinear_torch])


def scene(views=4, textures=2, channels=3, height=9, width=11, size=32, dtype=torch.float64, seed=0):
    """Texture, coordinates (some outside [0, 1]), footprints from 1/8 to 40 texels, and a mask with holes."""
    generator = torch.Generator().manual_seed(seed)
    texture = torch.rand(textures, channels, size, size, generator=generator, dtype=torch.float64)
    uv = torch.rand(views, height, width, 2, generator=generator, dtype=torch.float64) * 1.1 - 0.05
    scale = 2 ** (torch.rand(views, height, width, 1, 1, generator=generator, dtype=torch.float64) * 8 - 3) / size
    uv_da = scale * torch.randn(views, height, width, 2, 2, generator=generator, dtype=torch.float64)
    mask = torch.rand(views, height, width, generator=generator) < 0.8
    return texture.to(dtype), uv.to(dtype), uv_da.to(dtype), mask


def uniform_footprint(texels: float, views=1, height=4, width=4, size=32) -> torch.Tensor:
    """Every pixel covers a square of ``texels`` texels, turned by 0.3 rad."""
    turn = torch.tensor([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]], dtype=torch.float64)
    return (turn * texels / size).expand(views, height, width, 2, 2)


@TRILINEAR
def test_constant_texture_is_constant_at_every_level_and_beyond_the_border(sample):
    _, uv, uv_da, mask = scene()
    image = sample(torch.full((2, 3, 32, 32), 0.7, dtype=torch.float64), uv, uv_da, mask)
    torch.testing.assert_close(image, 0.7 * mask[:, None].expand_as(image).double(), atol=1e-15, rtol=0)


@BILINEAR
def test_bilinear_look_up_reproduces_a_linear_ramp(sample):
    """Between the outermost texel centres; texel (i, j) has its centre at u = (j + 0.5) / T, v = (i + 0.5) / T."""
    size = 16
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    texture = (3 * centre[None, :] - 2 * centre[:, None] + 0.25)[None, None]
    uv = 0.5 / size + torch.rand(1, 8, 8, 2, dtype=torch.float64) * (1 - 1 / size)
    image = sample(texture, uv, torch.ones(1, 8, 8, dtype=torch.bool))
    torch.testing.assert_close(image[:, 0], 3 * uv[..., 0] - 2 * uv[..., 1] + 0.25, atol=1e-14, rtol=0)


@BILINEAR
def test_bilinear_look_up_is_grid_sample(sample):
    texture, uv, _, _ = scene(textures=4, dtype=torch.float32)
    expected = functional.grid_sample(texture, uv * 2 - 1, padding_mode="border", align_corners=False)
    image = sample(texture, uv, torch.ones(uv.shape[:3], dtype=torch.bool))
    torch.testing.assert_close(image, expected, atol=4e-6, rtol=0)  # measured 4.2e-7: 2 uv - 1 rounds in float32


@TRILINEAR
@pytest.mark.parametrize(("texels", "level"), [(0.25, 0), (1, 0), (2, 1), (4, 2), (32, 5), (1000, 5)])
def test_uniform_scale_reads_the_mip_level_of_that_scale(sample, texels, level):
    texture, uv, _, _ = scene(views=1, textures=1, height=4, width=4)
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    expected = sample_bilinear_torch(functional.avg_pool2d(texture, 2**level), uv, mask)
    image = sample(texture, uv, uniform_footprint(texels), mask)
    torch.testing.assert_close(image, expected, atol=1e-13, rtol=0)


@TRILINEAR
def test_levels_are_mixed_by_the_logarithm_of_the_scale(sample):
    texture, uv, _, _ = scene(views=1, textures=1, height=4, width=4)
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    fine, coarse = (sample(texture, uv, uniform_footprint(texels), mask) for texels in (2, 4))
    between = sample(texture, uv, uniform_footprint(2 * 2**0.3), mask)
    torch.testing.assert_close(between, 0.7 * fine + 0.3 * coarse, atol=1e-13, rtol=0)


def test_level_of_detail_is_that_of_the_longer_axis_of_the_footprint():
    """A stretched footprint, turned in the texture and in the image, is as long as its larger singular value."""
    matrix = torch.randn(100, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 6 / 64
    longest = torch.linalg.svdvals(matrix)[:, 0] * 64
    expected = longest.log2().clamp(0, 6)
    torch.testing.assert_close(level_of_detail(matrix, 64), expected, atol=1e-13, rtol=0)


def test_mip_chain_ends_at_the_last_even_side():
    assert [max_mip_level(size) for size in (1, 12, 31, 1024)] == [0, 2, 0, 10]
    assert coarse_levels(torch.zeros(2, 3, 12, 12)).shape == (2, 3, 36 + 9)
    assert coarse_levels(torch.zeros(2, 3, 31, 31)).shape == (2, 3, 0)
    texture, uv, uv_da, mask = scene(size=12)
    for sample in (sample_trilinear_cpu, sample_trilinear_torch):
        assert sample(texture, uv, 100 * uv_da, mask).isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 4e-6)])
@pytest.mark.parametrize("filtering", ["bilinear", "trilinear"])
def test_both_implementations_agree_forward_and_backward(filtering, dtype, tolerance):
    """Relative to the largest entry of each result."""
    texture, uv, uv_da, mask = scene(dtype=dtype, height=40, width=30)
    names = ("image", "texture", "uv", "uv_da") if filtering == "trilinear" else ("image", "texture", "uv")
    leaves = (texture, uv, uv_da) if filtering == "trilinear" else (texture, uv)
    functions = {
        "bilinear": (sample_bilinear_cpu, sample_bilinear_torch),
        "trilinear": (sample_trilinear_cpu, sample_trilinear_torch),
    }[filtering]
    results = []
    for sample in functions:
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        image = sample(*inputs, mask)
        weights = torch.randn(image.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
        results.append((image, *torch.autograd.grad((image * weights).sum(), inputs)))
    for name, fast, slow in zip(names, *results, strict=True):
        # Measured worst over 20 seeds: 8.6e-16 in float64, 3.5e-7 in float32, both of uv_da's gradients.
        assert (fast - slow).abs().max() < tolerance * slow.abs().max(), name


@pytest.mark.parametrize("sample", [sample_bilinear_cpu, sample_bilinear_torch])
def test_bilinear_gradients_in_float64(sample):
    texture, uv, _, mask = scene(views=2, textures=1, channels=2, height=4, width=3, size=8)
    assert torch.autograd.gradcheck(sample, (texture.requires_grad_(), uv.requires_grad_(), mask), atol=1e-7)


@pytest.mark.parametrize("sample", [sample_trilinear_cpu, sample_trilinear_torch])
def test_trilinear_gradients_in_float64(sample):
    texture, uv, uv_da, mask = scene(views=2, textures=1, channels=2, height=4, width=3, size=8, seed=4)
    leaves = [leaf.requires_grad_() for leaf in (texture, uv, uv_da)]
    assert torch.autograd.gradcheck(sample, (*leaves, mask), atol=1e-6)


@TRILINEAR
def test_degenerate_footprints_have_finite_results_and_no_gradient_to_the_footprint(sample):
    """None at all, exactly round, larger than the texture, not a number; as nvdiffrast."""
    texture, uv, _, _ = scene(views=1, textures=1, height=1, width=4)
    uv_da = torch.zeros(1, 1, 4, 2, 2, dtype=torch.float64)
    uv_da[0, 0, 1] = torch.eye(2) * 3 / 32
    uv_da[0, 0, 2] = torch.tensor([[1e3, 0], [5.0, 1]])
    uv_da[0, 0, 3] = math.nan
    leaves = [leaf.requires_grad_() for leaf in (texture, uv, uv_da)]
    image = sample(*leaves, torch.ones(1, 1, 4, dtype=torch.bool))
    grads = torch.autograd.grad(image.square().sum(), leaves)
    assert image.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads[:2])
    assert (grads[2][0, 0, :3] == 0).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_shared_textures_equal_copied_ones_on_any_number_of_threads(threads):
    texture, uv, uv_da, mask = scene()
    shared, copied = texture.clone().requires_grad_(), texture.clone().requires_grad_()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first = sample_trilinear(shared, uv, uv_da, mask)
        second = sample_trilinear(copied.repeat_interleave(2, dim=0), uv, uv_da, mask)
        first.square().sum().backward()
        second.square().sum().backward()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first, second)
    torch.testing.assert_close(shared.grad, copied.grad, atol=1e-14, rtol=1e-13)


@BILINEAR
def test_pixels_outside_the_mask_are_zero_and_carry_no_gradient(sample):
    texture, uv, _, mask = scene()
    uv[~mask] = math.nan
    uv.requires_grad_()
    image = sample(texture, uv, mask)
    image.sum().backward()
    assert (image.permute(0, 2, 3, 1)[~mask] == 0).all()
    assert (uv.grad[~mask] == 0).all()
    assert uv.grad[mask].isfinite().all()


@BILINEAR
def test_coordinates_beyond_the_border_have_no_gradient(sample):
    texture, _, _, _ = scene(textures=1)
    uv = torch.tensor([-0.2, 0.5 / 32, 1 - 0.5 / 32, 1.4], dtype=torch.float64)
    uv = torch.stack([uv, torch.full_like(uv, 0.4)], -1)[None, None].requires_grad_()
    sample(texture, uv, torch.ones(1, 1, 4, dtype=torch.bool)).sum().backward()
    assert (uv.grad[..., 0] == 0).all()
    assert (uv.grad[..., 1] != 0).all()


def test_shapes_that_disagree_are_refused():
    texture, uv, uv_da, mask = scene()
    with pytest.raises(ValueError, match="multiple of M"):
        sample_bilinear(texture, uv[:3], mask[:3])
    with pytest.raises(ValueError, match="uv_da"):
        sample_trilinear(texture, uv, uv_da[..., 0], mask)


@pytest.mark.parametrize("weights_size", [1, 7])
def test_weights_of_the_same_pass_are_those_of_a_pass_of_their_own(weights_size):
    texture, uv, _, mask = scene()
    uv = uv.requires_grad_()
    weight_mask = torch.rand(weights_size, weights_size, dtype=torch.float64) + 1
    image, weight = sample_weighted(texture, weight_mask, uv, mask)
    torch.testing.assert_close(image, sample_bilinear_torch(texture, uv, mask), atol=1e-14, rtol=0)  # measured 0
    alone = sample_bilinear_torch(weight_mask[None, None], uv, mask)[:, 0]
    torch.testing.assert_close(weight, alone, atol=1e-14, rtol=0)  # measured 0
    assert image.requires_grad
    assert not weight.requires_grad


def test_a_texture_of_one_texel_is_constant_and_has_no_gradient_to_the_coordinates():
    texture, uv, _, mask = scene(size=1)
    uv.requires_grad_()
    image = sample_bilinear_cpu(texture, uv, mask)
    torch.testing.assert_close(image, sample_bilinear_torch(texture, uv, mask), atol=1e-15, rtol=0)
    image.sum().backward()
    assert (uv.grad == 0).all()
