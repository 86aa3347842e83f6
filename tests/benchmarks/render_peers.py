"""Other renderers for ``render.py``, called so that they do the work that ours does.

Runs in the peers' own environment (numpy, torch, and what a peer needs) and imports nothing of this project. Each
peer gets camera-space or clip-space vertices computed by torch within the timed region, as ours does, and culls back
faces where it can (OpenGL, pytorch3d).

- ``moderngl``: OpenGL by EGL, on a machine without a GPU Mesa's llvmpipe. One draw a view into two float32 targets:
  (u, v, depth, id + 1) and the textured colour; both are read back. No gradients.
- ``drtk``: its CPU kernels: rasterize, render (depth and barycentrics), interpolate; the picture by torch's
  grid_sample. From the package, or from a folder that ``render_peer_build.py`` made (``LIPFLOW_PEER_OPS``).
- ``pytorch3d``: its CPU rasteriser, likewise; every pixel tests every triangle's bounding box.
- ``open3d``: ray casting by Embree through ``RaycastingScene``, the tree built anew for each batch since vertices
  move from frame to frame; rays are prepared beforehand. No gradients.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

Draw = Callable[[], dict]


class Batch:
    """The tensors of a case."""

    def __init__(self, scene: dict[str, np.ndarray], views: int, backward: bool):
        torch.set_num_threads(1)
        self.views = views
        self.height, self.width = (int(extent) for extent in scene["size_hw"])
        self.vertices = torch.from_numpy(scene["vertices"]).requires_grad_(backward)
        self.texture = torch.from_numpy(scene["texture"])[None].requires_grad_(backward)
        self.intrinsics = torch.from_numpy(scene["intrinsics"])[:views]
        self.poses = torch.from_numpy(scene["cam_from_head"])[:views]
        self.faces = torch.from_numpy(scene["faces"])
        self.corner_uvs = torch.from_numpy(scene["uvs"][scene["uv_faces"]]).reshape(-1, 2)
        self.backward = backward

    def camera_space(self) -> torch.Tensor:
        """``(N, V, 3)``."""
        return self.vertices @ self.poses[..., :3].transpose(1, 2) + self.poses[:, None, :, 3]

    def pixels(self) -> torch.Tensor:
        """``(N, V, 3)``: x, y in pixels with centres at +0.5, depth in mm."""
        points = self.camera_space()
        projected = points @ self.intrinsics.transpose(1, 2)
        return torch.cat([projected[..., :2] / points[..., 2:], points[..., 2:]], -1)

    def picture(self, uv: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The textured image ``(N, 3, H, W)`` from ``uv (N, H, W, 2)``."""
        texture = self.texture.expand(self.views, -1, -1, -1)
        image = functional.grid_sample(texture, uv * 2 - 1, padding_mode="border", align_corners=False)
        return image * seen[:, None]

    def finish(self, image: torch.Tensor) -> None:
        """The gradients to vertices and texture, where the case wants them."""
        if self.backward:
            self.vertices.grad = self.texture.grad = None
            image.square().mean().backward()


def drtk(scene: dict[str, np.ndarray], views: int, backward: bool) -> Draw:
    """Pixel centres lie at whole numbers there."""
    for name in ("rasterize", "render", "interpolate"):
        _load_ops("drtk", f"{name}_ext")
    batch = Batch(scene, views, backward)
    vi = batch.faces.int()[None].expand(views, -1, -1).contiguous()
    corner = torch.arange(3 * len(batch.faces), dtype=torch.int32).reshape(1, -1, 3).expand(views, -1, -1).contiguous()
    uvs = batch.corner_uvs[None].expand(views, -1, -1).contiguous()
    half = torch.tensor([0.5, 0.5, 0])

    def draw() -> dict:
        v = (batch.pixels() - half).contiguous()
        _, ids = torch.ops.rasterize_ext.rasterize(v.detach(), vi, batch.height, batch.width, False)
        _, weights = torch.ops.render_ext.render(v, vi, ids)
        uv = torch.ops.interpolate_ext.interpolate(uvs, corner, ids, weights).permute(0, 2, 3, 1)
        image = batch.picture(uv, ids >= 0)
        batch.finish(image)
        return {"ids": ids, "image": image.detach()}

    return draw


