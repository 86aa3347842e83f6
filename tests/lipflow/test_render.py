"""The renderer against closed forms, finite differences and itself."""

import numpy as np
import pytest
import torch

from lipflow.errors import ConfigError
from lipflow.render import cpu
from lipflow.render.camera import cam_from_head_tensor, compose, project
from lipflow.render.interpolate import interpolate_cpu
from lipflow.render.reference import interpolate
from lipflow.render.renderer import Renderer
from lipflow.render.texture import sample_bilinear
from tests.lipflow.render_scenes import (
    QUAD_FACES,
    QUAD_UVS,
    bump,
    camera_at_origin,
    cameras_around,
    in_float32,
    make_topology,
    smooth_texture,
    tilted_quad,
)


def test_texture_coordinates_are_perspective_correct():
    topology, cameras = make_topology(QUAD_FACES, QUAD_UVS), camera_at_origin()
    out = Renderer(topology).render(tilted_quad()[None], torch.zeros(1, 1, 1, 8, 8), cameras, (32, 40))
    row, column = torch.nonzero(out.mask[0, 0], as_tuple=True)
    # The plane is z = 120 + (4/3) x: with the ray (rx, ry, 1), z = 120 / (1 - 4/3 rx); u = (x + 30) / 60.
    ray_x, ray_y = (column + 0.5 - 20) / 50, (row + 0.5 - 16) / 50
    depth = 120 / (1 - 4 / 3 * ray_x)
    expected = torch.stack([(ray_x * depth + 30) / 60, (ray_y * depth + 20) / 40], -1)
    assert len(row) > 200
    torch.testing.assert_close(out.uv[0, 0][row, column], expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(out.depth[0, 0][row, column], depth, atol=1e-3, rtol=0)


def test_back_faces_are_not_drawn():
    flipped = [face[::-1] for face in QUAD_FACES]
    out = Renderer(make_topology(flipped, QUAD_UVS)).render(
        tilted_quad()[None], torch.zeros(1, 1, 1, 8, 8), camera_at_origin(), (32, 40)
    )
    assert not out.mask.any()


def test_every_pixel_of_a_triangulated_plane_is_hit_once():
    """Shared edges neither leave cracks nor draw a pixel twice, also where they run through pixel centres.

    Corners are multiples of 1/64 px, so that the edge functions are exact: a pixel centre that a corner hits
    but for rounding may belong to two triangles, of which the depth test takes one.
    """
    grid = np.stack(np.meshgrid(np.arange(9) * 4.0, np.arange(9) * 4.0), -1).reshape(-1, 2) - 16
    rng = np.random.default_rng(0)
    inner = (np.abs(grid) < 16).all(1)
    jitter = np.where(rng.random(len(grid)) < 0.5, 0.5, rng.integers(-32, 32, len(grid)) / 64)
    grid[inner] += jitter[inner, None]
    corners = np.concatenate([grid, np.full((len(grid), 1), 32.0)], 1)
    faces = []
    for i in range(8):
        for j in range(8):
            a, b, c, d = i * 9 + j, i * 9 + j + 1, (i + 1) * 9 + j + 1, (i + 1) * 9 + j
            faces += [[a, c, b], [a, d, c]]
    intrinsics = np.array([[32.0, 0, 16], [0, 32.0, 16], [0, 0, 1]])
    hits = np.zeros((32, 32), int)
    for face in faces:
        ids, _ = cpu.rasterize(corners[None], np.array([face]), intrinsics[None], (32, 32))
        hits += ids[0] >= 0
    assert (hits == 1).all()


def test_triangle_that_reaches_behind_the_camera_is_drawn_where_it_is_in_front():
    """A floor from behind the camera to far away covers exactly the rows whose rays meet it in range."""
    floor = torch.tensor([[-5e3, 10.0, -100], [5e3, 10, -100], [5e3, 10, 900], [-5e3, 10, 900]])
    out = Renderer(make_topology([[0, 1, 2], [0, 2, 3]], QUAD_UVS)).render(
        floor[None], torch.zeros(1, 1, 1, 8, 8), camera_at_origin(), (32, 40)
    )
    ray_y = (torch.arange(32) + 0.5 - 16) / 50
    expected = (ray_y > 0) & (10 / ray_y < 900)
    assert torch.equal(out.mask[0, 0], expected[:, None].expand(32, 40))


def test_texture_row_zero_is_v_zero():
    texture = torch.zeros(1, 1, 1, 8, 8)
    texture[..., 0, :] = 1
    quad = torch.tensor([[-20.0, -20, 100], [20, -20, 100], [20, 20, 100], [-20, 20, 100]])
    out = Renderer(make_topology(QUAD_FACES, QUAD_UVS)).render(quad[None], texture, camera_at_origin(), (32, 40))
    bright = out.image[0, 0, 0] * out.mask[0, 0]
    assert bright[:10].max() == 1.0  # v = 0 lies at y = -20: above the centre, the smaller rows
    assert bright[16:].max() == 0.0


def test_projection_and_rendering_agree_on_pixel_centres():
    """A vertex projected to a pixel's centre is seen by exactly that pixel's ray."""
    cameras = camera_at_origin()
    point = torch.tensor([[[(13 + 0.5 - 20) / 50 * 100, (7 + 0.5 - 16) / 50 * 100, 100.0]]])
    pixels, depth = project(point, cameras.intrinsics[0], cameras.cam_from_head[0])
    torch.testing.assert_close(pixels[0, 0], torch.tensor([13.5, 7.5]))
    assert depth.item() == 100.0


def test_transform_composition_is_that_of_matrices():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 3, 4))
    homogeneous = [np.vstack([m, [0, 0, 0, 1]]) for m in (first, second)]
    np.testing.assert_allclose(compose(first, second), (homogeneous[0] @ homogeneous[1])[:3], atol=1e-12)
    assert cam_from_head_tensor(first, second).dtype == torch.float32


