"""The reference backend: the rasteriser's definition in plain torch, in float64, on any device. Slow.

A pixel with the ray ``d = K^-1 (x, y, 1)`` is covered by a triangle with camera-space corners ``v_0, v_1, v_2`` if its
three edge functions ``e_i = d . (v_k x v_j)``, (i, j, k) cyclic, are positive, or zero on an edge that the triangle
owns (:func:`_owns_boundary`), and the triangle faces the camera. Then ``b_i = e_i / sum_j e_j`` are the
perspective-correct barycentric weights and ``z = det / sum_j e_j`` is the depth. Of all triangles that cover a pixel
at a depth of at least the near plane's, the nearest is seen, of equally near ones the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipflow.render.backend import NEAR_MM, Fragments

_PAIRS_AT_ONCE = 1 << 21
"""How many pairs of a triangle and a pixel are tested together; bounds memory (about 300 bytes a pair)."""


class ReferenceBackend:
    """Rasterises one topology; see :class:`lipflow.render.backend.Backend`.

    Args:
        faces: ``(F, 3)`` int64.
        face_uvs: ``(F, 3, 2)``.
    """

    def __init__(self, faces: Tensor, face_uvs: Tensor):
        self.faces = faces
        self.face_uvs = face_uvs

    def rasterize(
        self, corners: Tensor, intrinsics: Tensor, image_size_hw: tuple[int, int], *, derivatives: bool = False
    ) -> Fragments:
        """Rasterise N views; see :class:`lipflow.render.backend.Backend`."""
        triangle_id = torch.stack(
            [
                visible_triangles(mesh, self.faces, camera, image_size_hw)
                for mesh, camera in zip(corners.detach(), intrinsics.detach(), strict=True)
            ]
        )
        uv, depth, uv_da = interpolate(
            corners, intrinsics, triangle_id, self.faces, self.face_uvs, derivatives=derivatives
        )
        return Fragments(triangle_id, uv, depth, uv_da)


def visible_triangles(
    corners: Tensor, faces: Tensor, intrinsics: Tensor, image_size_hw: tuple[int, int], near: float = NEAR_MM
) -> Tensor:
    """Triangle ids ``(H, W)`` int32 of one view, -1 where nothing is seen.

    Args:
        corners: ``(V, 3)`` camera-space vertices, mm.
        faces: ``(F, 3)`` int64, counter-clockwise from outside.
        intrinsics: ``(3, 3)`` K, upper triangular with last row (0, 0, 1).
        image_size_hw: (height, width) in pixels.
        near: smallest depth drawn, mm.
    """
    height, width = image_size_hw
    triangles, camera = corners.double()[faces], intrinsics.double()
    planes = _to_pixels(edge_planes(triangles), camera)
    normals = _normals(triangles)
    volume = (triangles[:, 0] * normals).sum(-1)
    total_planes = _to_pixels(normals[:, None], camera)
    depths = triangles[..., 2]
    candidates = ((volume > 0) & volume.isfinite() & (depths >= near).any(-1)).nonzero()[:, 0]
    boxes = _bounding_boxes(triangles[candidates], camera, image_size_hw, near)

    nearest = torch.full((height * width,), torch.inf, dtype=torch.float64, device=corners.device)
    seen = torch.full((height * width,), len(faces), dtype=torch.int64, device=corners.device)
    areas = (boxes[:, 1] - boxes[:, 0]).clamp(min=0) * (boxes[:, 3] - boxes[:, 2]).clamp(min=0)
    first = 0
    while first < len(candidates):
        # At least one triangle at a time, and as many more as fit.
        count = max(1, int((areas[first:].cumsum(0) <= _PAIRS_AT_ONCE).sum()))
        chunk = slice(first, first + count)
        triangle, row, column = _pairs(boxes[chunk], areas[chunk])
        triangle = candidates[chunk][triangle]
        pixel = _centres(row, column)
        edges = _dot(planes[triangle], pixel)
        z = volume[triangle] / _dot(total_planes[triangle], pixel)[:, 0]
        covered = ((edges > 0) | ((edges == 0) & _owns_boundary(planes)[triangle])).all(-1) & (z >= near)
        triangle, place, z = triangle[covered], (row * width + column)[covered], z[covered]
        closest = nearest.scatter_reduce(0, place, z, "amin")
        seen = torch.where(closest < nearest, len(faces), seen)
        here = z == closest[place]
        seen = seen.scatter_reduce(0, place[here], triangle[here], "amin")
        nearest = closest
        first += count
    return torch.where(seen < len(faces), seen, -1).reshape(height, width).int()


def interpolate(
    corners: Tensor,
    intrinsics: Tensor,
    triangle_id: Tensor,
    faces: Tensor,
    face_uvs: Tensor,
    *,
    derivatives: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Texture coordinates and depth maps; as :func:`lipflow.render.interpolate.interpolate_cpu`, by autograd."""
    dtype, shape = corners.dtype, triangle_id.shape
    place = torch.nonzero(triangle_id >= 0, as_tuple=True)
    view, row, column = place
    triangle = triangle_id[place].long()
    seen_corners = corners.double()[view[:, None], faces[triangle]]
    planes = _to_pixels(_accurate_planes(seen_corners), intrinsics.double()[view])
    edges = _dot(planes, _centres(row, column))
    total = edges.sum(-1, keepdim=True)
    weights = edges / total
    seen_uvs = face_uvs.double()[triangle]
    uv = (weights[..., None] * seen_uvs).sum(1)
    depth = (weights * seen_corners[..., 2]).sum(1)
    uv_da = None
    if derivatives:
        # d b_i / d x_j = (d e_i / d x_j - b_i sum_k d e_k / d x_j) / sum_k e_k
        slopes = planes[..., :2]
        weight_da = (slopes - weights[..., None] * slopes.sum(1, keepdim=True)) / total[..., None]
        uv_da = _scatter((seen_uvs.transpose(1, 2) @ weight_da).to(dtype), place, shape)
    return _scatter(uv.to(dtype), place, shape), _scatter(depth.to(dtype), place, shape), uv_da