def pytorch3d(scene: dict[str, np.ndarray], views: int, backward: bool) -> Draw:
    """Its normalised coordinates: x to the left, y up, the shorter side from -1 to 1; forward only."""
    if backward:
        raise NotImplementedError("forward only")
    try:
        kernel = importlib.import_module("pytorch3d._C").rasterize_meshes
    except ImportError:
        sys.path.append(str(_ops_folder()))
        kernel = importlib.import_module("pytorch3d_cpu").rasterize_meshes
    batch = Batch(scene, views, backward)
    count, short = len(batch.faces), min(batch.height, batch.width)
    first = torch.arange(views) * count
    per_view = torch.full((views,), count)
    neighbours = torch.full((views * count,), -1)
    middle = torch.tensor([batch.width / 2, batch.height / 2])

    def draw() -> dict:
        pixels = batch.pixels()
        ndc = torch.cat([(middle - pixels[..., :2]) * (2 / short), pixels[..., 2:]], -1)
        corners = ndc[:, batch.faces].flatten(0, 1)
        size = (batch.height, batch.width)
        found, _, weights, _ = kernel(corners, first, per_view, neighbours, size, 0.0, 1, True, False, True)
        ids = torch.where(found[..., 0] >= 0, found[..., 0] - first[:, None, None], -1)
        uvs = batch.corner_uvs.reshape(-1, 3, 2)[ids.clamp(min=0)]
        uv = (weights[..., 0, :, None] * uvs).sum(-2)
        return {"ids": ids, "image": batch.picture(uv, ids >= 0)}

    return draw


def open3d(scene: dict[str, np.ndarray], views: int, backward: bool) -> Draw:
    """Rays through pixel centres, in the head frame."""
    if backward:
        raise NotImplementedError("no gradients")
    import open3d

    batch = Batch(scene, views, backward)
    y, x = torch.meshgrid(torch.arange(batch.height) + 0.5, torch.arange(batch.width) + 0.5, indexing="ij")
    pixel = torch.stack([x, y, torch.ones_like(x)], -1)
    rotation, shift = batch.poses[..., :3], batch.poses[..., 3]
    directions = torch.einsum("hwj,nij->nhwi", pixel, rotation.transpose(1, 2) @ torch.linalg.inv(batch.intrinsics))
    origins = -(rotation.transpose(1, 2) @ shift[..., None])[:, None, None, :, 0]
    rays = torch.cat([origins.expand_as(directions), directions], -1).contiguous().numpy()
    faces = scene["faces"].astype(np.uint32)
    none = open3d.t.geometry.RaycastingScene.INVALID_ID

    def draw() -> dict:
        tree = open3d.t.geometry.RaycastingScene(nthreads=1)
        tree.add_triangles(scene["vertices"], faces)
        hits = tree.cast_rays(rays, nthreads=1)
        primitive = hits["primitive_ids"].numpy()
        ids = torch.from_numpy(np.where(primitive == none, -1, primitive.astype(np.int64)))
        second, third = torch.from_numpy(hits["primitive_uvs"].numpy()).unbind(-1)
        weights = torch.stack([1 - second - third, second, third], -1)
        uv = (weights[..., None] * batch.corner_uvs.reshape(-1, 3, 2)[ids.clamp(min=0)]).sum(-2)
        return {"ids": ids, "image": batch.picture(uv, ids >= 0)}

    return draw


_VERTEX = """#version 330
uniform mat4 clip_from_head; uniform mat4x3 cam_from_head;
in vec3 position; in vec2 uv_in; out vec2 uv; out float depth;
void main() {
  gl_Position = clip_from_head * vec4(position, 1); uv = uv_in; depth = (cam_from_head * vec4(position, 1)).z;
}"""
_FRAGMENT = """#version 330
uniform sampler2D skin; in vec2 uv; in float depth;
layout(location = 0) out vec4 seen; layout(location = 1) out vec4 colour;
void main() { seen = vec4(uv, depth, float(gl_PrimitiveID + 1)); colour = texture(skin, uv); }"""
_NEAR_MM, _FAR_MM = 100.0, 5000.0


