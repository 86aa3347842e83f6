"""Visibility, interpolation, texture look-up and antialiasing on CUDA devices, by nvdiffrast.

nvdiffrast (Laine et al., "Modular Primitives for High-Performance Differentiable Rendering", 2020) takes vertices in
clip space. Ours keep ``w = z``, the depth along the optical axis, so that everything is interpolated
perspective-correctly; with K for an image of H x W pixels, pixel centres at +0.5::

    x_clip = 2 (fx x + s y + cx z) / W - z      y_clip = 2 (fy y + cy z) / H - z      z_clip = a z + b

Its row 0 lies at y_clip = -w, and ours is the top row: y is not negated, and no image is ever turned over.

**Batches.** All views go through one instanced call: vertices differ between views, triangle indices do not, so that
N views cost N times one view. (Stacked into one vertex buffer with one list of all triangles, as range mode would have
it without ranges, every view would draw every other's mesh: N squared.)

**Back faces.** nvdiffrast draws both sides of a triangle, while a back face is never seen in this renderer, not even
through an open neck. Removing back faces from the finished picture would leave holes where a front face lies behind
them. So each triangle gets three corners of its own, and the corners of those that face away in a view are moved
outside of that view's frustum, where nvdiffrast drops them first of all. The shared triangle list stays one constant
tensor, nothing is copied back to the host, and edges shared by two triangles still have bitwise equal ends.
Interpolation and antialiasing, which only need a triangle's number, use the mesh's own vertices.

**Precision.** nvdiffrast rounds projected corners to 1/16 of a pixel before it decides what a pixel sees. Triangle ids
therefore differ from the exact ones of the CPU within 1/16 pixel of an edge (expected: 1 to 2 percent of a face's
pixels at 256 x 192, by the same rounding in the tests' stand-in); uv and depth stay close there, since the triangle's
plane is evaluated at the pixel's centre, and weights are clamped to the triangle. Depths are compared after
a mapping by the nearest and the farthest corner seen in each view, not by fixed planes.

**Limits.** Images above 2048 pixels are drawn in tiles by nvdiffrast itself. Triangle ids pass through float32, and
pixels are counted in 32 bits: above 2^24 triangles, or 2^29 pixels in one call, this backend refuses.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipflow.errors import ConfigError
from lipflow.render.backend import NEAR_MM, Fragments
from lipflow.render.texture import max_mip_level, sample_weight

MAX_TRIANGLES = 2**24
"""Ids are stored as float32, which counts no further without gaps."""

MAX_PIXELS = 2**29
"""Of all views of one call: nvdiffrast finds a pixel's four floats by a signed 32-bit index."""

_OUTSIDE = (2.0, 2.0, 2.0, 1.0)
"""A clip-space point outside of three planes of the frustum."""

_DEPTH_MARGIN = 1e-3
"""Relative room between the nearest or farthest corner and the clipping plane: rounding must not clip it."""


class CudaUnavailableError(ConfigError):
    """The CUDA backend cannot work here; the message says what to install."""


@dataclass(kw_only=True)
class CudaFragments(Fragments):
    """What N views see at their pixels, with what antialiasing needs to know of it.

    Attributes:
        rast: ``(N, H, W, 4)`` nvdiffrast's own output: two barycentric weights, depth in clip space, id + 1.
        clip: ``(N, V, 4)`` vertices in clip space.
    """

    rast: Tensor
    clip: Tensor


@dataclass
class _OnDevice:
    """What stays the same from call to call, on one device."""

    context: Any
    faces: Tensor
    tri: Tensor
    tri_own: Tensor
    silhouettes: Any


