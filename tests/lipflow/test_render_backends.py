"""The cpu backend against the reference, gradients against finite differences, and the edges of both."""

import os
import signal
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lipflow.errors import ConfigError
from lipflow.render.backend_choice import make_backend
from lipflow.render.camera import camera_corners, transform_points
from lipflow.render.parallel import run_parallel
from lipflow.render.renderer import Renderer
from lipflow.types import CameraTensors
from tests.lipflow.render_scenes import (
    FACE,
    QUAD_FACES,
    QUAD_UVS,
    bump,
    camera_at_origin,
    cameras_around,
    in_float32,
    make_topology,
    photographed_face,
    smooth_texture,
    tilted_quad,
)

BACKENDS = ["cpu", "reference"]


def compare(topology, vertices, texture, cameras, size_hw):
    """Share of pixels whose ids differ, and the largest difference of image, uv and depth where they do not."""
    fast, truth = (
        Renderer(topology, backend=backend).render(vertices, texture, cameras, size_hw) for backend in BACKENDS
    )
    same = fast.triangle_id == truth.triangle_id
    assert truth.mask.float().mean() > 0.2
    image = ((fast.image - truth.image).abs().amax(2) * same).max().item()
    uv = ((fast.uv - truth.uv).abs().amax(-1) * same).max().item()
    depth = ((fast.depth - truth.depth).abs() * same).max().item()
    return 1 - same.float().mean().item(), image, uv, depth


@pytest.mark.skipif(not FACE.is_dir(), reason="the real face asset (../shared/assets/realface) is not here")
@pytest.mark.parametrize("height", [512, pytest.param(1024, marks=pytest.mark.slow)])
def test_cpu_shows_the_real_face_as_the_reference_does(height):
    differing, image, uv, depth = compare(*photographed_face(height))
    # Measured at both sizes: not one id, not one bit of image, uv or depth.
    assert differing <= 1e-5
    assert image <= 1e-5
    assert uv <= 1e-7
    assert depth <= 1e-3


def test_cpu_shows_the_dome_head_as_the_reference_does():
    from pipeline.dome.face import procedural_face

    face = procedural_face(texture_size=64)
    vertices = torch.from_numpy(np.stack([face.neutral, face.posed(np.full(len(face.names), 0.1))]))
    texture = torch.from_numpy(face.texture).permute(2, 0, 1).float().expand(2, 1, -1, -1, -1) / 255
    cameras = in_float32(cameras_around([0.0, 0.8, -2.0], (256, 192), 700.0))
    cameras = CameraTensors(cameras.intrinsics.expand(2, -1, -1, -1), cameras.cam_from_head.expand(2, -1, -1, -1))
    differing, image, uv, depth = compare(face.topology, vertices, texture, cameras, (256, 192))
    # Measured: nothing differs but the last bit of a few uv (6e-8) and the image there.
    assert differing <= 1e-5
    assert image <= 1e-5
    assert uv <= 1e-7
    assert depth <= 1e-3


def test_backends_agree_where_edges_and_corners_run_through_pixel_centres():
    """Exact ties, on a plane of squares whose corners are pixel centres: the same owner in both."""
    side = 9
    grid = np.stack(np.meshgrid(np.arange(side) * 4.0, np.arange(side) * 4.0), -1).reshape(-1, 2) - 15.5
    corners = torch.from_numpy(np.concatenate([grid, np.full((len(grid), 1), 32.0)], 1))[None]
    faces = torch.from_numpy(bump(side)[0].faces)[:, [0, 2, 1]]
    intrinsics = torch.tensor([[[32.0, 0, 16], [0, 32.0, 16], [0, 0, 1]]], dtype=torch.float64)
    fast, truth = (make_backend(name, torch.device("cpu"), faces, torch.zeros(len(faces), 3, 2)) for name in BACKENDS)
    ids = fast.rasterize(corners, intrinsics, (32, 32)).triangle_id
    assert torch.equal(ids, truth.rasterize(corners, intrinsics, (32, 32)).triangle_id)
    # The first row and column of pixel centres lie on the plane's rim, which is drawn; the last do not.
    assert (ids >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["vertices", "pose", "intrinsics", "uv", "texture"])