def moderngl(scene: dict[str, np.ndarray], views: int, backward: bool) -> Draw:
    """Row 0 of the targets is the picture's top, as y is not negated; so front faces wind clockwise."""
    if backward:
        raise NotImplementedError("no gradients")
    import moderngl as gl

    batch = Batch(scene, views, backward)
    context = _gl_context()
    program = context.program(vertex_shader=_VERTEX, fragment_shader=_FRAGMENT)
    pairs = np.stack([scene["faces"].ravel(), scene["uv_faces"].ravel()], 1)
    split, index = np.unique(pairs, axis=0, return_inverse=True)
    positions = context.buffer(reserve=len(split) * 12)
    uvs = context.buffer(np.ascontiguousarray(scene["uvs"][split[:, 1]]).tobytes())
    indices = context.buffer(index.astype(np.int32).tobytes())
    array = context.vertex_array(program, [(positions, "3f", "position"), (uvs, "2f", "uv_in")], indices)
    texels = np.ascontiguousarray(scene["texture"].transpose(1, 2, 0))
    skin = context.texture(texels.shape[1::-1], 3, texels.tobytes(), dtype="f4")
    skin.filter, skin.repeat_x, skin.repeat_y = (gl.LINEAR, gl.LINEAR), False, False
    size = (batch.width, batch.height)
    targets = [context.texture(size, 4, dtype="f4") for _ in range(2)]
    frame = context.framebuffer(targets, context.depth_renderbuffer(size))
    context.enable(gl.DEPTH_TEST | gl.CULL_FACE)
    context.front_face = "cw"
    projection = torch.zeros(views, 4, 4)
    intrinsics, (width, height) = batch.intrinsics, size
    projection[:, 0, :3], projection[:, 1, :3] = 2 / width * intrinsics[:, 0], 2 / height * intrinsics[:, 1]
    projection[:, :2, 2] -= 1
    projection[:, 2, 2] = (_FAR_MM + _NEAR_MM) / (_FAR_MM - _NEAR_MM)
    projection[:, 2, 3] = -2 * _FAR_MM * _NEAR_MM / (_FAR_MM - _NEAR_MM)
    projection[:, 3, 2] = 1
    poses = torch.cat([batch.poses, torch.tensor([[[0, 0, 0, 1.0]]]).expand(views, -1, -1)], 1)
    drawn = np.empty((2, views, height, width, 4), np.float32)

    def draw() -> dict:
        positions.write(scene["vertices"][split[:, 0]].tobytes())
        skin.use(0)
        for view, (pose, clip) in enumerate(zip(poses, projection @ poses, strict=True)):
            frame.use()
            frame.clear()
            program["clip_from_head"].write(clip.T.contiguous().numpy().tobytes())
            program["cam_from_head"].write(pose[:3].T.contiguous().numpy().tobytes())
            array.render()
            for number in range(2):
                frame.read_into(drawn[number, view], components=4, attachment=number, dtype="f4")
        return {"ids": drawn[0, ..., 3].astype(np.int32) - 1, "image": drawn[1, ..., :3].transpose(0, 3, 1, 2)}

    return draw


_GL_CONTEXTS: list = []


def _gl_context():
    """One for the process."""
    import moderngl as gl

    if not _GL_CONTEXTS:
        _GL_CONTEXTS.append(gl.create_standalone_context(backend="egl"))
    return _GL_CONTEXTS[0]


def _ops_folder() -> Path:
    return Path(os.environ["LIPFLOW_PEER_OPS"])


def _load_ops(package: str, name: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        torch.ops.load_library(str(_ops_folder() / f"{name}.so"))


PEERS: dict[str, Callable[[dict[str, np.ndarray], int, bool], Draw]] = {
    "moderngl": moderngl,
    "drtk": drtk,
    "pytorch3d": pytorch3d,
    "open3d": open3d,
}
