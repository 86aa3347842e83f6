"""Images that are scored: each pixel is the mean of samples spread over it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import cluster.scores.area_sampling
from cluster.scores.area_sampling import render_area
from lipflow.render.renderer import Renderer
from lipflow.types import CameraTensors, Topology

SIZE = (24, 20)


@pytest.fixture
def scene():
    """A tilted square that ends inside of three cameras' images."""
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    triangles = np.array([[0, 2, 1], [0, 3, 2]], np.int32)
    topology = Topology(triangles, corners, triangles, np.ones((16, 16), np.float32), {}, 4)
    vertices = torch.tensor([[-80.0, -90, 0], [70, -100, 20], [90, 60, 40], [-60, 80, -10]])
    generator = torch.Generator().manual_seed(0)
    texture = torch.rand((1, 3, 3, 16, 16), generator=generator) * 255
    rows = [[[1.0, 0, 0, x], [0, 1.0, 0, 2.0], [0, 0, 1.0, 300.0]] for x in (-3.0, 0.0, 5.0)]
    intrinsics = torch.tensor([[20.0, 0, 10.3], [0, 20.0, 11.9], [0, 0, 1]]).expand(1, 3, 3, 3)
    cameras = CameraTensors(intrinsics, torch.tensor([rows]))
    return Renderer(topology), vertices[None], texture, cameras


def shifted(cameras: CameraTensors, x: float, y: float) -> CameraTensors:
    offset = torch.zeros(3, 3)
    offset[0, 2], offset[1, 2] = x, y
    return replace(cameras, intrinsics=cameras.intrinsics + offset)


def test_a_pixel_is_the_mean_of_renders_whose_centres_are_spread_over_it(scene):
    renderer, vertices, texture, cameras = scene
    ours = render_area(renderer, vertices, texture, cameras, SIZE)
    plain = [
        renderer.render(vertices, texture, shifted(cameras, x, y), SIZE)
        for x, y in itertools.product((-0.25, 0.25), repeat=2)
    ]
    covered = torch.stack([out.mask[0] for out in plain])
    assert 0 < covered.float().mean() < 1
    # Measured 3.1e-5 of 255: K is scaled here and shifted there.
    torch.testing.assert_close(ours.image, torch.stack([out.image[0] for out in plain]).mean(0), atol=1e-4, rtol=0)
    assert torch.equal(ours.coverage, covered.float().mean(0))
    assert torch.equal(ours.triangle_id >= 0, covered.all(0))
    assert torch.equal(ours.triangle_id, torch.where(covered.all(0), plain[0].triangle_id[0].long(), -1))


def test_one_sample_a_pixel_is_the_renderer_itself(scene):
    renderer, vertices, texture, cameras = scene
    ours, plain = render_area(renderer, vertices, texture, cameras, SIZE, 1), renderer.render(*scene[1:], SIZE)
    assert torch.equal(ours.image, plain.image[0])
    assert torch.equal(ours.triangle_id, plain.triangle_id[0].long())


def test_views_in_turn_are_the_views_at_once(scene, monkeypatch):
    renderer, vertices, texture, cameras = scene
    at_once = render_area(renderer, vertices, texture, cameras, SIZE)
    monkeypatch.setattr(cluster.scores.area_sampling, "_SAMPLES_AT_A_TIME", 1)
    in_turn = render_area(renderer, vertices, texture, cameras, SIZE)
    assert torch.equal(at_once.image, in_turn.image)
    assert torch.equal(at_once.triangle_id, in_turn.triangle_id)
