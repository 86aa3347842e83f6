"""Unwrapping against a texture that is known."""

import math

import numpy as np
import pytest
import torch

from lipflow.render.renderer import Renderer
from lipflow.render.unwrap import Unwrapper, vertex_normals
from lipflow.types import CameraTensors, Topology

SIZE = 64


def dome_mesh(rows=24, columns=24, radius=80.0):
    """A front-facing cap of a sphere, unwrapped on the unit square (the v axis grows with y)."""
    v, u = np.meshgrid(np.linspace(0, 1, rows), np.linspace(0, 1, columns), indexing="ij")
    x, y = (u - 0.5) * 1.6 * radius * 0.8, (v - 0.5) * 1.6 * radius * 0.8
    z = np.sqrt(radius**2 * 1.6 - x**2 - y**2)
    faces = []
    for i in range(rows - 1):
        for j in range(columns - 1):
            a, b, c, d = i * columns + j, i * columns + j + 1, (i + 1) * columns + j + 1, (i + 1) * columns + j
            faces += [[a, b, c], [a, c, d]]
    faces = np.array(faces, np.int64)
    uvs = np.stack([u, v], -1).reshape(-1, 2).astype(np.float32)
    vertices = np.stack([x, y, z], -1).reshape(-1, 3).astype(np.float32)
    return Topology(faces, uvs, faces, np.ones((SIZE, SIZE), np.float32), {}, len(vertices)), torch.from_numpy(vertices)


def cameras_around(angles_deg, image=160, distance=600.0):
    poses = []
    for angle in angles_deg:
        # OpenCV camera looking at the head from +z, turned about y.
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        turn = torch.tensor([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
        flip = torch.diag(torch.tensor([1.0, -1, -1]))
        rotation = flip @ turn
        poses.append(torch.cat([rotation, torch.tensor([[0.0], [0], [distance]])], 1))
    focal = image * distance / 170
    intrinsics = torch.tensor([[focal, 0, image / 2], [0, focal, image / 2], [0, 0, 1.0]])
    return CameraTensors(intrinsics.expand(len(poses), -1, -1), torch.stack(poses))


def known_texture():
    v, u = torch.meshgrid(torch.linspace(0, 6, SIZE), torch.linspace(0, 9, SIZE), indexing="ij")
    return torch.stack([torch.sin(u), torch.cos(v), torch.sin(u + v)]) * 90 + 128


def test_unwrapped_average_is_the_rendered_texture():
    topology, vertices = dome_mesh()
    cameras = cameras_around([-30, 0, 30])
    batched = CameraTensors(cameras.intrinsics[None], cameras.cam_from_head[None])
    images = Renderer(topology).render(vertices[None], known_texture()[None, None], batched, (160, 160)).image[0]
    unwrapper = Unwrapper(topology, SIZE)
    textures, weights = unwrapper.unwrap(vertices, images, cameras)
    average, seen = unwrapper.average(textures, weights)
    inner = torch.zeros_like(seen)
    inner[3:-3, 3:-3] = True  # texels at the cap's rim mix with the background
    assert seen[inner].float().mean() > 0.99
    error = (average - known_texture())[:, seen & inner]
    psnr = 10 * math.log10(255**2 / error.square().mean().item())
    assert psnr > 55  # measured 65 dB: two bilinear look-ups of a smooth texture


def test_occluded_texels_are_not_seen():
    topology, vertices = dome_mesh()
    cameras = cameras_around([0])
    # A second, small cap 40 mm in front hides the middle of the first.
    count = topology.num_vertices
    front = vertices * torch.tensor([0.3, 0.3, 1]) + torch.tensor([0.0, 0, 40])
    faces = np.concatenate([topology.faces, topology.faces + count])
    uvs = np.concatenate([topology.uvs * 0.5, topology.uvs * 0.5 + 0.5])
    double = Topology(faces, uvs, faces, topology.weight_mask, {}, 2 * count)
    _, weights = Unwrapper(double, SIZE).unwrap(torch.cat([vertices, front]), torch.ones(1, 3, 160, 160), cameras)
    hidden, visible = weights[0, 13:19, 13:19], weights[0, 3:6, 3:29]
    assert hidden.max() == 0
    assert visible.min() > 0


def test_texel_positions_interpolate_the_mesh():
    topology, vertices = dome_mesh()
    positions, normals, covered = Unwrapper(topology, SIZE).texel_positions(vertices)
    assert covered.all()
    # u and v are affine in x and y on this mesh.
    column = (torch.arange(SIZE) + 0.5) / SIZE
    expected_x = (column - 0.5) * 1.6 * 80 * 0.8
    torch.testing.assert_close(positions[..., 0], expected_x.expand(SIZE, SIZE), atol=1e-3, rtol=0)
    assert (normals[..., 2] > 0).all()
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(SIZE, SIZE))


@pytest.mark.parametrize("radius", [1.0, 80.0])
def test_vertex_normals_of_a_sphere_point_outwards(radius):
    tetra = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * radius
    faces = torch.tensor([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])
    normals = vertex_normals(tetra, faces)
    torch.testing.assert_close(normals, torch.nn.functional.normalize(tetra, dim=-1))
