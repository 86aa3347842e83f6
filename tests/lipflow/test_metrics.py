"""The metrics by hand and by independent computation."""

import math

import numpy as np
import pytest
import torch

from lipflow.metrics import (
    calibration_rms,
    frame_jitter_mm,
    geometry_rmse_mm,
    masked_mse,
    masked_ssim,
    psnr,
    ssim_map,
    texture_mse,
)
from lipflow.model.gaussian import DiagonalGaussian


def test_masked_mse_by_hand():
    """Errors 2 and 4 in the mask, over one channel of two: (4 + 16) / 2 pixels / 2 channels."""
    target = torch.zeros(1, 2, 2, 2)
    predicted = target.clone()
    predicted[0, 0] = torch.tensor([[2.0, 4.0], [100.0, 100.0]])
    mask = torch.tensor([[[True, True], [False, False]]])
    assert masked_mse(predicted, target, mask).item() == pytest.approx(5.0)


def test_masked_mse_takes_uint8_without_wrapping_around():
    black, white = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert masked_mse(black, white, torch.ones(1, 2, 2)).item() == 255.0**2


def test_metrics_of_an_empty_mask_are_nan():
    image, mask = torch.zeros(1, 3, 12, 12), torch.zeros(1, 12, 12, dtype=torch.bool)
    assert masked_mse(image, image, mask).isnan()
    assert masked_ssim(image, image, mask).isnan()


def test_psnr_by_hand():
    torch.testing.assert_close(psnr(torch.tensor([255.0**2, 65.025, 0.0])), torch.tensor([0.0, 30.0, math.inf]))


def test_ssim_of_flat_images_by_hand():
    """Without contrast only the luminance term is left: (2ab + c1) / (a^2 + b^2 + c1)."""
    a, b, c1 = 100.0, 150.0, (0.01 * 255) ** 2
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    found = masked_ssim(torch.full((1, 1, 16, 16), a), torch.full((1, 1, 16, 16), b), mask)
    assert found.item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=2e-3)


def test_ssim_of_one_pixel_matches_its_window_sums_in_numpy():
    generator = np.random.default_rng(0)
    x, y = generator.uniform(0, 255, (2, 15, 17))
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    px, py = x[2:13, 3:14], y[2:13, 3:14]
    mx, my = (window * px).sum(), (window * py).sum()
    vx, vy = (window * (px - mx) ** 2).sum(), (window * (py - my) ** 2).sum()
    cxy = (window * (px - mx) * (py - my)).sum()
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mx * my + c1) * (2 * cxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))

    x, y = torch.from_numpy(x).float()[None], torch.from_numpy(y).float()[None]
    similarity = ssim_map(x, y)
    assert similarity[0, 7, 8].item() == pytest.approx(expected, abs=1e-4)
    whole = torch.ones(15, 17, dtype=torch.bool)
    assert masked_ssim(x, y, whole).item() == pytest.approx(similarity.mean().item(), abs=1e-6)


def test_ssim_is_one_for_equal_images_and_ignores_the_background():
    generator = torch.Generator().manual_seed(0)
    x = 255 * torch.rand(2, 3, 20, 20, generator=generator)
    y = x + 30 * torch.randn(2, 3, 20, 20, generator=generator)
    mask = torch.zeros(2, 20, 20, dtype=torch.bool)
    mask[:, 4:15, 5:16] = True
    torch.testing.assert_close(masked_ssim(x, x, mask), torch.ones(2))
    other = torch.where(mask[:, None], y, 7.0)
    torch.testing.assert_close(masked_ssim(x, y, mask), masked_ssim(x, other, mask))
    assert masked_ssim(x, y, mask).max() < 0.95


def test_geometry_rmse_by_hand():
    """Distances 5 and 0: sqrt(25 / 2)."""
    target = torch.zeros(1, 2, 3)
    predicted = torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]])
    assert geometry_rmse_mm(predicted, target).item() == pytest.approx(12.5**0.5)


def test_jitter_is_zero_in_even_motion_and_counts_shaking():
    steady = torch.arange(5.0)[:, None, None].expand(5, 4, 3)
    assert frame_jitter_mm(steady).tolist() == [0, 0, 0]
    shaking = torch.zeros(4, 1, 3)
    shaking[1, 0, 0] = 1.5
    assert frame_jitter_mm(shaking).tolist() == pytest.approx([3.0, 1.5])
    with pytest.raises(ValueError, match="at least 3"):
        frame_jitter_mm(steady[:2])


def test_texture_mse_by_hand_is_over_texels_of_positive_weight_and_weighs_them_alike():
    """Errors 1 and 3 on two texels of weight 1 and 4, in all channels; 100 where nothing is to be compared."""
    target = torch.zeros(3, 2, 2)
    predicted = torch.tensor([[1.0, 3.0], [100.0, 100.0]]).expand(3, 2, 2)
    assert texture_mse(predicted, target, torch.tensor([[1.0, 4.0], [0.0, 0.0]])).item() == pytest.approx(5.0)


def test_calibration_rms_is_one_for_samples_of_the_prior():
    prior = DiagonalGaussian(torch.full((500, 20), 2.0), torch.full((500, 20), -1.0))
    y = prior.sample(torch.Generator().manual_seed(0))
    assert calibration_rms(y, prior).mean().item() == pytest.approx(1, abs=0.02)
    tight = DiagonalGaussian(prior.mean, prior.log_std - math.log(3.0))
    assert calibration_rms(y, tight).mean().item() == pytest.approx(3, abs=0.06)


def test_disagreeing_shapes_are_refused():
    image = torch.zeros(1, 3, 12, 12)
    with pytest.raises(ValueError, match="disagree"):
        masked_mse(image, image[:, :1], torch.ones(1, 12, 12))
    with pytest.raises(ValueError, match="disagree"):
        masked_ssim(image, image, torch.ones(12, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="different shapes"):
        geometry_rmse_mm(torch.zeros(2, 3), torch.zeros(1, 3))