def test_disagreeing_leading_dimensions_are_refused():
    renderer = Renderer(make_topology(QUAD_FACES, QUAD_UVS))
    with pytest.raises(ValueError, match="disagree"):
        renderer.render(tilted_quad()[None].expand(2, -1, -1), torch.zeros(1, 1, 1, 8, 8), camera_at_origin(), (8, 8))


def test_fused_interpolation_equals_its_torch_twin_in_values_and_gradients():
    generator = torch.Generator().manual_seed(0)
    faces = torch.tensor([[0, 2, 1], [0, 3, 2], [4, 6, 5]])
    corners = torch.stack([tilted_quad(torch.float64), tilted_quad(torch.float64) + 3.0])
    extra = torch.tensor([[-9.0, -8, 70], [14, -6, 75], [2, 11, 60]], dtype=torch.float64)
    corners = torch.cat([corners, extra.expand(2, -1, -1)], 1)
    intrinsics = camera_at_origin(dtype=torch.float64).intrinsics[0].repeat(2, 1, 1)
    intrinsics[1, 0, 1] = 0.7  # a skewed camera
    face_uvs = torch.rand(3, 3, 2, generator=generator, dtype=torch.float64)
    ids, _ = cpu.rasterize(corners.numpy(), faces.numpy(), intrinsics.numpy(), (32, 40))
    triangle_id = torch.from_numpy(ids)
    assert set(triangle_id.unique().tolist()) == {-1, 0, 1, 2}
    weights = torch.randn(2, 32, 40, 3, generator=generator, dtype=torch.float64)

    def run(interpolate):
        leaves = [tensor.clone().requires_grad_() for tensor in (corners, intrinsics, face_uvs)]
        uv, depth, _ = interpolate(leaves[0], leaves[1], triangle_id, faces, leaves[2])
        (torch.cat([uv, depth[..., None]], -1) * weights).sum().backward()
        return [uv, depth, *(leaf.grad for leaf in leaves)]

    for fused, plain in zip(run(interpolate_cpu), run(interpolate), strict=True):
        scale = plain.abs().max()
        assert (fused - plain).abs().max() < 1e-11 * scale


