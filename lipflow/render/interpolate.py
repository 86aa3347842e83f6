"""Texture coordinates and depth at the visible pixels, differentiable in vertices, cameras and coordinates.

With camera-space corners ``v0, v1, v2`` and the pixel's ray ``d = (x, y, 1)``, the perspective-correct barycentric
weights are ``b_i = e_i / (e_0 + e_1 + e_2)``, ``e_i = d . (v_j x v_k)``, ``(i, j, k)`` cyclic. Two
implementations give the same numbers: plain torch, for any device and precision, and a fused kernel for the CPU,
whose backward pass is written out::

    dL/db_i = dL/duv . uv_i + dL/dz z_i
    dL/de_i = (dL/db_i - sum_j b_j dL/db_j) / (e_0 + e_1 + e_2)
    dL/dv_j += dL/de_i (v_k x d),   dL/dv_k += dL/de_i (d x v_j),   dL/dd += dL/de_i (v_j x v_k)
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor


def interpolate_torch(
    corners: Tensor, intrinsics: Tensor, triangle_id: Tensor, faces: Tensor, face_uvs: Tensor
) -> tuple[Tensor, Tensor]:
    """Texture coordinates and depth maps, in plain torch.

    Args:
        corners: ``(N, V, 3)`` camera-space vertices of N views, mm.
        intrinsics: ``(N, 3, 3)`` K.
        triangle_id: ``(N, H, W)``, -1 where nothing is seen.
        faces: ``(F, 3)``.
        face_uvs: ``(F, 3, 2)``.

    Returns:
        ``(N, H, W, 2)`` texture coordinates and ``(N, H, W)`` depths in mm, both 0 where nothing is seen.
    """
    view, row, column = torch.nonzero(triangle_id >= 0, as_tuple=True)
    triangle = triangle_id[view, row, column].long()
    camera = intrinsics[view]
    ray_y = (row + 0.5 - camera[:, 1, 2]) / camera[:, 1, 1]
    ray_x = (column + 0.5 - camera[:, 0, 2] - camera[:, 0, 1] * ray_y) / camera[:, 0, 0]
    ray = torch.stack([ray_x, ray_y, torch.ones_like(ray_x)], dim=-1)
    seen_corners = corners[view[:, None], faces[triangle]]
    # Relative to a point on the ray, which changes no e_i: in float32 the products of full camera-space positions,
    # a metre away, would cancel.
    a, b, c = (seen_corners - (ray * seen_corners[:, 0, 2:].detach())[:, None]).unbind(1)
    edges = torch.stack(
        [(ray * torch.linalg.cross(second, third)).sum(-1) for second, third in ((b, c), (c, a), (a, b))], dim=1
    )
    weights = edges / edges.sum(1, keepdim=True)
    uv = (weights[..., None] * face_uvs[triangle]).sum(1)
    depth = (weights * seen_corners[..., 2]).sum(1)
    shape = triangle_id.shape
    place = (view, row, column)
    return uv.new_zeros(*shape, 2).index_put(place, uv), depth.new_zeros(shape).index_put(place, depth)


def interpolate_cpu(
    corners: Tensor, intrinsics: Tensor, triangle_id: Tensor, faces: Tensor, face_uvs: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as :func:`interpolate_torch` for CPU tensors, fused; computes in float64 inside."""
    return _Interpolate.apply(corners, intrinsics, triangle_id, faces, face_uvs)


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, corners, intrinsics, triangle_id, faces, face_uvs):
        shape = triangle_id.shape
        uv, depth = corners.new_zeros(*shape, 2), corners.new_zeros(shape)
        ctx.save_for_backward(corners, intrinsics, triangle_id, faces, face_uvs)
        _forward(*_arrays(corners, intrinsics, triangle_id, faces, face_uvs, uv, depth))
        return uv, depth

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_uv, grad_depth):
        corners, intrinsics, triangle_id, faces, face_uvs = ctx.saved_tensors
        grad_corners = np.zeros(corners.shape)
        grad_intrinsics = np.zeros(intrinsics.shape)
        grad_face_uvs = np.zeros(face_uvs.shape)
        inputs = _arrays(corners, intrinsics, triangle_id, faces, face_uvs, grad_uv, grad_depth)
        _backward(*inputs, grad_corners, grad_intrinsics, grad_face_uvs)  # type: ignore[call-arg]
        return (
            torch.from_numpy(grad_corners).to(corners.dtype),
            torch.from_numpy(grad_intrinsics).to(intrinsics.dtype),
            None,
            None,
            torch.from_numpy(grad_face_uvs).to(face_uvs.dtype) if ctx.needs_input_grad[4] else None,
        )


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _triple(ray_x, ray_y, b0, b1, b2, c0, c1, c2):
    """``d . (b x c)`` of the ray ``d = (ray_x, ray_y, 1)``."""
    return ray_x * (b1 * c2 - b2 * c1) + ray_y * (b2 * c0 - b0 * c2) + (b0 * c1 - b1 * c0)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _forward(corners, intrinsics, triangle_id, faces, face_uvs, uv, depth):
    for view in range(triangle_id.shape[0]):
        fx, skew, cx = float(intrinsics[view, 0, 0]), float(intrinsics[view, 0, 1]), float(intrinsics[view, 0, 2])
        fy, cy = float(intrinsics[view, 1, 1]), float(intrinsics[view, 1, 2])
        for row in range(triangle_id.shape[1]):
            ray_y = (row + 0.5 - cy) / fy
            for column in range(triangle_id.shape[2]):
                face = triangle_id[view, row, column]
                if face < 0:
                    continue
                ray_x = (column + 0.5 - cx - skew * ray_y) / fx
                a, b, c = (
                    corners[view, faces[face, 0]],
                    corners[view, faces[face, 1]],
                    corners[view, faces[face, 2]],
                )
                a0, a1, a2 = float(a[0]), float(a[1]), float(a[2])
                b0, b1, b2 = float(b[0]), float(b[1]), float(b[2])
                c0, c1, c2 = float(c[0]), float(c[1]), float(c[2])
                edge_a = _triple(ray_x, ray_y, b0, b1, b2, c0, c1, c2)
                edge_b = _triple(ray_x, ray_y, c0, c1, c2, a0, a1, a2)
                edge_c = _triple(ray_x, ray_y, a0, a1, a2, b0, b1, b2)
                total = edge_a + edge_b + edge_c
                edge_a, edge_b, edge_c = edge_a / total, edge_b / total, edge_c / total
                for axis in range(2):
                    uv[view, row, column, axis] = (
                        edge_a * face_uvs[face, 0, axis]
                        + edge_b * face_uvs[face, 1, axis]
                        + edge_c * face_uvs[face, 2, axis]
                    )
                depth[view, row, column] = edge_a * a2 + edge_b * b2 + edge_c * c2


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _backward(
    corners,
    intrinsics,
    triangle_id,
    faces,
    face_uvs,
    grad_uv,
    grad_depth,
    grad_corners,
    grad_intrinsics,
    grad_face_uvs,
):
    for view in range(triangle_id.shape[0]):
        fx, skew, cx = float(intrinsics[view, 0, 0]), float(intrinsics[view, 0, 1]), float(intrinsics[view, 0, 2])
        fy, cy = float(intrinsics[view, 1, 1]), float(intrinsics[view, 1, 2])
        for row in range(triangle_id.shape[1]):
            ray_y = (row + 0.5 - cy) / fy
            for column in range(triangle_id.shape[2]):
                face = triangle_id[view, row, column]
                if face < 0:
                    continue
                grad_u, grad_v = grad_uv[view, row, column, 0], grad_uv[view, row, column, 1]
                grad_z = grad_depth[view, row, column]
                if grad_u == 0.0 and grad_v == 0.0 and grad_z == 0.0:
                    continue
                ray_x = (column + 0.5 - cx - skew * ray_y) / fx
                ia, ib, ic = faces[face, 0], faces[face, 1], faces[face, 2]
                a, b, c = corners[view, ia], corners[view, ib], corners[view, ic]
                a0, a1, a2 = float(a[0]), float(a[1]), float(a[2])
                b0, b1, b2 = float(b[0]), float(b[1]), float(b[2])
                c0, c1, c2 = float(c[0]), float(c[1]), float(c[2])
                edge_a = _triple(ray_x, ray_y, b0, b1, b2, c0, c1, c2)
                edge_b = _triple(ray_x, ray_y, c0, c1, c2, a0, a1, a2)
                edge_c = _triple(ray_x, ray_y, a0, a1, a2, b0, b1, b2)
                total = edge_a + edge_b + edge_c
                weight_a, weight_b, weight_c = edge_a / total, edge_b / total, edge_c / total
                uvs = face_uvs[face]
                grad_a = grad_u * uvs[0, 0] + grad_v * uvs[0, 1] + grad_z * a2
                grad_b = grad_u * uvs[1, 0] + grad_v * uvs[1, 1] + grad_z * b2
                grad_c = grad_u * uvs[2, 0] + grad_v * uvs[2, 1] + grad_z * c2
                mean = weight_a * grad_a + weight_b * grad_b + weight_c * grad_c
                # From here on: gradients of the three edge functions.
                grad_a, grad_b, grad_c = (grad_a - mean) / total, (grad_b - mean) / total, (grad_c - mean) / total
                ga, gb, gc = grad_corners[view, ia], grad_corners[view, ib], grad_corners[view, ic]
                # Each corner stands in two edge functions.
                _add_cross(
                    ga,
                    ray_x,
                    ray_y,
                    grad_c * b0 - grad_b * c0,
                    grad_c * b1 - grad_b * c1,
                    grad_c * b2 - grad_b * c2,
                )
                _add_cross(
                    gb,
                    ray_x,
                    ray_y,
                    grad_a * c0 - grad_c * a0,
                    grad_a * c1 - grad_c * a1,
                    grad_a * c2 - grad_c * a2,
                )
                _add_cross(
                    gc,
                    ray_x,
                    ray_y,
                    grad_b * a0 - grad_a * b0,
                    grad_b * a1 - grad_a * b1,
                    grad_b * a2 - grad_a * b2,
                )
                ga[2] += grad_z * weight_a
                gb[2] += grad_z * weight_b
                gc[2] += grad_z * weight_c
                for axis, grad in ((0, grad_u), (1, grad_v)):
                    grad_face_uvs[face, 0, axis] += grad * weight_a
                    grad_face_uvs[face, 1, axis] += grad * weight_b
                    grad_face_uvs[face, 2, axis] += grad * weight_c
                grad_x = grad_a * (b1 * c2 - b2 * c1) + grad_b * (c1 * a2 - c2 * a1) + grad_c * (a1 * b2 - a2 * b1)
                grad_y = grad_a * (b2 * c0 - b0 * c2) + grad_b * (c2 * a0 - c0 * a2) + grad_c * (a2 * b0 - a0 * b2)
                grad_y -= grad_x * skew / fx
                grad_intrinsics[view, 0, 0] -= grad_x * ray_x / fx
                grad_intrinsics[view, 0, 1] -= grad_x * ray_y / fx
                grad_intrinsics[view, 0, 2] -= grad_x / fx
                grad_intrinsics[view, 1, 1] -= grad_y * ray_y / fy
                grad_intrinsics[view, 1, 2] -= grad_y / fy


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _add_cross(target, ray_x, ray_y, x, y, z):
    """``target += (x, y, z) x d``."""
    target[0] += y - z * ray_y
    target[1] += z * ray_x - x
    target[2] += x * ray_y - y * ray_x
