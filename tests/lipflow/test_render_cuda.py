"""The CUDA backend over a CPU stand-in with nvdiffrast's signatures; on a device, see ``test_render_gpu``."""

import inspect
import sys

import numpy as np
import pytest
import torch

from lipflow.render import cuda
from lipflow.render.antialias import antialias, opposite_vertices
from lipflow.render.backend_choice import make_backend
from lipflow.render.cuda import CudaBackend, CudaUnavailableError
from lipflow.render.renderer import Renderer
from lipflow.render.software import SoftwareBackend
from lipflow.render.texture import sample_trilinear
from tests.lipflow import nvdiffrast_standin
from tests.lipflow.cuda_scenes import SIGNATURES, Views, backend_of, bowl, views_of
from tests.lipflow.render_scenes import bump, cameras_around, in_float32, smooth_texture

SIZE_HW = (72, 56)


@pytest.fixture(scope="module")
def views() -> Views:
    return views_of(*bowl(24, 30), SIZE_HW)


def test_pixels_agree_with_the_reference(views):
    """Not one of 5,431 covered pixels shows another triangle; worst uv 9e-7, depth 2e-4 mm, uv_da 3e-5 relative."""
    ours = backend_of(views).rasterize(views.corners, views.intrinsics, SIZE_HW, derivatives=True)
    reference = make_backend("reference", torch.device("cpu"), views.faces, views.face_uvs)
    truth = reference.rasterize(views.corners.double(), views.intrinsics.double(), SIZE_HW, derivatives=True)
    assert ours.triangle_id.dtype == torch.int32
    assert (truth.triangle_id >= 0).sum() > 4000
    assert torch.equal(ours.triangle_id, truth.triangle_id)
    torch.testing.assert_close(ours.uv.double(), truth.uv, atol=3e-6, rtol=0)
    torch.testing.assert_close(ours.depth.double(), truth.depth, atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.uv_da.double(), truth.uv_da, atol=1e-5, rtol=1e-4)


def test_back_faces_hide_nothing_where_one_looks_into_the_neck(views):
    """A plate over the head is seen through the neck, since the skull's inside is not drawn; its 2 triangles come last.

    Drawn without removing back faces, it would be hidden; removed afterwards, they would leave a hole.
    """
    vertices, faces, face_uvs = bowl(24, 30)
    plate = np.array([[-60.0, 100, -60], [60, 100, -60], [60, 100, 60], [-60, 100, 60]])
    count = len(vertices)
    faces = np.concatenate([faces, [[count, count + 1, count + 2], [count, count + 2, count + 3]]])
    scene = views_of(np.concatenate([vertices, plate]), faces, np.concatenate([face_uvs, np.zeros((2, 3, 2))]), SIZE_HW)
    neck = scene.corners[2:].contiguous()
    ours = backend_of(scene).rasterize(neck, scene.intrinsics[2:], SIZE_HW)
    truth = make_backend("reference", torch.device("cpu"), scene.faces, scene.face_uvs)
    assert torch.equal(ours.triangle_id, truth.rasterize(neck, scene.intrinsics[2:], SIZE_HW).triangle_id)
    context = nvdiffrast_standin.RasterizeCudaContext()
    both_sides, _ = nvdiffrast_standin.rasterize(context, ours.clip, scene.faces.int(), SIZE_HW)
    plate_pixels = ours.triangle_id >= len(faces) - 2
    assert plate_pixels.sum() > 100
    assert (both_sides[..., 3].int() - 1 >= len(faces) - 2).sum() < 0.1 * plate_pixels.sum()