class CudaBackend:
    """Draws one topology with nvdiffrast, on the device of the vertices that come.

    Args:
        faces: ``(F, 3)`` int64.
        face_uvs: ``(F, 3, 2)``.
        rasterizer: a module with the interface of ``nvdiffrast.torch``; None for nvdiffrast itself, which compiles
            its CUDA code at its first use on a machine.

    Raises:
        CudaUnavailableError: no CUDA device, or no nvdiffrast.
        ConfigError: more triangles than ids can tell apart.
    """

    def __init__(self, faces: Tensor, face_uvs: Tensor, rasterizer: Any = None):
        if len(faces) > MAX_TRIANGLES:
            raise ConfigError(
                f"the mesh has {len(faces)} triangles, but the cuda renderer tells {MAX_TRIANGLES} (2^24) apart: "
                "simplify the mesh, or take backend 'cpu'"
            )
        self._faces = faces
        self._face_uvs = face_uvs
        self._dr = _nvdiffrast() if rasterizer is None else rasterizer
        self._on_device: dict[torch.device, _OnDevice] = {}

    def prepared(self, device: torch.device) -> CudaBackend:
        """This backend, ready to draw on ``device``: what cannot work fails here and not at the first picture.

        Raises:
            CudaUnavailableError: nvdiffrast cannot be compiled here.
            ConfigError: no CUDA device.
        """
        if device.type != "cuda":
            raise ConfigError(
                f"backend 'cuda' cannot draw tensors on {str(device)!r}: move renderer and tensors to a CUDA device, "
                "or take backend 'cpu'"
            )
        self._here(device)
        return self

    def rasterize(
        self, corners: Tensor, intrinsics: Tensor, image_size_hw: tuple[int, int], *, derivatives: bool = False
    ) -> CudaFragments:
        """Rasterise N views; uv, depth and uv_da are differentiable in corners, intrinsics and face_uvs.

        Args:
            corners: ``(N, V, 3)`` camera-space vertices, mm; computed in float32.
            intrinsics: ``(N, 3, 3)`` K in pixels, upper triangular, last row (0, 0, 1).
            image_size_hw: (height, width) in pixels.
            derivatives: also compute ``uv_da``, for mip-mapping.

        Raises:
            CudaUnavailableError: nvdiffrast cannot be compiled here.
            ConfigError: more pixels than nvdiffrast can count.
        """
        height, width = image_size_hw
        if len(corners) * height * width > MAX_PIXELS:
            raise ConfigError(
                f"{len(corners)} views of {height} x {width} are more than the 2^29 pixels that the cuda renderer "
                "draws in one call: render fewer views at once"
            )
        here, dtype = self._here(corners.device), corners.dtype
        own = corners.detach().float()[:, here.faces]
        front = _faces_camera(own)
        # Vertices that are not finite belong to no triangle that is drawn, but 0 times them is no gradient.
        corners = torch.where(corners.isfinite(), corners, 0).float()
        clip = _clip_space(corners, intrinsics.float(), image_size_hw, _depth_range(own[..., 2], front))
        drawn = clip[:, here.faces]
        front &= drawn.detach().isfinite().flatten(2).all(-1)
        drawn = torch.where(front[..., None, None], drawn, clip.new_tensor(_OUTSIDE))
        rast, rast_db = self._dr.rasterize(
            here.context, drawn.flatten(1, 2), here.tri_own, resolution=(height, width), grad_db=derivatives
        )
        corner_uvs = self._face_uvs.to(corners).reshape(1, -1, 2).contiguous()
        if derivatives:
            uv, uv_da = self._dr.interpolate(corner_uvs, rast, here.tri_own, rast_db=rast_db, diff_attrs="all")
        else:
            uv, _ = self._dr.interpolate(corner_uvs, rast, here.tri_own)
        depth, _ = self._dr.interpolate(corners[..., 2:].contiguous(), rast, here.tri)
        return CudaFragments(
            triangle_id=rast[..., 3].int() - 1,
            uv=uv.to(dtype),
            depth=depth[..., 0].to(dtype),
            uv_da=uv_da.unflatten(-1, (2, 2)).to(dtype) if derivatives else None,
            rast=rast,
            clip=clip,
        )

    def sample(self, texture: Tensor, uv: Tensor, mask: Tensor, uv_da: Tensor | None = None) -> Tensor:
        """Look textures up, clamped at the border: bilinear, or trilinear over mip maps where ``uv_da`` is given.

        Textures that several views share are not copied: the views' rows are put below each other.

        Args:
            texture: ``(M, C, T, T)``, row 0 is v = 0; texture m belongs to views m N/M to (m + 1) N/M - 1.
            uv: ``(N, H, W, 2)``.
            mask: ``(N, H, W)`` bool, the pixels to look up.
            uv_da: ``(N, H, W, 2, 2)``, see :class:`~lipflow.render.backend.Fragments`.

        Returns:
            ``(N, C, H, W)``, channels last in memory; 0 outside the mask.

        Raises:
            ValueError: N is no multiple of M.
        """
        textures, (views, height, width, _) = len(texture), uv.shape
        if views % textures:
            raise ValueError(f"{views} views cannot share {textures} textures: expected a divisor of {views}")
        texels = texture.float().permute(0, 2, 3, 1).contiguous()
        rows = (views, height) if textures == 1 else (textures, views // textures * height)
        options: dict[str, Any] = {"filter_mode": "linear", "boundary_mode": "clamp"}
        if uv_da is not None:
            options |= {
                "uv_da": uv_da.float().reshape(*rows, width, 4).contiguous(),
                "filter_mode": "linear-mipmap-linear",
                "max_mip_level": max_mip_level(texels.shape[1]),
            }
        colours = self._dr.texture(texels, uv.float().reshape(*rows, width, 2).contiguous(), **options)
        return colours.reshape(views, height, width, -1).permute(0, 3, 1, 2) * mask[:, None]

    def sample_weighted(
        self, texture: Tensor, weight_mask: Tensor, uv: Tensor, mask: Tensor, uv_da: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Image and weight; see :class:`lipflow.render.backend.Backend`."""
        return self.sample(texture, uv, mask, uv_da), sample_weight(weight_mask, uv, mask)

    def antialias(self, image: Tensor, fragments: CudaFragments) -> Tensor:
        """Blend pixels across silhouette edges, so that vertices get gradients from what moves there.

        Args:
            image: ``(N, C, H, W)``, of these fragments.
            fragments: of :meth:`rasterize`.

        Returns:
            ``(N, C, H, W)``, channels last in memory.
        """
        here = self._here(image.device)
        colours = image.float().permute(0, 2, 3, 1).contiguous()
        blended = self._dr.antialias(colours, fragments.rast, fragments.clip, here.tri, topology_hash=here.silhouettes)
        return blended.permute(0, 3, 1, 2)

    def _here(self, device: torch.device) -> _OnDevice:
        if device not in self._on_device:
            context = _context(self._dr, device)
            faces = self._faces.to(device)
            tri = faces.int().contiguous()
            self._on_device[device] = _OnDevice(
                context=context,
                faces=faces,
                tri=tri,
                tri_own=torch.arange(tri.numel(), dtype=torch.int32, device=device).reshape(-1, 3),
                silhouettes=self._dr.antialias_construct_topology_hash(tri),
            )
        return self._on_device[device]


def _faces_camera(own: Tensor) -> Tensor:
    """``(N, F)`` bool of corners ``(N, F, 3, 3)``: seen from outside; False where not finite.

    The same sign as the CPU's volume ``a . (c x b)``, from differences, which do not cancel in float32.
    """
    a, b, c = own.unbind(2)
    return (a * torch.linalg.cross(b - a, c - a)).sum(-1) < 0


def _depth_range(depths: Tensor, front: Tensor) -> tuple[Tensor, Tensor]:
    """Near and far planes ``(N, 1)`` around the corners ``(N, F, 3)`` of each view that can be seen."""
    seen = front[..., None]
    nearest = torch.where(seen, depths, torch.inf).flatten(1).amin(1, keepdim=True)
    farthest = torch.where(seen, depths, -torch.inf).flatten(1).amax(1, keepdim=True)
    near = (nearest * (1 - _DEPTH_MARGIN)).clamp(NEAR_MM, 1e9)
    return near, torch.maximum(farthest.clamp(max=1e9), near) * (1 + _DEPTH_MARGIN)


def _clip_space(
    corners: Tensor, intrinsics: Tensor, image_size_hw: tuple[int, int], depth_range: tuple[Tensor, Tensor]
) -> Tensor:
    """``(N, V, 4)``. Written out, since a matrix product would be rounded to TF32 where that is switched on."""
    height, width = image_size_hw
    x, y, z = corners.unbind(-1)
    fx, skew, cx = (2 / width * intrinsics[:, 0, column, None] for column in range(3))
    fy, cy = (2 / height * intrinsics[:, 1, column, None] for column in (1, 2))
    near, far = depth_range
    z_clip = ((far + near) * z - 2 * far * near) / (far - near)
    return torch.stack([fx * x + skew * y + (cx - 1) * z, fy * y + (cy - 1) * z, z_clip, z], dim=-1)


def _nvdiffrast() -> Any:
    if not torch.cuda.is_available():
        raise CudaUnavailableError(
            f"backend 'cuda' needs a CUDA device, and torch {torch.__version__} sees none: use a machine with an "
            "NVIDIA GPU and a CUDA build of torch, or take backend 'cpu'"
        )
    try:
        return importlib.import_module("nvdiffrast.torch")
    except ImportError as error:
        raise CudaUnavailableError(
            f"backend 'cuda' needs nvdiffrast ({error}): pip install 'lipflow[cuda]' (diffrp-nvdiffrast, whose licence "
            "is non-commercial, and ninja), or take backend 'cpu'"
        ) from error


def _context(dr: Any, device: torch.device) -> Any:
    try:
        return dr.RasterizeCudaContext(device=device)
    except (RuntimeError, OSError, ImportError) as error:
        raise CudaUnavailableError(
            f"nvdiffrast cannot be made ready on {device} ({str(error).splitlines()[0]}): it compiles its CUDA code at "
            "first use, which needs ninja and an nvcc of torch's CUDA version on the PATH; or take backend 'cpu'"
        ) from error