def test_gradients_equal_finite_differences_in_float64(backend, what):
    """Of image and depth, well inside of the outline, where coverage does not change under a small step.

    Relative errors, the worst of five directions, measured (rounding of the difference is most of it):

    =========  ========  =======  ==========  =======  =======
    backend    vertices  pose     intrinsics  uv       texture
    =========  ========  =======  ==========  =======  =======
    cpu        2.4e-8    1.8e-7   6.6e-10     1.6e-9   1.5e-11
    reference  6.3e-9    1.3e-8   1.8e-9      1.6e-9   1.5e-11
    =========  ========  =======  ==========  =======  =======
    """
    topology, mesh = bump()
    renderer = Renderer(topology, backend=backend)
    cameras, size_hw = cameras_around([0.15, -0.5], (40, 48)), (40, 48)
    generator = torch.Generator().manual_seed(0)
    # A texture that is linear in u and v: bilinear look-up of it has no kinks for the step to cross.
    ramp = torch.linspace(0, 1, 16, dtype=torch.float64)
    texture = torch.stack([ramp.expand(16, 16), ramp[:, None].expand(16, 16)])[None, None]
    texture = texture.expand(-1, 2, -1, -1, -1) * torch.tensor([1.0, 0.7]).double().view(1, 2, 1, 1, 1)
    arguments = {
        "vertices": mesh[None],
        "pose": cameras.cam_from_head,
        "intrinsics": cameras.intrinsics,
        "uv": renderer.face_uvs.double(),
        "texture": texture,
    }

    def draw(values):
        renderer._backend = make_backend(backend, torch.device("cpu"), renderer.faces, values["uv"])
        views = CameraTensors(values["intrinsics"], values["pose"])
        return renderer.render(values["vertices"], values["texture"], views, size_hw)

    frozen = draw(arguments).triangle_id
    assert len(frozen.unique()) > 60
    # A step may move the edges between triangles too, over which depth and uv have kinks: compare inside of triangles.
    edge = sum((frozen.roll(shift, axis) != frozen).int() for shift in (-1, 1) for axis in (2, 3))
    inside = (edge == 0) & (frozen >= 0)
    assert inside.float().mean() > 0.05
    weights = torch.rand(1, 2, 2, *size_hw, generator=generator, dtype=torch.float64) * inside[:, :, None]

    def objective(values):
        out = draw(values)
        return (out.image * weights).sum() + 1e-2 * (out.depth * weights[:, :, 0]).sum()

    leaf = arguments[what].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(arguments | {what: leaf}), leaf)
    step = {"vertices": 1e-4, "pose": 1e-6, "intrinsics": 1e-4, "uv": 1e-5, "texture": 1e-3}[what]
    worst = 0.0
    for _ in range(5):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        if what == "intrinsics":  # five entries of K are free
            direction *= torch.tensor([[1.0, 1, 1], [0, 1, 1], [0, 0, 0]])
        with torch.no_grad():
            ahead, behind = (
                objective(arguments | {what: arguments[what] + sign * step * direction}) for sign in (1, -1)
            )
        numeric, analytic = ((ahead - behind) / (2 * step)).item(), (gradient * direction).sum().item()
        worst = max(worst, abs(numeric - analytic) / abs(numeric))
    assert worst < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_of_uv_by_pixel_are_differences_and_have_gradients_of_their_own(backend):
    topology, mesh = bump()
    cameras, size_hw = cameras_around([0.3], (40, 48)), (40, 48)
    corners = camera_corners(mesh[None], cameras)[0]
    faces, face_uvs = torch.from_numpy(topology.faces), torch.from_numpy(topology.uvs[topology.uv_faces]).double()
    rasterizer = make_backend(backend, torch.device("cpu"), faces, face_uvs)

    def draw(corners, intrinsics):
        return rasterizer.rasterize(corners, intrinsics, size_hw, derivatives=True)

    out = draw(corners, cameras.intrinsics[0])
    for axis, dim in ((0, 2), (1, 1)):
        moved = cameras.intrinsics[0].clone()
        moved[:, axis, 2] -= 1e-5  # a camera that sees what lies 1e-5 px further
        ahead, same = draw(corners, moved), out.triangle_id >= 0
        same &= ahead.triangle_id == out.triangle_id
        difference = (ahead.uv - out.uv)[same] / 1e-5
        # Measured 3.2e-8: curvature and rounding of the difference.
        torch.testing.assert_close(out.uv_da[..., axis][same], difference, atol=1e-7, rtol=0)
        assert same.float().mean() > 0.2, dim
    weights = torch.randn(out.uv_da.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edge = sum((out.triangle_id.roll(shift, axis) != out.triangle_id).int() for shift in (-1, 1) for axis in (1, 2))
    weights *= (edge == 0)[..., None, None]
    leaves = [corners.clone().requires_grad_(), cameras.intrinsics[0].clone().requires_grad_()]
    gradients = torch.autograd.grad((draw(*leaves).uv_da * weights).sum(), leaves)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    directions[1] *= torch.tensor([[1.0, 1, 1], [0, 1, 1], [0, 0, 0]])
    for index, step in ((0, 1e-4), (1, 1e-4)):
        values = []
        for sign in (1, -1):
            moved = [corners, cameras.intrinsics[0]]
            moved[index] = moved[index] + sign * step * directions[index]
            values.append((draw(*moved).uv_da * weights).sum())
        numeric = (values[0] - values[1]) / (2 * step)
        # Measured, worst case: 6.1e-9 relative.
        torch.testing.assert_close((gradients[index] * directions[index]).sum(), numeric, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_triangles_without_area_and_with_vertices_that_are_no_numbers_are_left_out(backend):
    """A line, a point, a triangle seen edge-on and one with a NaN corner vanish; the others stay as they were."""
    extra = torch.tensor([[0.0, 0, 50], [5, 0, 50], [10, 0, 50], [0, 0, 90], [torch.nan, 1, 50], [torch.inf, 1, 50]])
    vertices = torch.cat([tilted_quad(), extra])[None]
    bad = [[4, 5, 6], [4, 4, 4], [4, 7, 4], [0, 4, 7], [4, 8, 5], [5, 8, 4], [4, 9, 5], [5, 9, 4]]
    uvs = QUAD_UVS + [[0.5, 0.5]] * len(extra)
    texture, cameras = torch.rand(1, 1, 3, 8, 8), camera_at_origin()
    plain = Renderer(make_topology(QUAD_FACES, QUAD_UVS), backend).render(
        tilted_quad()[None], texture, cameras, (32, 40)
    )
    vertices.requires_grad_()
    out = Renderer(make_topology(QUAD_FACES + bad, uvs), backend).render(vertices, texture, cameras, (32, 40))
    assert torch.equal(out.triangle_id, plain.triangle_id)
    assert torch.equal(out.image, plain.image)
    out.image.sum().backward()
    assert vertices.grad.isfinite().all()
    assert (vertices.grad[0, 4:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["behind the camera", "beside the image", "no numbers", "no K", "K of zeros"])
def test_views_that_see_nothing_are_empty_and_have_zero_gradients(backend, empty):
    cameras, vertices = camera_at_origin(), tilted_quad()[None]
    if empty == "behind the camera":
        vertices = vertices * torch.tensor([1.0, 1.0, -1.0])
    elif empty == "beside the image":
        vertices = vertices + torch.tensor([1e4, 0.0, 0.0])
    elif empty == "no numbers":
        vertices = vertices * torch.nan
    else:
        cameras.intrinsics = cameras.intrinsics * (torch.nan if empty == "no K" else 0.0)
    leaves = [vertices.requires_grad_(), cameras.intrinsics.requires_grad_(), cameras.cam_from_head.requires_grad_()]
    texture = torch.ones(1, 1, 1, 8, 8)
    out = Renderer(make_topology(QUAD_FACES, QUAD_UVS), backend).render(vertices, texture, cameras, (32, 40))
    assert not out.mask.any()
    for tensor in (out.image, out.weight, out.depth, out.uv):
        assert (tensor == 0).all()
    (out.image.sum() + out.depth.sum()).backward()
    if "K" not in empty:
        assert all((leaf.grad == 0).all() for leaf in leaves[:2])


def test_images_beyond_2048_pixels_show_what_small_ones_show():
    """4096 x 2048: the centre pixel of every block of 3 x 3 of a picture three times as large is the small one's."""
    topology, mesh = bump(33)
    renderer, texture = Renderer(topology, "cpu"), smooth_texture()
    cameras = cameras_around([0.2], (683, 1366))
    small = renderer.render(mesh[None], texture, cameras, (683, 1366))
    scale = torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64)[:, None]
    large = renderer.render(mesh[None], texture, replace(cameras, intrinsics=scale * cameras.intrinsics), (2049, 4098))
    differs = large.triangle_id[..., 1::3, 1::3] != small.triangle_id
    assert differs.sum() <= 2  # measured 0: rounding of K may move an exact tie
    worst = ((large.depth[..., 1::3, 1::3] - small.depth).abs() * ~differs).max()
    assert worst < 1e-9  # measured 5e-13


def test_results_do_not_depend_on_the_number_of_threads():
    topology, mesh = bump(17)
    cameras = in_float32(cameras_around([0.2, -0.4, 0.9], (90, 70)))
    renderer, texture = Renderer(topology, "cpu"), smooth_texture(dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            vertices = mesh[None].float().requires_grad_()
            out = renderer.render(vertices, texture, cameras, (90, 70))
            (out.image.sum() + out.depth.sum()).backward()
            results.append((out.triangle_id, out.uv, out.depth, vertices.grad))
    finally:
        torch.set_num_threads(before)
    for ids, uv, depth, gradient in results[1:]:
        assert torch.equal(ids, results[0][0])
        assert torch.equal(uv, results[0][1])
        assert torch.equal(depth, results[0][2])
        # Sums over bands are in float64: measured, no bit of the float32 result differs.
        torch.testing.assert_close(gradient, results[0][3], rtol=1e-6, atol=1e-6)


def test_a_forked_process_has_a_pool_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    tasks = [partial(divmod, number, 2) for number in range(5)]
    expected = [divmod(number, 2) for number in range(5)]
    assert run_parallel(tasks) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that forking a process with threads may hang
        child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that waits for its parent's threads would wait for ever
        os._exit(run_parallel(tasks) != expected)
    assert os.waitpid(child, 0)[1] == 0


class _Allocations(TorchDispatchMode):
    """Elements of every tensor that an operation makes, views not counted."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, int] = {}
        self._alive = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._alive.append(result)  # so that no storage is freed and found again
            self.storages[result.untyped_storage().data_ptr()] = result.untyped_storage().nbytes()
        return result


def test_the_mesh_of_a_frame_is_read_by_its_views_and_not_copied():
    cameras = in_float32(cameras_around(np.linspace(-1, 1, 16), (40, 48)))
    vertices = bump(40)[1][None].float()
    with _Allocations() as made:
        corners = camera_corners(vertices, cameras)
    size = corners.untyped_storage().nbytes()
    # The product in float64, its rows put together, and the factors; a mesh for every view would be two more.
    assert sum(made.storages.values()) <= 3 * size + 3 * (cameras.cam_from_head.nbytes + vertices.nbytes)
    assert 3 * vertices.nbytes < size
    torch.testing.assert_close(corners, transform_points(vertices[:, None], cameras.cam_from_head))


def test_the_mask_alone_is_the_weight_of_the_image():
    topology, mesh = bump()
    weight_mask = np.random.default_rng(0).uniform(0, 2, (16, 16)).astype(np.float32)
    renderer = Renderer(replace(topology, weight_mask=weight_mask), "cpu")
    cameras = in_float32(cameras_around([0.1, 0.5], (40, 48)))
    out = renderer.render(mesh[None].float(), smooth_texture(dtype=torch.float32), cameras, (40, 48))
    alone = renderer.render_mask(mesh[None].float().requires_grad_(), cameras, (40, 48))
    assert torch.equal(alone, out.weight)
    assert out.weight.max() > 1
    assert not alone.requires_grad


def test_a_backend_that_cannot_work_says_what_to_do():
    topology = make_topology(QUAD_FACES, QUAD_UVS)
    with pytest.raises(ConfigError, match="expected auto, reference, cpu or cuda"):
        Renderer(topology, backend="opengl")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"needs a CUDA device.*or take backend 'cpu'"):
            Renderer(topology, backend="cuda").to("cpu")