def test_gradients_agree_with_the_reference_in_float64(views):
    """Of a random weighting of uv, depth and uv_da; relative error 1.5e-5 (corners), 1e-5 (K), 1.2e-5 (uv)."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, *SIZE_HW)
    weights = [torch.randn(shape + tail, generator=generator) for tail in ((2,), (), (2, 2))]

    def gradients(make, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (views.corners, views.intrinsics, views.face_uvs)]
        out = make(leaves[2]).rasterize(leaves[0], leaves[1], SIZE_HW, derivatives=True)
        total = (out.uv * weights[0]).sum() + (out.depth * weights[1]).sum() + (out.uv_da * weights[2]).sum()
        return torch.autograd.grad(total, leaves)

    ours = gradients(lambda uvs: CudaBackend(views.faces, uvs, nvdiffrast_standin), torch.float32)
    truth = gradients(lambda uvs: make_backend("reference", uvs.device, views.faces, uvs), torch.float64)
    for found, expected in zip(ours, truth, strict=True):
        assert (found - expected).norm() < 2e-4 * expected.norm(), (found - expected).norm() / expected.norm()


def test_rounding_of_corners_moves_edges_by_a_sixteenth_pixel(views):
    """What the real nvdiffrast does to triangle ids: 2.0 % of covered pixels here, silhouettes 0.2 %."""
    exact = backend_of(views).rasterize(views.corners, views.intrinsics, SIZE_HW)
    rounded = backend_of(views, subpixel_bits=4).rasterize(views.corners, views.intrinsics, SIZE_HW)
    covered = exact.triangle_id >= 0
    other = (exact.triangle_id != rounded.triangle_id).sum() / covered.sum()
    outline = (covered != (rounded.triangle_id >= 0)).sum() / covered.sum()
    assert 0 < other < 0.05
    assert outline < 0.01
    both = covered & (rounded.triangle_id >= 0)
    assert ((exact.depth - rounded.depth)[both].abs() < 0.2).float().mean() > 0.99


def test_all_views_are_one_instanced_call(views):
    """N views cost N views' triangles: the triangle list does not grow with N."""
    calls = []

    class Recording:
        def __getattr__(self, name):
            return getattr(nvdiffrast_standin, name)

        def rasterize(self, glctx, pos, tri, resolution, **options):
            calls.append((tuple(pos.shape), tuple(tri.shape)))
            return nvdiffrast_standin.rasterize(glctx, pos, tri, resolution, **options)

    backend = CudaBackend(views.faces, views.face_uvs, Recording())
    for count in (1, 3):
        backend.rasterize(views.corners[:count], views.intrinsics[:count], SIZE_HW)
    triangles = len(views.faces)
    assert calls == [((count, 3 * triangles, 4), (triangles, 3)) for count in (1, 3)]


