"""Geometry fitted to silhouettes alone, through the renderer."""

import pytest
import torch

from lipflow.render.renderer import Renderer
from pipeline.dome.face import procedural_face
from tests.lipflow.render_scenes import cameras_around, fitted_shift_px

SIZE_HW = (96, 80)
START_PX = 8


@pytest.mark.parametrize(
    "direction",
    [(0.6, -0.8), pytest.param((1.0, 0.0), marks=pytest.mark.slow), pytest.param((0.0, 1.0), marks=pytest.mark.slow)],
)
def test_translation_finds_a_target_silhouette_from_8_px_off(direction):
    """A head with an open neck, 8 px away in the image; plain Adam on squared differences, no coarse levels."""
    face = procedural_face()
    renderer = Renderer(face.topology, "cpu")
    cameras = cameras_around([0.0], SIZE_HW, distance=1500.0)
    head = torch.from_numpy(face.neutral).double()
    head = head - head.mean(0)
    texture = torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)
    mm_per_px = 1500.0 / cameras.intrinsics[0, 0, 0, 0]
    axes = cameras.cam_from_head[0, 0, :2, :3]  # the image's x and y in the head frame

    def silhouette(shift_px):
        moved = head + mm_per_px * shift_px @ axes
        return renderer.render(moved[None], texture, cameras, SIZE_HW, antialias=True).coverage

    target_px = torch.tensor([0.37, -0.21], dtype=torch.float64)
    assert 800 < silhouette(target_px).sum() < 4000
    shift = fitted_shift_px(silhouette, target_px, target_px + START_PX * torch.tensor(direction, dtype=torch.float64))
    assert (shift - target_px).norm().item() < 0.1  # measured 0.037, 0.069 and 0.044
