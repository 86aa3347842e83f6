"""The real head against the real photo; needs the face asset that is not part of this repository."""

from pathlib import Path

import numpy as np
import pytest

from lipflow.errors import CaptureError
from pipeline.dome.photo import check_photo

FACE = Path(__file__).resolve().parents[3] / "shared" / "assets" / "realface"


needs_face = pytest.mark.skipif(not FACE.is_dir(), reason="the real face asset (../shared/assets/realface) is not here")


@needs_face
def test_rendered_head_is_the_photographed_one():
    check = check_photo(FACE, reduced=2)
    # Measured 33.45 dB. Moved by 2 px the same rendering scores 29.9 dB, by 5 px 27.2 dB, mirrored 20.0 dB.
    assert check.psnr_db > 33.0
    assert 0.6 < check.mask.mean() < 0.75
    shifted = np.roll(check.rendering, 2, axis=1)
    error = (shifted.astype(float) - check.photo)[check.mask]
    assert 10 * np.log10(255**2 / (error**2).mean()) < check.psnr_db - 2


@needs_face
@pytest.mark.parametrize(
    ("reduced", "filter", "psnr_db", "ssim"),
    [
        pytest.param(1, "bilinear", 32.637, 0.8574, marks=pytest.mark.slow),
        pytest.param(1, "trilinear", 32.649, 0.8580, marks=pytest.mark.slow),
        (2, "bilinear", 33.453, 0.8920),
        (2, "trilinear", 33.409, 0.8874),
        pytest.param(4, "bilinear", 34.353, 0.9342, marks=pytest.mark.slow),
        pytest.param(4, "trilinear", 34.065, 0.9126, marks=pytest.mark.slow),
    ],
)
def test_fidelity_with_and_without_mip_maps(reduced, filter, psnr_db, ssim):
    """Of the photo (2048 x 1334) and its means of 2 x 2 and 4 x 4 pixels.

    The texture of 1024 texels is no finer than the photo: there is little for mip maps to average. In smaller images
    they cost sharpness, since a mip map averages over the longer axis of a pixel's footprint in both directions.
    """
    check = check_photo(FACE, reduced=reduced, filter=filter)
    assert check.psnr_db == pytest.approx(psnr_db, abs=0.01)
    assert check.ssim == pytest.approx(ssim, abs=5e-4)


def test_a_folder_without_a_photo_is_refused(tmp_path):
    with pytest.raises(CaptureError, match=r"no photo.png"):
        check_photo(tmp_path)
