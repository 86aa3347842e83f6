"""Our CUDA backend against the bare nvdiffrast calls that do the same work: rasterize, interpolate, texture, antialias.

The bare calls draw the same batch in instanced mode. They do not remove back faces, and so do less than ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from render_scenes import VIEWS, Mesh
from torch import Tensor

from lipflow.render.camera import transform_points
from lipflow.render.cuda import CudaBackend
from pipeline.dome.rig import arc_rig

_CALLS = 10
"""In one timing; the first timing of a case does not count."""


class Batch:
    """One frame's mesh, its texture and N cameras on a device, as leaves of the graph."""

    def __init__(self, mesh: Mesh, size_hw: tuple[int, int], views: int, device: torch.device):
        cameras, world_from_head = arc_rig(VIEWS, size_hw, seed=0)
        rotations = [camera.cam_from_world[:, :3] @ world_from_head[:, :3] for camera in cameras[:views]]
        shifts = [camera.cam_from_world @ [*world_from_head[:, 3], 1] for camera in cameras[:views]]
        poses = [
            torch.cat([torch.tensor(r), torch.tensor(s)[:, None]], 1) for r, s in zip(rotations, shifts, strict=True)
        ]
        self.size_hw = size_hw
        self.pose = torch.stack(poses).float().to(device)
        self.intrinsics = torch.stack([torch.tensor(c.intrinsics) for c in cameras[:views]]).float().to(device)
        self.vertices = torch.from_numpy(mesh.vertices).to(device).requires_grad_()
        self.texture = torch.from_numpy(mesh.texture)[None].to(device).requires_grad_()

    def corners(self) -> Tensor:
        """``(N, V, 3)`` in camera space."""
        return transform_points(self.vertices[None], self.pose)


def ours(mesh: Mesh, batch: Batch, rasterizer: Any = None) -> Callable[[], Tensor]:
    """A function that draws the batch through the backend."""
    topology = mesh.topology
    device = batch.vertices.device
    faces = torch.from_numpy(topology.faces).to(device)
    face_uvs = torch.from_numpy(topology.uvs[topology.uv_faces]).to(device)
    backend = CudaBackend(faces, face_uvs, rasterizer)

    def draw() -> Tensor:
        seen = backend.rasterize(batch.corners(), batch.intrinsics, batch.size_hw)
        return backend.antialias(backend.sample(batch.texture, seen.uv, seen.triangle_id >= 0), seen)

    return draw


def bare(mesh: Mesh, batch: Batch, dr: Any) -> Callable[[], Tensor]:
    """A function that draws the batch by nvdiffrast alone."""
    topology, device = mesh.topology, batch.vertices.device
    tri = torch.from_numpy(topology.faces).int().to(device)
    tri_uv = torch.from_numpy(topology.uv_faces).int().to(device)
    uvs = torch.from_numpy(topology.uvs)[None].to(device)
    context = dr.RasterizeCudaContext(device=device)
    silhouettes = dr.antialias_construct_topology_hash(tri)
    height, width = batch.size_hw
    near, far = 100.0, 5000.0
    clip_from_cam = torch.zeros(len(batch.pose), 4, 3, device=device)
    clip_from_cam[:, 0], clip_from_cam[:, 1] = 2 / width * batch.intrinsics[:, 0], 2 / height * batch.intrinsics[:, 1]
    clip_from_cam[:, :2, 2] -= 1
    clip_from_cam[:, 2, 2] = (far + near) / (far - near)
    clip_from_cam[:, 3, 2] = 1
    shift = torch.tensor([0, 0, -2 * far * near / (far - near), 0], device=device)

    def draw() -> Tensor:
        corners = batch.corners()
        clip = (corners @ clip_from_cam.transpose(1, 2) + shift).contiguous()
        rast, _ = dr.rasterize(context, clip, tri, resolution=(height, width), grad_db=False)
        uv, _ = dr.interpolate(uvs, rast, tri_uv)
        dr.interpolate(corners[..., 2:].contiguous(), rast, tri)
        texels = batch.texture.permute(0, 2, 3, 1).contiguous()
        image = dr.texture(texels, uv, filter_mode="linear", boundary_mode="clamp") * (rast[..., 3:] > 0)
        return dr.antialias(image, rast, clip, tri, topology_hash=silhouettes)

    return draw


def measure_cuda(meshes: list[Mesh], sizes: tuple[tuple[int, int], ...], repeats: int) -> None:
    """Print milliseconds a batch, the overhead over the bare calls, and what 16 views cost over one.

    Raises:
        CudaUnavailableError: there is no CUDA device, or no nvdiffrast.
    """
    device = torch.device("cuda")
    print("| mesh, triangles | pixels | views | | bare, ms | ours, ms | ours / bare | over 1 view |")
    print("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for mesh in meshes:
        for size_hw in sizes:
            single: dict[bool, float] = {}
            for views in (1, VIEWS):
                batch = Batch(mesh, size_hw, views, device)
                drawers = {"ours": ours(mesh, batch)}
                import nvdiffrast.torch as dr

                drawers["bare"] = bare(mesh, batch, dr)
                for backward in (False, True):
                    times: dict[str, list[float]] = {"bare": [], "ours": []}
                    for repeat in range(repeats + 1):
                        for kind, taken in times.items():
                            spent = _ms(drawers[kind], batch, backward)
                            taken += [spent] if repeat else []
                    ratio = statistics.median(o / b for o, b in zip(times["ours"], times["bare"], strict=True))
                    middle = {kind: statistics.median(taken) for kind, taken in times.items()}
                    single.setdefault(backward, middle["ours"])
                    direction = "with gradients" if backward else "forward"
                    print(
                        f"| {mesh.name} | {size_hw[0]}x{size_hw[1]} | {views} | "
                        f"{direction} | {middle['bare']:.3f} | {middle['ours']:.3f} | "
                        f"{ratio:.2f} | {middle['ours'] / single[backward]:.2f} |",
                        flush=True,
                    )


def _ms(draw: Callable[[], Tensor], batch: Batch, backward: bool) -> float:
    """Of one call, by events on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(_CALLS):
        with torch.set_grad_enabled(backward):
            image = draw()
        if backward:
            batch.vertices.grad = batch.texture.grad = None
            image.square().mean().backward()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / _CALLS
