"""Undistorted images against pictures of the same scene by a pinhole camera."""

import math

import numpy as np
import pytest
import torch

from lipflow.errors import CaptureError
from lipflow.render.lens import distort, undistort, valid_radius
from lipflow.types import Camera
from pipeline.capture_errors import ImageSizeError
from pipeline.sharding.undistort import Undistorter

SIZE_HW = (240, 180)
INTRINSICS = np.array([[300.0, 0.4, 92.3], [0, 290.0, 117.8], [0, 0, 1]])
BARREL = (-0.28, 0.09, 0.002, -0.003, 0.01)
PINCUSHION = (0.2, 0.1, -0.002, 0.003, 0.02)


def camera_with(distortion, size_hw=SIZE_HW, intrinsics=INTRINSICS):
    return Camera("cam-1", intrinsics, np.eye(3, 4), size_hw, np.array(distortion, np.float64))


def normalised_pixels(camera):
    """``(H, W, 2)`` float64: the pixel centres on the plane z = 1, as if there were no lens."""
    height, width = camera.image_size_hw
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(camera.intrinsics).T
    return rays[..., :2]


def photo(camera, scene):
    """What the camera sees of ``scene``, a function of the ray, through its lens; NaN rays are grey."""
    lens = torch.from_numpy(camera.distortion)
    rays = undistort(torch.from_numpy(normalised_pixels(camera)), lens).numpy()
    return np.rint(scene(np.nan_to_num(rays))).clip(0, 255).astype(np.uint8)


def waves(rays):
    x, y = rays[..., 0], rays[..., 1]
    return 128 + 110 * np.stack([np.sin(25 * x), np.cos(22 * y), np.sin(18 * (x + y))], -1)


def seen(camera):
    """Pixels of the pinhole image whose place in the distorted image lies inside of it."""
    height, width = camera.image_size_hw
    bent = distort(torch.from_numpy(normalised_pixels(camera)), torch.from_numpy(camera.distortion)).numpy()
    place = bent @ camera.intrinsics[:2, :2].T + camera.intrinsics[:2, 2]
    return ((place >= 0) & (place <= [width, height])).all(-1)


@pytest.mark.parametrize("distortion", [BARREL, PINCUSHION], ids=["barrel", "pincushion"])
def test_an_undistorted_image_is_the_pinhole_camera_s(distortion):
    camera = camera_with(distortion)
    undistorter = Undistorter(camera)
    assert not undistorter.camera.distortion.any()
    assert np.array_equal(undistorter.camera.intrinsics, camera.intrinsics)
    expected, visible = photo(undistorter.camera, waves), seen(camera)
    distorted = photo(camera, waves)
    found = undistorter.apply(distorted)
    assert found.shape == distorted.shape
    assert found.dtype == np.uint8

    def psnr_db(image):
        return 10 * math.log10(255**2 / np.square(image[visible].astype(float) - expected[visible]).mean())

    assert psnr_db(found) > 55  # measured 55.8 and 55.5 dB: two roundings to grey levels, one bilinear look-up
    assert psnr_db(distorted) < 30  # 24.2 and 28.3 dB: the lens matters


def test_a_straight_edge_of_the_scene_becomes_straight():
    camera = camera_with(BARREL)

    def ridge(rays):
        # The line x = 0.2 + 0.1 y, near the right rim, 2.4 pixels wide.
        distance = (rays[..., 0] - 0.2 - 0.1 * rays[..., 1]) * 300
        return 250 * np.exp(-((distance / 2.4) ** 2))

    def bend_px(image):
        columns = np.arange(image.shape[1]) + 0.5
        centres = (image * columns).sum(1) / image.sum(1)
        rows = np.arange(len(centres)) + 0.5
        return np.abs(centres - np.polyval(np.polyfit(rows, centres, 1), rows)).max()

    distorted = photo(camera, ridge)
    assert bend_px(distorted.astype(float)) > 2  # measured 2.12 px
    assert bend_px(Undistorter(camera).apply(distorted).astype(float)) < 0.05  # measured 0.034 px