def test_triangles_across_the_near_plane_are_drawn_where_they_are_in_front(views):
    """A wide lens inside of the mesh, close to its wall: triangles pass it by, and are seen down to 1 mm of depth."""
    corners = views.corners.clone()
    corners -= corners.mean(1, keepdim=True) - torch.tensor([78.0, 0, 30])
    wide = views.intrinsics.clone()
    wide[:, 0, 0], wide[:, 1, 1] = 6, 6
    faces = views.faces.flip(1)  # seen from inside
    inside = Views(corners, wide, faces, views.face_uvs.flip(1))
    depths = corners[:, faces][..., 2]
    assert ((depths < 0).any(-1) & (depths > 1).any(-1)).any()
    ours = backend_of(inside).rasterize(corners, wide, SIZE_HW)
    truth = make_backend("reference", torch.device("cpu"), faces, inside.face_uvs).rasterize(corners, wide, SIZE_HW)
    seen = truth.triangle_id >= 0
    assert seen.float().mean() > 0.5
    assert 1 <= truth.depth[seen].min() < 1.01
    assert torch.equal(ours.triangle_id, truth.triangle_id)
    torch.testing.assert_close(ours.depth, truth.depth, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("change", ["behind", "beside", "flat", "not finite"])
def test_views_that_see_nothing_are_empty(views, change):
    corners = views.corners.clone()
    if change == "behind":
        corners[..., 2] *= -1
    elif change == "beside":
        corners[..., 0] += 1e4
    elif change == "flat":
        corners[:] = corners[:, :1]
    else:
        corners[:] = torch.nan
    out = backend_of(views).rasterize(corners, views.intrinsics, SIZE_HW, derivatives=True)
    assert (out.triangle_id == -1).all()
    assert not out.uv.any()
    assert not out.depth.any()


def test_vertices_that_are_not_finite_take_their_triangles_with_them_and_no_more(views):
    """Neither the others' pixels change, nor do the cameras' gradients become NaN."""
    stray = views.corners.clone()
    stray[:, 300] = torch.nan
    without = (views.faces != 300).all(1)
    intrinsics = views.intrinsics.clone().requires_grad_()
    ours = backend_of(views).rasterize(stray, intrinsics, SIZE_HW)
    truth = make_backend("reference", torch.device("cpu"), views.faces, views.face_uvs)
    expected = truth.rasterize(stray, views.intrinsics, SIZE_HW)
    assert torch.equal(ours.triangle_id, expected.triangle_id)
    assert without[ours.triangle_id[ours.triangle_id >= 0].long()].all()
    (gradient,) = torch.autograd.grad(ours.uv.sum() + ours.depth.sum(), intrinsics)
    assert gradient.isfinite().all()


def test_a_camera_that_is_not_finite_sees_nothing(views):
    broken = views.intrinsics.clone()
    broken[0, 0, 0] = torch.nan
    seen = backend_of(views).rasterize(views.corners, broken, SIZE_HW).triangle_id >= 0
    assert seen.flatten(1).any(1).tolist() == [False, True, True]


def test_bilinear_sampling_is_that_of_grid_sample(views):
    generator = torch.Generator().manual_seed(2)
    texture, uv = torch.rand(2, 3, 16, 16, generator=generator), torch.rand(4, 6, 5, 2, generator=generator)
    ours = backend_of(views).sample(texture, uv, torch.ones(4, 6, 5, dtype=torch.bool))
    expected = torch.nn.functional.grid_sample(
        texture.repeat_interleave(2, 0), uv * 2 - 1, padding_mode="border", align_corners=False
    )
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_textures_shared_by_views_are_sampled_without_copies(views):
    generator = torch.Generator().manual_seed(3)
    texture, uv = torch.rand(2, 3, 16, 16, generator=generator), torch.rand(6, 6, 5, 2, generator=generator)
    uv_da = torch.rand(6, 6, 5, 2, 2, generator=generator) / 8
    texture.requires_grad_()
    backend, mask = backend_of(views), torch.rand(6, 6, 5, generator=generator) > 0.2
    sampled = [backend.sample(part, uv, mask, uv_da) for part in (texture, texture.repeat_interleave(3, 0))]
    assert torch.equal(*sampled)
    assert not sampled[0][~mask[:, None].expand_as(sampled[0])].any()
    gradients = [torch.autograd.grad(image.square().sum(), texture)[0] for image in sampled]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="6 views cannot share 4 textures"):
        backend.sample(texture[[0, 0, 1, 1]], uv, mask)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_pixel_of_two_to_the_level_texels_reads_that_mip_map(views, level):
    texture = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(4))
    uv = torch.rand(1, 6, 5, 2, generator=torch.Generator().manual_seed(5))
    uv_da = (torch.eye(2) * 2**level / 16).expand(1, 6, 5, 2, 2)
    backend = backend_of(views)
    pooled = torch.nn.functional.avg_pool2d(texture, 2**level)
    mask = torch.ones(1, 6, 5, dtype=torch.bool)
    sampled, expected = backend.sample(texture, uv, mask, uv_da), backend.sample(pooled, uv, mask)
    torch.testing.assert_close(sampled, expected, atol=1e-6, rtol=0)


