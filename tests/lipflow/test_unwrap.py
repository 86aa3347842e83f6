"""Unwrapping against a texture that is known."""

import math

import numpy as np
import pytest
import torch

from lipflow.render import cpu
from lipflow.render.camera import project
from lipflow.render.renderer import Renderer
from lipflow.render.unwrap import (
    DEPTH_TOLERANCE_MM,
    GRAZING_COSINE,
    TextureAverage,
    Unwrapper,
    fill_unseen,
    vertex_normals,
)
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


def first_camera(cameras):
    return cameras.intrinsics[0], cameras.cam_from_head[0]


def known_texture():
    v, u = torch.meshgrid(torch.linspace(0, 6, SIZE), torch.linspace(0, 9, SIZE), indexing="ij")
    return torch.stack([torch.sin(u), torch.cos(v), torch.sin(u + v)]) * 90 + 128


def rendered(topology, vertices, cameras):
    """``(K, 160, 160, 3)`` float32 pictures with the known texture."""
    batched = CameraTensors(cameras.intrinsics[None], cameras.cam_from_head[None])
    images = Renderer(topology).render(vertices[None], known_texture()[None, None], batched, (160, 160)).image[0]
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def test_unwrapped_average_is_the_rendered_texture():
    topology, vertices = dome_mesh()
    cameras = cameras_around([-30, 0, 30])
    unwrapper, total = Unwrapper(topology, SIZE), TextureAverage(3, SIZE)
    surface = unwrapper.surface(vertices)
    for index, image in enumerate(rendered(topology, vertices, cameras)):
        total.add(*unwrapper.read(surface, image, cameras.intrinsics[index], cameras.cam_from_head[index]))
    average, seen = total.mean()
    inner = torch.zeros_like(seen)
    inner[3:-3, 3:-3] = True  # texels at the cap's rim mix with the background
    assert seen[inner].float().mean() > 0.99
    error = (average - known_texture())[:, seen & inner]
    psnr = 10 * math.log10(255**2 / error.square().mean().item())
    assert psnr > 55  # measured 65 dB: two bilinear look-ups of a smooth texture


def plainly_read(unwrapper, vertices, image, intrinsics, cam_from_head):
    """The same reading in plain torch, for all texels at once: the compiled loop's readable twin."""
    positions, normals, _ = unwrapper.texel_positions(vertices)
    height, width, _ = image.shape
    pixels, z = project(positions.reshape(-1, 3), intrinsics, cam_from_head)
    pixels, z = pixels.reshape(SIZE, SIZE, 2), z.reshape(SIZE, SIZE)
    grid = pixels / pixels.new_tensor([width, height]) * 2 - 1
    picture = torch.from_numpy(image).permute(2, 0, 1)[None]
    texture = torch.nn.functional.grid_sample(picture, grid[None], padding_mode="border", align_corners=False)[0]

    centre = -cam_from_head[:, :3].T @ cam_from_head[:, 3]
    cosine = (torch.nn.functional.normalize(centre - positions, dim=-1) * normals).sum(-1)
    corners = vertices[unwrapper.faces]
    flat = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    facing = torch.nn.functional.cosine_similarity(flat, centre - corners.mean(1), dim=-1)[unwrapper.triangle_id]

    in_camera = (vertices @ cam_from_head[:, :3].T + cam_from_head[:, 3])[None].double().numpy()
    _, front = cpu.rasterize(in_camera, unwrapper.faces.numpy(), intrinsics[None].double().numpy(), (height, width))
    place = (pixels - 0.5).clamp(torch.zeros(2), torch.tensor([width - 1.0, height - 1.0]))
    column, row = place.long().unbind(-1)
    slope = (1 - cosine**2).sqrt() / cosine
    allowed = DEPTH_TOLERANCE_MM + 2**0.5 * slope * z / intrinsics[0, 0]
    around = [
        front[0][(row + i).clamp(max=height - 1), (column + j).clamp(max=width - 1)] for i in (0, 1) for j in (0, 1)
    ]
    shown = torch.stack([(torch.from_numpy(depth) - z).abs() <= allowed for depth in around]).all(0)

    weight = ((cosine - GRAZING_COSINE) / (1 - GRAZING_COSINE)).clamp(min=0) ** 2
    weight = weight * ((grid.abs() <= 1).all(-1) & shown & (facing > GRAZING_COSINE))
    return texture * (weight > 0), weight


