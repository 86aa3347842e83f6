"""What leaves a picture as it is: moving mesh and camera together, the order of triangles, splits, resolution."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipflow.render.renderer import Renderer
from lipflow.types import CameraTensors
from tests.lipflow.render_scenes import bump, cameras_around, smooth_texture

SIZE_HW = (44, 56)
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
ANGLES = st.floats(-1.2, 1.2)


def draw(topology, mesh, cameras, backend, size_hw=SIZE_HW):
    return Renderer(topology, backend).render(mesh[None], smooth_texture(), cameras, size_hw)


def assert_same_picture(found, expected, tolerance, moved_pixels=0):
    """The same image, uv and depth to ``tolerance``, but for ``moved_pixels`` that may change sides at an edge."""
    differs = (found.image - expected.image).abs().amax(2) > tolerance
    differs |= (found.uv - expected.uv).abs().amax(-1) > tolerance
    differs |= ((found.depth - expected.depth).abs() > 1e3 * tolerance) | (found.mask != expected.mask)
    assert expected.mask.float().mean() > 0.1
    assert differs.sum() <= moved_pixels


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(view=ANGLES, seed=st.integers(0, 2**32 - 1))
def test_a_rigid_motion_of_mesh_and_camera_together(backend, view, seed):
    generator = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    rotation = torch.from_numpy(rotation * np.sign(np.linalg.det(rotation)))
    translation = torch.from_numpy(generator.uniform(-500, 500, 3))
    topology, mesh = bump()
    cameras = cameras_around([view], SIZE_HW)
    turned = cameras.cam_from_head[..., :3] @ rotation.T
    shifted = cameras.cam_from_head[..., 3:] - turned @ translation[:, None]
    moved = replace(cameras, cam_from_head=torch.cat([turned, shifted], -1))
    expected = draw(topology, mesh, cameras, backend)
    # Rounding of positions: measured 7e-14 in the image and 3e-12 mm. A pixel centre that close to an edge may change
    # sides.
    assert_same_picture(draw(topology, mesh @ rotation.T + translation, moved, backend), expected, 1e-10, 1)


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(view=ANGLES, seed=st.integers(0, 2**32 - 1))
def test_a_permutation_of_the_triangles_and_of_their_corners(backend, view, seed):
    """Not one bit for the order of triangles; rotating the corners of one changes the last bits of its uv."""
    generator = np.random.default_rng(seed)
    topology, mesh = bump()
    cameras = cameras_around([view], SIZE_HW)
    expected = draw(topology, mesh, cameras, backend)
    order = generator.permutation(len(topology.faces))
    permuted = replace(topology, faces=topology.faces[order], uv_faces=topology.uv_faces[order])
    found = draw(permuted, mesh, cameras, backend)
    assert torch.equal(found.image, expected.image)
    assert torch.equal(found.depth, expected.depth)
    drawn = expected.triangle_id[expected.mask]
    assert torch.equal(torch.from_numpy(order)[found.triangle_id[found.mask].long()], drawn.long())
    turns = (np.arange(3) + generator.integers(0, 3, (len(order), 1))) % 3
    rolled = replace(
        topology,
        faces=np.take_along_axis(topology.faces, turns, 1),
        uv_faces=np.take_along_axis(topology.uv_faces, turns, 1),
    )
    assert_same_picture(draw(rolled, mesh, cameras, backend), expected, 1e-10)


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(view=ANGLES, seed=st.integers(0, 2**32 - 1))
def test_triangles_split_in_three(backend, view, seed):
    generator = np.random.default_rng(seed)
    topology, mesh = bump()
    cameras = cameras_around([view], SIZE_HW)
    weights = torch.from_numpy(generator.dirichlet([2, 2, 2], len(topology.faces)))[:, :, None]
    inner = (mesh[topology.faces] * weights).sum(1)
    inner_uvs = (torch.from_numpy(topology.uvs[topology.faces]).double() * weights).sum(1).numpy().astype(np.float32)
    a, b, c = topology.faces.T
    new = len(mesh) + np.arange(len(inner))
    faces = np.concatenate([np.stack(corners, 1) for corners in ((a, b, new), (b, c, new), (c, a, new))])
    uvs = np.concatenate([topology.uvs, inner_uvs])
    split = replace(topology, faces=faces, uv_faces=faces, uvs=uvs, num_vertices=len(uvs))
    found = draw(split, torch.cat([mesh, inner]), cameras, backend)
    # Texture coordinates are stored as float32, the new ones rounded to 3e-8: measured 1.1e-7 in the image.
    assert_same_picture(found, draw(topology, mesh, cameras, backend), 1e-6)


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(view=ANGLES, shift=st.floats(-0.5, 0.5))
def test_twice_the_resolution_sampled_down(backend, view, shift):
    """1 / z is linear within a triangle: its mean over 2 x 2 pixels is that of the pixel they make up."""
    topology, mesh = bump()
    cameras = cameras_around([view], SIZE_HW)
    cameras.intrinsics[..., 0, 2] += shift
    double = torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)[:, None]
    fine_hw = (2 * SIZE_HW[0], 2 * SIZE_HW[1])
    coarse = draw(topology, mesh, cameras, backend)
    fine = draw(topology, mesh, CameraTensors(double * cameras.intrinsics, cameras.cam_from_head), backend, fine_hw)

    def blocks(tensor):
        return tensor[0, 0].unfold(0, 2, 2).unfold(1, 2, 2).flatten(-2)

    inside = (blocks(fine.triangle_id) == coarse.triangle_id[0, 0, ..., None]).all(-1) & coarse.mask[0, 0]
    assert inside.float().mean() > 0.1
    nearness = (1 / blocks(fine.depth)).mean(-1)
    # Measured 4e-16 relative.
    torch.testing.assert_close(nearness[inside], 1 / coarse.depth[0, 0][inside], rtol=1e-12, atol=0)
    # The texture is curved, and uv are ratios: a bound, not rounding.
    image = torch.nn.functional.avg_pool2d(fine.image[0], 2)[0]
    assert ((image - coarse.image[0, 0]).abs().amax(0) * inside).max() < 4e-2
