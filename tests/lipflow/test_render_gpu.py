"""nvdiffrast on a real device (``-m gpu``) against its stand-in and the CPU."""

import numpy as np
import pytest
import torch

from lipflow.render.backend_choice import make_backend
from lipflow.render.cuda import CudaBackend
from pipeline.dome.face import procedural_face
from pipeline.dome.realface import load_realface
from tests.lipflow.cuda_scenes import backend_of, bowl, views_of
from tests.lipflow.render_scenes import FACE


def meshes() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The two meshes of the benchmark: a face of 11,432 triangles (or the procedural head) and one of 26,000."""
    face = load_realface(FACE) if FACE.is_dir() else procedural_face()
    topology = face.topology
    return {
        "face": (face.neutral, topology.faces, topology.uvs[topology.uv_faces]),
        "26k": bowl(101, 130),
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["face", "26k"])
def test_nvdiffrast_shows_what_the_stand_in_and_the_cpu_show(name):
    """Ids: 1/16 pixel of rounding apart from the CPU's. Where ids agree: uv, depth, image and gradients."""
    size_hw = (512, 334)
    views = views_of(*meshes()[name], size_hw)
    texture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    device = torch.device("cuda")
    real = CudaBackend(views.faces.to(device), views.face_uvs.to(device))
    backends = {"real": real, "stand-in": backend_of(views, subpixel_bits=4)}
    results = {}
    for kind, backend in backends.items():
        where = device if kind == "real" else torch.device("cpu")
        corners = views.corners.to(where).requires_grad_()
        out = backend.rasterize(corners, views.intrinsics.to(where), size_hw, derivatives=True)
        image = backend.antialias(backend.sample(texture.to(where), out.uv, out.triangle_id >= 0, out.uv_da), out)
        (gradient,) = torch.autograd.grad(image.square().mean(), corners)
        results[kind] = [t.detach().cpu() for t in (out.triangle_id, out.uv, out.depth, image, gradient)]
    cpu = make_backend("cpu", torch.device("cpu"), views.faces, views.face_uvs)
    exact = cpu.rasterize(views.corners, views.intrinsics, size_hw)
    ids, uv, depth, image, gradient = results["real"]
    covered = exact.triangle_id >= 0
    assert (ids != exact.triangle_id).sum() < 0.05 * covered.sum()
    assert (ids != results["stand-in"][0]).sum() < 5e-3 * covered.sum()
    same = covered & (ids == exact.triangle_id)
    torch.testing.assert_close(uv[same], exact.uv[same], atol=1e-5, rtol=0)
    torch.testing.assert_close(depth[same], exact.depth[same], atol=2e-2, rtol=0)
    agreeing = (ids == results["stand-in"][0])[:, None]
    assert ((image - results["stand-in"][3]).abs() * agreeing).mean() < 1e-3
    expected = results["stand-in"][4]
    assert (gradient - expected).norm() < 0.05 * expected.norm()