@pytest.mark.parametrize("place", [(0.2, 0.25), (-0.22, -0.3), (0.02, 0.3), (0.0, 0.0)])
def test_a_landmark_in_the_image_moves_to_its_pinhole_projection(place):
    camera = camera_with(BARREL)
    point = torch.tensor([place], dtype=torch.float64)
    bent = distort(point, torch.from_numpy(camera.distortion)).numpy()[0]
    place_px, bent_px = (camera.intrinsics[:2, :2] @ xy + camera.intrinsics[:2, 2] for xy in (np.array(place), bent))

    height, width = camera.image_size_hw
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    blob = 250 * np.exp(-((x - bent_px[0]) ** 2 + (y - bent_px[1]) ** 2) / (2 * 2.0**2))
    undistorter = Undistorter(camera)
    found = undistorter.apply(np.rint(blob).astype(np.uint8)).astype(float)
    centre = np.array([(found * x).sum(), (found * y).sum()]) / found.sum()
    assert np.abs(centre - place_px).max() < 0.05  # measured 0.025 px

    moved = undistorter.apply_to_points(np.array([bent_px]))
    np.testing.assert_allclose(moved, [place_px], atol=1e-10)  # measured 0


def test_without_distortion_images_and_points_stay_as_they_are():
    undistorter = Undistorter(camera_with(np.zeros(5)))
    image = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
    assert undistorter.apply(image) is image
    assert undistorter.coverage() is None
    points = np.array([[3.25, 4.5]])
    assert np.array_equal(undistorter.apply_to_points(points), points)


@pytest.mark.parametrize("distortion", [BARREL, PINCUSHION], ids=["barrel", "pincushion"])
def test_the_compiled_look_up_agrees_with_grid_sample(distortion):
    camera = camera_with(distortion)
    image = np.random.default_rng(1).integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
    bent = distort(torch.from_numpy(normalised_pixels(camera)), torch.from_numpy(camera.distortion)).numpy()
    place = bent @ camera.intrinsics[:2, :2].T + camera.intrinsics[:2, 2]
    grid = torch.from_numpy(place / [SIZE_HW[1], SIZE_HW[0]] * 2 - 1)[None]
    twin = torch.nn.functional.grid_sample(
        torch.from_numpy(image).permute(2, 0, 1)[None].double(), grid, padding_mode="border", align_corners=False
    )
    expected = (twin[0] + 0.5).floor().permute(1, 2, 0).numpy() * seen(camera)[..., None]
    found = Undistorter(camera).apply(image)
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 1e-4  # measured 0: only exact halves may round either way
    grey = Undistorter(camera).apply(np.ascontiguousarray(image[..., 1]))
    assert np.array_equal(grey, found[..., 1])


def test_pixels_that_the_source_does_not_show_are_black():
    camera = camera_with(PINCUSHION)
    found = Undistorter(camera).apply(np.full((*SIZE_HW, 3), 255, np.uint8))
    hidden = ~seen(camera)
    assert np.array_equal(Undistorter(camera).coverage(), ~hidden)
    assert 0.05 < hidden.mean() < 0.3
    assert not found[hidden].any()
    assert (found[~hidden] == 255).all()


def test_corners_where_the_lens_model_folds_are_black():
    # r - 1.95 r^3 turns back at 0.413; the farthest corner of the image lies at 0.517.
    camera = camera_with((-1.95, 0, 0, 0, 0))
    radius = valid_radius(camera.distortion)
    beyond = np.linalg.norm(normalised_pixels(camera), axis=-1) > radius
    assert 0.01 < beyond.mean() < 0.1
    found = Undistorter(camera).apply(np.full(SIZE_HW, 255, np.uint8))
    assert np.array_equal(found == 0, beyond)


def test_a_lens_that_folds_over_much_of_the_image_is_refused():
    with pytest.raises(CaptureError, match=r"camera cam-1: its distortion .* turns back at 0\.236 .* inside \d\d% of"):
        Undistorter(camera_with((-6.0, 0, 0, 0, 0)))


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ImageSizeError, match="180x239"):
        Undistorter(camera_with(BARREL)).apply(np.zeros((239, 180, 3), np.uint8))