def test_antialiased_area_and_its_gradient_are_exact():
    """A square whose straight edges lie between pixel centres: the picture's sum is its area in pixels; worst 4e-6."""
    faces, uvs = torch.tensor([[0, 2, 1], [0, 3, 2]]), torch.zeros(2, 3, 2)
    square = torch.tensor([[[-10.3, -7.2, 100], [9.4, -7.2, 100], [9.4, 8.7, 100], [-10.3, 8.7, 100]]])
    square.requires_grad_()
    camera = torch.tensor([[[100.0, 0, 16], [0, 100, 12], [0, 0, 1]]])
    backend = CudaBackend(faces, uvs, nvdiffrast_standin)
    seen = backend.rasterize(square, camera, (24, 32))
    mask = (seen.triangle_id >= 0).float()[:, None]
    image = backend.antialias(mask, seen)
    assert image.shape == mask.shape
    # Both axes blend on their own, so a corner pixel counts its two edges but not their product.
    row = image[0, 0, 12].sum()
    torch.testing.assert_close(row, torch.tensor(19.7), atol=1e-4, rtol=0)
    (gradient,) = torch.autograd.grad(row, square)
    torch.testing.assert_close(gradient[0, :, 0].sum(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient[0, [1, 2], 0].sum(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_the_seam_of_an_atlas_is_no_silhouette(views):
    """Silhouettes are found on the vertices' triangles, where the seam's two sides are neighbours."""
    backend = backend_of(views)
    seen = backend.rasterize(views.corners[:1], views.intrinsics[:1], SIZE_HW)
    ramp = seen.triangle_id[:, None].float()
    changed = (backend.antialias(ramp, seen) != ramp)[:, 0]
    covered = (seen.triangle_id >= 0).float()[:, None]
    near_outline = torch.nn.functional.max_pool2d(covered, 3, 1, 1) != -torch.nn.functional.max_pool2d(
        -covered, 3, 1, 1
    )
    assert changed.sum() > 50
    assert not (changed & ~near_outline[:, 0]).any()


def test_trilinear_sampling_is_that_of_the_cpu(views):
    """Worst difference 1.6e-5, of colours in 0..1; gradients 3.5e-6 relative."""
    backend = backend_of(views)
    seen = backend.rasterize(views.corners, views.intrinsics, SIZE_HW, derivatives=True)
    mask = seen.triangle_id >= 0
    texture = torch.rand(3, 2, 64, 64, generator=torch.Generator().manual_seed(7), requires_grad=True)
    pictures = [
        backend.sample(texture, seen.uv, mask, seen.uv_da),
        sample_trilinear(texture, seen.uv, seen.uv_da, mask),
    ]
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=0)
    found, expected = (torch.autograd.grad(image.square().sum(), texture)[0] for image in pictures)
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_antialiasing_and_its_gradients_are_those_of_the_cpu(views):
    """Of two independent implementations; silhouette gradients 5e-6 relative."""
    backend = backend_of(views)
    seen = backend.rasterize(views.corners, views.intrinsics, SIZE_HW)
    image = torch.rand(3, 2, *SIZE_HW, generator=torch.Generator().manual_seed(8)) * (seen.triangle_id >= 0)[:, None]

    def by_nvdiffrast(corners):
        return backend.antialias(image, backend.rasterize(corners, views.intrinsics, SIZE_HW))

    def by_ours(corners):
        pixels = corners @ views.intrinsics.transpose(1, 2)
        pixels, faces = pixels[..., :2] / pixels[..., 2:], views.faces
        depth, vertex_depth = seen.depth.detach(), corners[..., 2].detach()
        return antialias(image, seen.triangle_id, depth, pixels, vertex_depth, faces, opposite_vertices(faces))

    corners = views.corners.clone().requires_grad_()
    blended, expected = by_nvdiffrast(corners), by_ours(corners)
    assert ((blended != image).any(1)).sum() > 200
    torch.testing.assert_close(blended, expected, atol=1e-4, rtol=0)
    found, truth = (torch.autograd.grad(part.square().sum(), corners)[0] for part in (blended, expected))
    assert (found - truth).norm() < 1e-4 * truth.norm()


def test_what_is_missing_is_named(views, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CudaUnavailableError, match=r"needs a CUDA device.*take backend 'cpu'"):
        CudaBackend(views.faces, views.face_uvs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "nvdiffrast", None)
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", None)
    with pytest.raises(CudaUnavailableError, match=r"pip install 'lipflow\[cuda\]'"):
        CudaBackend(views.faces, views.face_uvs)


def test_a_failed_compilation_names_the_compiler(views, monkeypatch, caplog):
    class Broken:
        @staticmethod
        def RasterizeCudaContext(device=None):
            raise RuntimeError("Error building extension 'nvdiffrast_plugin'\nninja: build stopped")

    with pytest.raises(CudaUnavailableError, match=r"Error building extension.*nvcc"):
        CudaBackend(views.faces, views.face_uvs, Broken()).rasterize(views.corners, views.intrinsics, SIZE_HW)
    # Chosen by device, such a machine draws with its CPU; asked for by name, it says what is wrong.
    package = type(sys)("nvdiffrast")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "nvdiffrast", package)
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", Broken)
    arguments = (torch.device("cuda"), views.faces, views.face_uvs)
    with caplog.at_level("WARNING", "lipflow"):
        backend = make_backend("auto", *arguments)
    assert isinstance(backend, SoftwareBackend)
    assert "drawn by the CPU: nvdiffrast cannot be made ready on cuda" in caplog.text
    with pytest.raises(CudaUnavailableError, match=r"ninja and an nvcc"):
        make_backend("cuda", *arguments)


def test_a_gpu_without_nvdiffrast_is_drawn_for_by_the_cpu(views, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", None)
    with caplog.at_level("WARNING", "lipflow"):
        backend = make_backend("auto", torch.device("cuda"), views.faces, views.face_uvs)
    seen = backend.rasterize(views.corners, views.intrinsics, SIZE_HW)
    assert (seen.triangle_id >= 0).sum() > 4000
    assert "pip install 'lipflow[cuda]'" in caplog.text


def test_sizes_beyond_its_counters_are_refused(views):
    with pytest.raises(cuda.ConfigError, match="16777217 triangles"):
        CudaBackend(views.faces[:1].expand(2**24 + 1, 3), views.face_uvs[:1], nvdiffrast_standin)
    with pytest.raises(cuda.ConfigError, match="fewer views at once"):
        backend_of(views).rasterize(views.corners, views.intrinsics, (2**14, 2**14))


def test_the_stand_in_has_the_signatures_of_nvdiffrast():
    real = pytest.importorskip("nvdiffrast.torch")
    for name in SIGNATURES:
        found, expected = (inspect.signature(getattr(module, name)) for module in (nvdiffrast_standin, real))
        assert str(found) == str(expected)
    assert list(inspect.signature(nvdiffrast_standin.RasterizeCudaContext).parameters) == ["device"]


def test_the_renderer_draws_over_it_what_it_draws_over_the_cpu():
    """All of its outputs, mip-mapped and antialiased; worst difference 3.6e-6 (image), 4.6e-6 (coverage)."""
    topology, mesh = bump()
    cameras = in_float32(cameras_around([0.1, -0.4], SIZE_HW))
    texture = smooth_texture(64, dtype=torch.float32)
    ours = Renderer(topology, "cpu", filter="trilinear")
    theirs = Renderer(topology, "cpu", filter="trilinear")
    theirs._backend = CudaBackend(theirs.faces, theirs.face_uvs, nvdiffrast_standin)
    arguments = (mesh[None].float(), texture, cameras, SIZE_HW)
    expected, found = (renderer.render(*arguments, antialias=True) for renderer in (ours, theirs))
    assert torch.equal(found.triangle_id, expected.triangle_id)
    torch.testing.assert_close(found.image, expected.image, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.coverage, expected.coverage, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-5, rtol=0)