@pytest.mark.parametrize("angle", [-50, 0, 70])
def test_the_compiled_reading_agrees_with_plain_torch(angle):
    topology, vertices = dome_mesh()
    cameras = cameras_around([angle])
    camera = cameras.intrinsics[0] + torch.tensor([[0, 0.3, 30], [0, 0, -20], [0, 0, 0]]), cameras.cam_from_head[0]
    image = np.random.default_rng(0).random((160, 160, 3), dtype=np.float32)
    unwrapper = Unwrapper(topology, SIZE)
    texture, weight = unwrapper.read(unwrapper.surface(vertices), image, *camera)
    plain_texture, plain_weight = plainly_read(unwrapper, vertices, image, *camera)
    assert 0.05 < (weight > 0).float().mean() < 0.95  # some texels lie outside the image, or turn away
    assert torch.equal(weight > 0, plain_weight > 0)
    torch.testing.assert_close(weight, plain_weight, atol=2e-6, rtol=0)  # measured 3.6e-7
    # Measured 1.4e-5 of a range of 1: pixel coordinates in float32 against float64, times the slope of noise.
    torch.testing.assert_close(texture, plain_texture, atol=5e-5, rtol=0)


def test_pixels_that_show_nothing_are_not_read():
    topology, vertices = dome_mesh()
    camera = first_camera(cameras_around([0]))
    image, valid = np.full((160, 160, 3), 200, np.uint8), np.ones((160, 160), bool)
    image[:, :80], valid[:, :80] = 0, False  # as the rim of an undistorted image
    unwrapper = Unwrapper(topology, SIZE)
    texture, weight = unwrapper.read(unwrapper.surface(vertices), image, *camera, valid=valid)
    assert weight[:, : SIZE // 2 - 1].max() == 0
    assert weight[4:-4, SIZE // 2 + 2 : -4].min() > 0
    assert torch.equal(texture[:, weight > 0], torch.full_like(texture[:, weight > 0], 200))


def test_the_average_weighs_and_masks():
    total = TextureAverage(2, 2)
    total.add(torch.full((2, 2, 2), 10.0), torch.tensor([[1.0, 0], [0.5, 0]]))
    total.add(torch.full((2, 2, 2), 40.0), torch.tensor([[2.0, 0], [0, 0]]))
    average, seen = total.mean()
    assert seen.tolist() == [[True, False], [True, False]]
    torch.testing.assert_close(average[0], torch.tensor([[30.0, 20], [10, 20]]))  # unseen: the mean of 30 and 10


def test_a_texture_that_nobody_saw_has_no_colour_to_fill_with():
    assert torch.equal(fill_unseen(torch.ones(3, 2, 2), torch.zeros(2, 2, dtype=torch.bool)), torch.zeros(3, 2, 2))


def two_layers():
    """A second, small cap 40 mm in front of the middle of the first; their atlases lie in two corners."""
    topology, vertices = dome_mesh()
    count = topology.num_vertices
    front = vertices * torch.tensor([0.3, 0.3, 1]) + torch.tensor([0.0, 0, 40])
    faces = np.concatenate([topology.faces, topology.faces + count])
    uvs = np.concatenate([topology.uvs * 0.5, topology.uvs * 0.5 + 0.5])
    double = Topology(faces, uvs, faces, topology.weight_mask, {}, 2 * count)
    return double, torch.cat([vertices, front])


def test_occluded_texels_are_not_seen():
    topology, vertices = two_layers()
    unwrapper = Unwrapper(topology, SIZE)
    camera = first_camera(cameras_around([0]))
    _, weight = unwrapper.read(unwrapper.surface(vertices), np.ones((160, 160, 3), np.uint8), *camera)
    hidden, visible = weight[13:19, 13:19], weight[3:6, 3:29]
    assert hidden.max() == 0
    assert visible.min() > 0


@pytest.mark.parametrize("angle", [-15, 0, 20])
def test_no_texel_mixes_in_the_colour_of_what_lies_before_or_behind_it(angle):
    topology, vertices = two_layers()
    camera = first_camera(cameras_around([angle]))
    corners = (vertices @ camera[1][:, :3].T + camera[1][:, 3])[None].double().numpy()
    faces, _ = cpu.rasterize(corners, topology.faces, camera[0][None].double().numpy(), (160, 160))
    layer = np.where(faces[0] < 0, -1, faces[0] >= len(topology.faces) // 2)
    image = np.stack([layer == 0, layer == 1, layer == -1], -1).astype(np.uint8) * 255  # red behind, green before

    unwrapper = Unwrapper(topology, SIZE)
    texture, weight = unwrapper.read(unwrapper.surface(vertices), image, *camera)
    behind, before = weight[: SIZE // 2, : SIZE // 2] > 0, weight[SIZE // 2 :, SIZE // 2 :] > 0
    assert behind.float().mean() > 0.75  # measured 0.87 at least
    assert before.float().mean() > 0.75  # measured 0.80 at least
    assert texture[0, : SIZE // 2, : SIZE // 2][behind].min() == 255
    assert texture[1, SIZE // 2 :, SIZE // 2 :][before].min() == 255


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