def test_filters_and_antialiasing_are_those_of_their_modules():
    topology, mesh = bump()
    cameras, size_hw = cameras_around([0.1, -0.4], (40, 48)), (40, 48)
    texture = smooth_texture(64)
    plain = Renderer(topology, "cpu").render(mesh[None], texture, cameras, size_hw)
    assert torch.equal(
        plain.image[0], sample_bilinear(texture[0], plain.uv[0], plain.mask[0])
    )  # one texture for both views
    mipped = Renderer(topology, "cpu", filter="trilinear").render(mesh[None], texture, cameras, size_hw)
    truth = Renderer(topology, "reference", filter="trilinear").render(mesh[None], texture, cameras, size_hw)
    torch.testing.assert_close(mipped.image, truth.image, atol=1e-12, rtol=0)
    assert (mipped.image - plain.image).abs().max() > 1e-3
    leaf = mesh[None].clone().requires_grad_()
    smooth = Renderer(topology, "cpu").render(leaf, texture * 0 + 1, cameras, size_hw, antialias=True)
    changed = ((smooth.image.detach() - plain.mask[:, :, None].double()).abs() > 1e-9).any(2)
    # Only pixels at the outline are blended: those with a neighbour of the other kind.
    other = sum((plain.mask.roll(shift, axis) != plain.mask).int() for shift in (-1, 1) for axis in (2, 3)) > 0
    assert changed.any()
    assert not (changed & ~other).any()
    smooth.image.sum().backward()
    assert leaf.grad.abs().max() > 1e-3
    with pytest.raises(ConfigError, match="expected bilinear or trilinear"):
        Renderer(topology, filter="cubic")


def test_neither_autocast_nor_fast_matmuls_round_positions():
    """In bfloat16 a vertex 600 mm away is off by up to 2 mm, at these cameras by pixels."""
    topology, mesh = bump()
    size_hw = (40, 48)
    cameras, texture = in_float32(cameras_around([0.1, -0.4], size_hw)), smooth_texture(16, dtype=torch.float32)
    renderer, leaf = Renderer(topology, "cpu"), mesh[None].float().requires_grad_()

    def draw():
        out = renderer.render(leaf, texture, cameras, size_hw, antialias=True)
        pixels, depth = project(leaf, cameras.intrinsics[:, 0], cameras.cam_from_head[:, 0])
        (gradient,) = torch.autograd.grad(out.image.sum() + out.depth.mean() + pixels.sum(), leaf)
        return out.triangle_id, out.image.detach(), out.depth.detach(), pixels.detach(), depth.detach(), gradient

    expected = draw()
    with torch.autocast("cpu", torch.bfloat16):
        assert (leaf @ leaf.transpose(1, 2)).dtype == torch.bfloat16
        under_autocast = draw()
    for found, plain in zip(under_autocast, expected, strict=True):
        assert torch.equal(found, plain)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        fast = draw()
    finally:
        torch.set_float32_matmul_precision(precision)
    for found, plain in zip(fast, expected, strict=True):
        assert torch.equal(found, plain)


def test_a_texture_in_half_precision_is_looked_up_at_unrounded_coordinates():
    topology, mesh = bump()
    cameras, texture = in_float32(cameras_around([0.1], (40, 48))), smooth_texture(64, dtype=torch.bfloat16)
    renderer = Renderer(topology, "cpu")
    rough, exact = (renderer.render(mesh[None].float(), t, cameras, (40, 48)).image for t in (texture, texture.float()))
    assert torch.equal(rough, exact)


def test_coverage_is_the_mask_until_it_is_antialiased():
    topology, mesh = bump()
    cameras, texture = cameras_around([0.1, -0.4], (40, 48)), smooth_texture(8)
    renderer = Renderer(topology, "cpu")
    plain = renderer.render(mesh[None], texture, cameras, (40, 48))
    smooth = renderer.render(mesh[None], texture, cameras, (40, 48), antialias=True)
    assert torch.equal(plain.coverage, plain.mask.double())
    assert torch.equal(smooth.mask, plain.mask)
    ones = renderer.render(mesh[None], torch.ones_like(texture), cameras, (40, 48), antialias=True)
    torch.testing.assert_close(smooth.coverage, ones.image[:, :, 0], atol=1e-12, rtol=0)
    assert ((smooth.coverage > 0) & (smooth.coverage < 1)).sum() > 50
