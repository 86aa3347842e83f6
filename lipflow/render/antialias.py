"""Analytic antialiasing of silhouettes: the image becomes a continuous function of where the outlines lie.

After Laine et al., "Modular Primitives for High-Performance Differentiable Rendering", 2020, section 3.6. Of every
two horizontally or vertically adjacent pixels that see different triangles, the nearer triangle is taken; its edge
that crosses the segment between the two pixel centres is sought, farthest from the triangle's own pixel. If that edge
is a silhouette (its other triangle is missing, or lies on the same side of it in the image) and is no more than 45
degrees from perpendicular to the segment, the triangle reaches over ``t`` in 0..1 of the segment, and::

    t < 1/2:   its own pixel  += (1/2 - t) (other's colour - own colour)
    t > 1/2:   the other pixel += (t - 1/2) (own colour - other's colour)

with ``t = x_1 + (x_2 - x_1) y_1 / (y_1 - y_2)`` for the ends ``(x, y)`` of the edge, x along the segment from the own
pixel's centre. Gradients reach the edge's two vertices through t, and both colours.

The choice of pairs, edges and weights is that of nvdiffrast's ``antialias`` (its ``antialias.cu``, version 0.4), with
these differences. Vertices come as pixels, not in clip space: with lens distortion, outlines are straight between
distorted vertices. A triangle, or a neighbour across its edge, with a vertex nearer than the near plane is left as it
is, where nvdiffrast divides by w whatever its sign. An edge of three or more triangles counts as a silhouette; in
nvdiffrast this depends on their order. dt/dy is exact; nvdiffrast adds 1e-3 px to the edge's extent.

Two implementations give the same numbers: plain torch, for any device and precision, and fused kernels for the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from lipflow.render.backend import NEAR_MM

SLACK = 1 / 16
"""How far beyond the segment, in px, a crossing may lie to count: visibility and crossing round differently."""


@dataclass(frozen=True)
class Crossings:
    """The P places where a silhouette passes between two adjacent pixels; no gradient.

    Attributes:
        pairs: ``(P, 4)`` int64: view, row and column of the pixel of the nearer triangle, and the direction of the
            other pixel: 0 right, 1 down, 2 left, 3 up.
        edges: ``(P, 2)`` int64, the vertices at the ends of the edge.
    """

    pairs: Tensor
    edges: Tensor


_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))
"""(row, column) steps of the directions of :class:`Crossings`."""


def opposite_vertices(faces: Tensor) -> Tensor:
    """The neighbours across the edges of a mesh.

    Args:
        faces: ``(F, 3)`` int64 vertex indices.

    Returns:
        ``(F, 3)`` int64: for corner i, the vertex of the other triangle at the edge between the two other corners;
        -1 where the edge belongs to one triangle, or to more than two.
    """
    edges = torch.stack([faces[:, [1, 2]], faces[:, [2, 0]], faces[:, [0, 1]]], dim=1).sort(-1).values.flatten(0, 1)
    _, edge, count = torch.unique(edges, dim=0, return_inverse=True, return_counts=True)
    corner = faces.flatten()
    # With two triangles at an edge, the other's corner is the sum of both less one's own.
    total = torch.zeros(len(count), dtype=torch.int64, device=faces.device).index_add(0, edge, corner)
    return torch.where(count[edge] == 2, total[edge] - corner, -1).view(-1, 3)


def antialias(
    image: Tensor,
    triangle_id: Tensor,
    depth: Tensor,
    pixels: Tensor,
    vertex_depth: Tensor,
    faces: Tensor,
    opposite: Tensor,
) -> Tensor:
    """Blend the pixels on both sides of silhouettes by where the silhouette passes between them.

    Coverage for silhouette losses: the same of an image of ones on the mask, as a further channel or alone.

    Args:
        image: ``(N, C, H, W)``.
        triangle_id: ``(N, H, W)`` int, -1 where nothing is seen.
        depth: ``(N, H, W)`` of the seen triangles, mm; read only where something is seen. No gradient.
        pixels: ``(N, V, 2)`` projected vertices (x, y), pixel centres at +0.5.
        vertex_depth: ``(N, V)`` mm along the optical axis; where it is below ``NEAR_MM``, ``pixels`` is not read. No
            gradient.
        faces: ``(F, 3)`` int64.
        opposite: ``(F, 3)`` int64, :func:`opposite_vertices` of the faces.

    Returns:
        ``(N, C, H, W)``, differentiable in image and pixels.

    Raises:
        ValueError: the shapes disagree.
    """
    shape, vertices = (len(image), *image.shape[2:]), pixels.shape[:2]
    if not (triangle_id.shape == depth.shape == shape and len(pixels) == len(image) and vertex_depth.shape == vertices):
        raise ValueError(
            f"image {tuple(image.shape)}, triangle_id {tuple(triangle_id.shape)}, depth {tuple(depth.shape)}, pixels "
            f"{tuple(pixels.shape)} and vertex_depth {tuple(vertex_depth.shape)} disagree: expected (N, C, H, W), "
            "(N, H, W) twice, (N, V, 2) and (N, V)"
        )
    inputs = (triangle_id, depth, pixels, vertex_depth, faces, opposite)
    if image.device.type == "cpu":
        return blend_cpu(image, pixels, find_crossings_cpu(*inputs))
    return blend_torch(image, pixels, find_crossings_torch(*inputs))


@torch.no_grad()
def find_crossings_torch(
    triangle_id: Tensor, depth: Tensor, pixels: Tensor, vertex_depth: Tensor, faces: Tensor, opposite: Tensor
) -> Crossings:
    """Where silhouettes pass between pixels, in plain torch; arguments as of :func:`antialias`."""
    pairs, triangles = zip(*(_nearer_pixels(triangle_id, depth, down) for down in (0, 1)), strict=True)
    pair, triangle = torch.cat(pairs), torch.cat(triangles)
    view, row, column, direction = pair.unbind(1)
    corners, across = faces[triangle], opposite[triangle]
    # A missing neighbour is replaced by the corner itself, which lies on its own side: always a silhouette.
    across = torch.where(across < 0, corners, across)
    in_front = (vertex_depth[view[:, None], torch.cat([corners, across], dim=1)] >= NEAR_MM).all(1)

    centre = torch.stack([column, row], dim=-1).to(pixels.dtype) + 0.5
    points = pixels[view[:, None], corners] - centre[:, None]
    wings = pixels[view[:, None], across] - centre[:, None]
    # Corner i is opposite to the edge from corner i + 1 to corner i + 2.
    start, end = points.roll(-1, dims=1), points.roll(-2, dims=1)
    silhouette = (_side(start, end, points) < 0) == (_side(start, end, wings) < 0)
    start, end = _along(start, direction), _along(end, direction)
    extent = end - start
    crosses = (start[..., 1] < 0) != (end[..., 1] < 0)
    reach = start[..., 0] - start[..., 1] * extent[..., 0] / extent[..., 1]
    reach, corner = torch.where(crosses, reach, -torch.inf).max(1)

    def chosen(values: Tensor) -> Tensor:
        return values[torch.arange(len(corner), device=corner.device), corner]

    steep = chosen(extent[..., 1].abs() >= extent[..., 0].abs())
    keep = in_front & chosen(silhouette) & steep & (reach > -SLACK) & (reach < 1 + SLACK)
    edges = torch.stack([chosen(corners.roll(-1, dims=1)), chosen(corners.roll(-2, dims=1))], dim=1)
    return Crossings(pair[keep], edges[keep])


def _nearer_pixels(triangle_id: Tensor, depth: Tensor, down: int) -> tuple[Tensor, Tensor]:
    """Of adjacent pixels with different triangles, the nearer's ``(P, 4)`` as in :class:`Crossings`, and its triangle.

    Of equal depths, the right or lower pixel counts as nearer.
    """
    axis = 1 if down else 2
    count = triangle_id.shape[axis] - 1
    first, second = triangle_id.narrow(axis, 0, count), triangle_id.narrow(axis, 1, count)
    view, row, column = place = torch.nonzero(first != second, as_tuple=True)
    id_first, id_second = first[place].long(), second[place].long()
    closer = depth.narrow(axis, 0, count)[place] < depth.narrow(axis, 1, count)[place]
    own_first = (id_first >= 0) & ((id_second < 0) | closer)
    row, column = (row + ~own_first, column) if down else (row, column + ~own_first)
    direction = torch.where(own_first, down, down + 2)
    return torch.stack([view, row, column, direction], dim=1), torch.where(own_first, id_first, id_second)


def _side(start: Tensor, end: Tensor, point: Tensor) -> Tensor:
    first, second = start - point, end - point
    return first[..., 0] * second[..., 1] - second[..., 0] * first[..., 1]


def _along(points: Tensor, direction: Tensor) -> Tensor:
    """``(P, ..., 2)`` offsets (x, y) as (along, across) the segment towards the other pixel."""
    shape = (-1, *(1,) * (points.ndim - 1))
    turned = torch.where((direction % 2 == 1).view(shape), points.flip(-1), points)
    sign = torch.where(direction >= 2, -1, 1).view(shape[:-1])
    return torch.stack([turned[..., 0] * sign, turned[..., 1]], dim=-1)


def blend_torch(image: Tensor, pixels: Tensor, crossings: Crossings) -> Tensor:
    """Blend the pixels beside the crossings, in plain torch; arguments as of :func:`antialias`."""
    view, row, column, direction = crossings.pairs.unbind(1)
    steps = torch.tensor(_STEPS, device=image.device)[direction]
    other_row, other_column = row + steps[:, 0], column + steps[:, 1]
    centre = torch.stack([column, row], dim=-1).to(pixels.dtype) + 0.5
    start, end = (_along(pixels[view, crossings.edges[:, i]] - centre, direction) for i in (0, 1))
    slope = (end[:, 0] - start[:, 0]) / (end[:, 1] - start[:, 1])
    own_share = (start[:, 0] - start[:, 1] * slope).clamp(0, 1).to(image.dtype)[:, None] - 0.5
    own, other = image[view, :, row, column], image[view, :, other_row, other_column]
    into_other = own_share > 0
    change = own_share * (own - other)
    target_row = torch.where(into_other[:, 0], other_row, row)
    target_column = torch.where(into_other[:, 0], other_column, column)
    blended = image.permute(0, 2, 3, 1).index_put((view, target_row, target_column), change, accumulate=True)
    return blended.permute(0, 3, 1, 2)


def find_crossings_cpu(
    triangle_id: Tensor, depth: Tensor, pixels: Tensor, vertex_depth: Tensor, faces: Tensor, opposite: Tensor
) -> Crossings:
    """The same as :func:`find_crossings_torch` for CPU tensors, fused; computes in float64 inside."""
    inputs = _arrays(triangle_id, depth, pixels, vertex_depth, faces, opposite)
    pairs, edges = [], []
    for view, arguments in enumerate(zip(*inputs[:4], strict=True)):
        found = _find(*arguments, *inputs[4:], view)  # type: ignore[call-arg]
        pairs.append(found[:, :4])
        edges.append(found[:, 4:])
    return Crossings(torch.from_numpy(np.concatenate(pairs)), torch.from_numpy(np.concatenate(edges)))


def blend_cpu(image: Tensor, pixels: Tensor, crossings: Crossings) -> Tensor:
    """The same as :func:`blend_torch` for CPU tensors, fused; computes in float64 inside."""
    return _Blend.apply(image, pixels, crossings.pairs, crossings.edges)


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, pixels, pairs, edges):
        ctx.save_for_backward(image, pixels, pairs, edges)
        blended = image.clone(memory_format=torch.contiguous_format)
        _blend(*_arrays(image, pixels, pairs, edges, blended))
        return blended

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_blended):
        image, pixels, pairs, edges = ctx.saved_tensors
        grad_image = grad_blended.clone(memory_format=torch.contiguous_format)
        grad_pixels = torch.zeros_like(pixels, memory_format=torch.contiguous_format)
        _blend_backward(*_arrays(image, pixels, pairs, edges, grad_blended, grad_image, grad_pixels))
        return grad_image, grad_pixels, None, None


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _offset(point, row, column, direction):
    """A vertex seen from a pixel's centre: (along, across) the segment towards the other pixel."""
    x, y = np.float64(point[0]) - column - 0.5, np.float64(point[1]) - row - 0.5
    if direction == 0:
        return x, y
    if direction == 1:
        return y, x
    if direction == 2:
        return -x, y
    return -y, x


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _area(ax, ay, bx, by, cx, cy):
    return (ax - cx) * (by - cy) - (bx - cx) * (ay - cy)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _silhouettes(pixels, vertex_depth, faces, opposite):
    """``(F, 3)`` bool: whether the edge opposite to each corner is an outline in this view."""
    outlines = np.zeros(faces.shape, np.bool_)
    for triangle in range(faces.shape[0]):
        face, across = faces[triangle], opposite[triangle]
        in_front = True
        for corner in range(3):
            in_front &= vertex_depth[face[corner]] >= NEAR_MM
            in_front &= across[corner] < 0 or vertex_depth[across[corner]] >= NEAR_MM
        if not in_front:
            continue
        for corner in range(3):
            if across[corner] < 0:
                outlines[triangle, corner] = True
                continue
            ax, ay = _offset(pixels[face[(corner + 1) % 3]], 0, 0, 0)
            bx, by = _offset(pixels[face[(corner + 2) % 3]], 0, 0, 0)
            cx, cy = _offset(pixels[face[corner]], 0, 0, 0)
            dx, dy = _offset(pixels[across[corner]], 0, 0, 0)
            outlines[triangle, corner] = (_area(ax, ay, bx, by, cx, cy) < 0.0) == (_area(ax, ay, bx, by, dx, dy) < 0.0)
    return outlines


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _crossing(pixels, face, outlines, row, column, direction):
    """The corner opposite to the edge that counts between this pixel and its neighbour, or -1."""
    best, reach, steep = -1, -np.inf, False
    for corner in range(3):
        ax, ay = _offset(pixels[face[(corner + 1) % 3]], row, column, direction)
        bx, by = _offset(pixels[face[(corner + 2) % 3]], row, column, direction)
        if (ay < 0.0) == (by < 0.0):
            continue
        at = ax - ay * (bx - ax) / (by - ay)
        if at > reach:
            best, reach, steep = corner, at, abs(by - ay) >= abs(bx - ax)
    if best < 0 or not (outlines[best] and steep and -SLACK < reach < 1.0 + SLACK):
        return -1
    return best


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _find(triangle_id, depth, pixels, vertex_depth, faces, opposite, view):
    """``(P, 6)``: the columns of ``pairs`` and ``edges``."""
    height, width = triangle_id.shape
    outlines = _silhouettes(pixels, vertex_depth, faces, opposite)
    found, count = np.empty((256, 6), np.int64), 0
    for row in range(height):
        for column in range(width):
            own = triangle_id[row, column]
            for down in range(2):
                other_row, other_column = row + down, column + 1 - down
                if other_row == height or other_column == width:
                    continue
                other = triangle_id[other_row, other_column]
                if own == other:
                    continue
                if own >= 0 and (other < 0 or depth[row, column] < depth[other_row, other_column]):
                    triangle, at_row, at_column, direction = own, row, column, down
                else:
                    triangle, at_row, at_column, direction = other, other_row, other_column, down + 2
                # Most triangles lie inside the outline.
                if not (outlines[triangle, 0] or outlines[triangle, 1] or outlines[triangle, 2]):
                    continue
                face = faces[triangle]
                corner = _crossing(pixels, face, outlines[triangle], at_row, at_column, direction)
                if corner < 0:
                    continue
                if count == found.shape[0]:
                    longer = np.empty((2 * count, 6), np.int64)
                    longer[:count] = found
                    found = longer
                entry = found[count]
                entry[0], entry[1], entry[2], entry[3] = view, at_row, at_column, direction
                entry[4], entry[5] = face[(corner + 1) % 3], face[(corner + 2) % 3]
                count += 1
    return found[:count]


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _neighbour(row, column, direction):
    step = 1 if direction < 2 else -1
    if direction % 2 == 0:
        return row, column + step
    return row + step, column


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _blend(image, pixels, pairs, edges, blended):
    for index in range(pairs.shape[0]):
        view, row, column, direction = pairs[index, 0], pairs[index, 1], pairs[index, 2], pairs[index, 3]
        ax, ay = _offset(pixels[view, edges[index, 0]], row, column, direction)
        bx, by = _offset(pixels[view, edges[index, 1]], row, column, direction)
        share = min(max(ax - ay * (bx - ax) / (by - ay), 0.0), 1.0) - 0.5
        other_row, other_column = _neighbour(row, column, direction)
        target_row, target_column = (other_row, other_column) if share > 0.0 else (row, column)
        for channel in range(image.shape[1]):
            difference = image[view, channel, row, column] - image[view, channel, other_row, other_column]
            blended[view, channel, target_row, target_column] += share * difference


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _blend_backward(image, pixels, pairs, edges, grad_blended, grad_image, grad_pixels):
    for index in range(pairs.shape[0]):
        view, row, column, direction = pairs[index, 0], pairs[index, 1], pairs[index, 2], pairs[index, 3]
        ax, ay = _offset(pixels[view, edges[index, 0]], row, column, direction)
        bx, by = _offset(pixels[view, edges[index, 1]], row, column, direction)
        height = by - ay
        reach = ax - ay * (bx - ax) / height
        share = min(max(reach, 0.0), 1.0) - 0.5
        other_row, other_column = _neighbour(row, column, direction)
        target_row, target_column = (other_row, other_column) if share > 0.0 else (row, column)
        grad_share = 0.0
        for channel in range(image.shape[1]):
            grad = np.float64(grad_blended[view, channel, target_row, target_column])
            difference = image[view, channel, row, column] - image[view, channel, other_row, other_column]
            grad_share += grad * difference
            grad_image[view, channel, row, column] += share * grad
            grad_image[view, channel, other_row, other_column] -= share * grad
        if reach < 0.0 or reach > 1.0:
            continue
        # The crossing is the mean of the edge's ends, weighted by how far across the segment the other one lies.
        weight_b = -ay / height
        slope = (bx - ax) / height
        sign = 1.0 if direction < 2 else -1.0
        along, across = (0, 1) if direction % 2 == 0 else (1, 0)
        for end, weight in ((0, 1.0 - weight_b), (1, weight_b)):
            target = grad_pixels[view, edges[index, end]]
            target[along] += grad_share * weight * sign
            target[across] -= grad_share * weight * slope