def edge_planes(triangles: Tensor) -> Tensor:
    """``(..., 3, 3)`` planes through the eye and the edges of triangles ``(..., 3, 3)``, one opposite each corner.

    The two triangles of an edge get planes that are opposite to the last bit.
    """
    a, b, c = triangles.unbind(-2)
    # Not linalg.cross: it may fuse multiplication and addition, so that a x b is not exactly -(b x a).
    return torch.stack([_cross(c, b), _cross(a, c), _cross(b, a)], -2)


def _accurate_planes(triangles: Tensor) -> Tensor:
    """The same planes from the triangles' sides: products of positions, far larger, would cancel where S . d is small.

    Their last bits are not those of the neighbour's planes, so that they cannot decide what is covered.
    """
    a, b, c = triangles.unbind(-2)
    plane_b, plane_c = _cross(a, c - a), _cross(b - a, a)
    return torch.stack([_normals(triangles) - plane_b - plane_c, plane_b, plane_c], -2)


def _normals(triangles: Tensor) -> Tensor:
    """The sum of a triangle's planes: ``(..., 3)``, its normal times twice its area, pointing away from its front."""
    a, b, c = triangles.unbind(-2)
    return _cross(c - a, b - a)


def _cross(p: Tensor, q: Tensor) -> Tensor:
    x, y, z = (p[..., i] * q[..., j] - p[..., j] * q[..., i] for i, j in ((1, 2), (2, 0), (0, 1)))
    return torch.stack([x, y, z], -1)


def _owns_boundary(planes: Tensor) -> Tensor:
    """Whether a pixel centre exactly on an edge belongs to this side: the right one, below a horizontal edge."""
    x, y, constant = planes.unbind(-1)
    return torch.where(x != 0, x > 0, torch.where(y != 0, y > 0, constant > 0))


def _to_pixels(planes: Tensor, intrinsics: Tensor) -> Tensor:
    """``K^-T plane``: planes ``(..., 3, 3)`` as functions of the pixel (x, y, 1).

    From the five free entries of K ``(..., 3, 3)``, the others carry no gradient; entry by entry, so that opposite
    planes stay opposite to the last bit.
    """
    fx, skew, cx = intrinsics[..., None, 0, :].unbind(-1)
    fy, cy = intrinsics[..., None, 1, 1], intrinsics[..., None, 1, 2]
    x, y, z = planes.unbind(-1)
    along_x = x * (1 / fx)
    along_y = (y - skew * along_x) * (1 / fy)
    return torch.stack([along_x, along_y, z - cx * along_x - cy * along_y], -1)


def _centres(row: Tensor, column: Tensor) -> Tensor:
    return torch.stack([column.double() + 0.5, row.double() + 0.5], -1)


def _dot(planes: Tensor, pixels: Tensor) -> Tensor:
    """``(P, 3)`` values at pixels ``(P, 2)`` of three planes ``(P, 3, 3)`` each."""
    x, y = pixels[:, None].unbind(-1)
    return planes[..., 0] * x + (planes[..., 1] * y + planes[..., 2])


def _bounding_boxes(triangles: Tensor, camera: Tensor, image_size_hw: tuple[int, int], near: float) -> Tensor:
    """First and last + 1 of the rows and columns, ``(F, 4)``, with a pixel to spare; all where the near plane cuts."""
    height, width = image_size_hw
    homogeneous = triangles @ camera.T
    pixels = homogeneous[..., :2] / homogeneous[..., 2:]
    low, high = (pixels.amin(1) - 1.5).floor(), (pixels.amax(1) + 1.5).ceil()
    boxes = torch.stack([low[:, 1], high[:, 1], low[:, 0], high[:, 0]], -1)
    everything = boxes.new_tensor([0, height, 0, width])
    boxes = torch.where((triangles[..., 2] < near).any(-1, keepdim=True), everything, boxes)
    return boxes.clamp(min=torch.zeros_like(everything), max=everything[[1, 1, 3, 3]]).long()


def _pairs(boxes: Tensor, areas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every pixel of every box: box, row and column, one entry a pair."""
    box = torch.repeat_interleave(torch.arange(len(boxes), device=boxes.device), areas)
    within = torch.arange(len(box), device=boxes.device) - (areas.cumsum(0) - areas)[box]
    first_row, _, first_column, stop_column = boxes[box].unbind(-1)
    across = stop_column - first_column
    return box, first_row + within // across, first_column + within % across


def _scatter(values: Tensor, place: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
    return values.new_zeros(*shape, *values.shape[1:]).index_put(place, values)


__all__ = ["ReferenceBackend", "edge_planes", "interpolate", "visible_triangles"]
