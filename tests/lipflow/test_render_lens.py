"""Rendering through a lens with distortion: vertices are moved, and what the lens does not image is left out."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lipflow.model.drivers import landmark_residuals_mm
from lipflow.render.camera import camera_corners, image_points, project, project_through_lens, transform_points
from lipflow.render.lens import distort, undistort, valid_radius
from lipflow.render.renderer import Renderer
from lipflow.types import CameraTensors, DrivingSignals
from tests.lipflow.render_scenes import bump, cameras_around, make_topology, smooth_texture

BARREL = (-0.3, 0.08, 0.001, -0.002, 0.0)
SIZE_HW = (60, 80)


def wide_camera(coefficients, focal=40.0):
    """At 100 mm from the plane z = 0, which fills its image of 90 degrees across; float64."""
    cameras = cameras_around([0.0], SIZE_HW, 100.0)
    matrix = torch.tensor([[focal, 0, 40], [0, focal, 30], [0, 0, 1]], dtype=torch.float64)
    pose = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 100]], dtype=torch.float64)
    lens = None if coefficients is None else torch.tensor(coefficients, dtype=torch.float64)[None, None]
    return replace(cameras, intrinsics=matrix[None, None], cam_from_head=pose[None, None], distortion=lens)


def plane(side: int, half_mm: float = 160.0):
    """A square in z = 0 with ``side`` vertices a side and u, v linear in x, y."""
    topology, mesh = bump(side, 2 * half_mm, 0.0)
    return make_topology(topology.faces, topology.uvs), mesh


def exact_uv(camera):
    """``(H, W, 2)`` what each pixel sees of the plane, by undistorting its ray."""
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) + 0.5 for side in SIZE_HW), indexing="ij")
    points = torch.stack([(column - 40) / 40, (row - 30) / 40], -1)
    rays = undistort(points, camera.distortion[0, 0])
    return torch.stack([100 * rays[..., 0], -100 * rays[..., 1]], -1) / 320 * 0.9 + 0.5


def test_a_lens_without_distortion_is_a_pinhole():
    topology, mesh = bump()
    cameras = cameras_around([0.2, -0.3], SIZE_HW)
    texture, renderer = smooth_texture(), Renderer(topology)
    plain = renderer.render(mesh[None], texture, cameras, SIZE_HW)
    zeros = replace(cameras, distortion=torch.zeros(1, 2, 5, dtype=torch.float64))
    assert torch.equal(renderer.render(mesh[None], texture, zeros, SIZE_HW).image, plain.image)
    # One lens of two: the other view stays as it was, but for the rounding of x / z * z.
    zeros.distortion[0, 1] = torch.tensor(BARREL)
    mixed = renderer.render(mesh[None], texture, zeros, SIZE_HW)
    torch.testing.assert_close(mixed.uv[0, 0], plain.uv[0, 0], atol=1e-12, rtol=0)
    assert (mixed.uv[0, 1] - plain.uv[0, 1]).abs().max() > 1e-4


def test_vertices_are_imaged_where_the_lens_images_them():
    _, mesh = bump()
    camera = wide_camera(BARREL)
    corners = camera_corners(mesh[None], camera)[0, 0]
    pinhole = camera_corners(mesh[None], replace(camera, distortion=None))[0, 0]
    expected = distort(pinhole[:, :2] / pinhole[:, 2:], camera.distortion[0, 0])
    torch.testing.assert_close(corners[:, :2] / corners[:, 2:], expected, atol=1e-14, rtol=0)
    assert torch.equal(corners[:, 2], pinhole[:, 2])


def test_the_error_inside_triangles_falls_with_the_square_of_their_size():
    """Against rays undistorted pixel by pixel, which know no vertices: a chord for an arc."""
    camera, errors = wide_camera((-0.1, 0.01, 0.001, -0.002, 0.0)), []
    expected = exact_uv(camera)
    for side in (9, 17, 33, 65):
        topology, mesh = plane(side)
        out = Renderer(topology).render(mesh[None], smooth_texture(), camera, SIZE_HW)
        assert out.mask.all()
        pixels = (out.uv[0, 0] - expected).norm(dim=-1) * 320 / 0.9 / 100 * 40
        errors.append(pixels.max().item())
    # Measured 0.90, 0.23, 0.058 and 0.014 px, for edges of 16, 8, 4 and 2 px.
    assert errors[-1] < 0.02
    assert all(4.8 > coarse / fine > 3.2 for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_triangles_beyond_the_valid_radius_are_left_out_and_nothing_folds_back(backend):
    """Beyond its valid radius this lens maps points back onto the image, where the plane would be drawn twice."""
    camera = wide_camera((-0.5, 0.0, 0.0, 0.0, 0.0), focal=55.0)
    radius = valid_radius(camera.distortion[0, 0])
    topology, mesh = plane(65)
    distance = (mesh[:, :2] / 100).norm(dim=-1)
    assert (distance > 1.2 * radius).any()
    out = Renderer(topology, backend).render(mesh[None], smooth_texture(), camera, SIZE_HW)
    imaged = torch.from_numpy(topology.faces)[out.triangle_id[out.mask].unique().long()]
    assert (distance[imaged] <= radius).all()
    assert 0.5 < out.mask.float().mean() < 1
    outside = torch.from_numpy(topology.faces)[(distance[torch.from_numpy(topology.faces)] > radius).any(-1)]
    leaf = mesh[None].clone().requires_grad_()
    Renderer(topology, backend).render(leaf, smooth_texture(), camera, SIZE_HW).uv.sum().backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[0, distance > radius] == 0).all()
    assert len(outside) > 100


def test_vertices_behind_a_camera_with_a_lens_take_their_triangles_with_them():
    camera = wide_camera(BARREL)
    topology, mesh = plane(17, 40.0)
    mesh = mesh.clone()
    mesh[0, 2] = 150.0
    out = Renderer(topology).render(mesh[None], smooth_texture(), camera, SIZE_HW)
    touching = (torch.from_numpy(topology.faces) == 0).any(-1)
    assert not touching[out.triangle_id[out.mask].long()].any()
    assert camera_corners(mesh[None], camera)[0, 0, 0].isnan().all()


def test_gradients_reach_lens_and_vertices_as_finite_differences_do():
    topology, mesh = bump(5, 150.0, 10.0)
    camera = wide_camera(BARREL)
    renderer = Renderer(topology)
    frozen = renderer.render(mesh[None], smooth_texture(), camera, SIZE_HW).triangle_id
    edge = sum((frozen.roll(shift, axis) != frozen).int() for shift in (-1, 1) for axis in (2, 3))
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(frozen.shape, generator=generator, dtype=torch.float64) * ((edge == 0) & (frozen >= 0))
    assert (weights > 0).sum() > 100

    def objective(vertices, lens):
        out = renderer.render(vertices, smooth_texture(), replace(camera, distortion=lens), SIZE_HW)
        return ((out.uv.sum(-1) + 1e-3 * out.depth) * weights).sum()

    arguments = [mesh[None], camera.distortion]
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    gradients = torch.autograd.grad(objective(*leaves), leaves)
    for index, step in ((0, 1e-4), (1, 1e-6)):
        direction = torch.randn(arguments[index].shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            moved = list(arguments)
            moved[index] = moved[index] + sign * step * direction
            values.append(objective(*moved))
        numeric, analytic = (values[0] - values[1]) / (2 * step), (gradients[index] * direction).sum()
        # Measured 4e-10 and 2e-10 relative.
        torch.testing.assert_close(analytic, numeric, rtol=1e-7, atol=0)


def test_points_project_through_a_lens_to_where_the_mesh_is_drawn():
    """A vertex lies at the image of its corner; beyond the valid radius points go on outwards, and have gradients."""
    camera = wide_camera(BARREL)
    _, mesh = plane(17, 40.0)
    single = CameraTensors(camera.intrinsics[:, 0], camera.cam_from_head[:, 0], camera.distortion[:, 0])
    pixels, depth = project_through_lens(mesh[None], single)
    corners = camera_corners(mesh[None], camera)[0, 0]
    imaged = corners.isfinite().all(-1)
    assert imaged.sum() > 100
    torch.testing.assert_close(
        pixels[0, imaged], image_points(corners[imaged], camera.intrinsics[0, 0]), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(depth[0, imaged], corners[imaged, 2])
    pinhole, _ = project(mesh[None], single.intrinsics, single.cam_from_head)
    assert (pixels - pinhole)[0, imaged].norm(dim=-1).max() > 1.5  # px; measured 2.07
    ray = torch.linspace(0.1, 5, 200, dtype=torch.float64)
    outwards = torch.stack([100 * ray, 30 * ray, torch.full_like(ray, 100)], -1)[None].requires_grad_()
    head_from_cam = torch.linalg.inv(torch.cat([single.cam_from_head, torch.tensor([[[0.0, 0, 0, 1]]]).double()], 1))
    points = transform_points(outwards, head_from_cam[:, :3])
    centre = single.intrinsics[:, None, :2, 2]
    distance = (project_through_lens(points, single)[0] - centre).norm(dim=-1)
    assert (distance.diff(dim=-1) > 0).all()
    (gradient,) = torch.autograd.grad(distance.sum(), outwards)
    assert gradient.isfinite().all()


def test_landmarks_are_compared_with_keypoints_through_the_lens():
    _, mesh = plane(5, 20.0)
    camera = wide_camera(BARREL)
    frontal = CameraTensors(camera.intrinsics[:, 0], camera.cam_from_head[:, 0], camera.distortion[:, 0])
    pixels, _ = project_through_lens(mesh[None], frontal)
    seen = torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1)
    exact = landmark_residuals_mm(mesh[None], DrivingSignals(keypoints=seen, frontal_cameras=frontal))
    assert exact.max() < 1e-5
    straight = replace(frontal, distortion=None)
    assert landmark_residuals_mm(mesh[None], DrivingSignals(keypoints=seen, frontal_cameras=straight)).max() > 0.5
