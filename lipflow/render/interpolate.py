"""Texture coordinates and depth at the visible pixels, differentiable, fused for the CPU (numba).

Of a triangle with camera-space corners ``a, b, c`` and edge planes ``n_a = c x b``, ``n_b = a x c``, ``n_c = b x a``,
a ray ``d`` meets ``uv = sum_i (d . n_i) uv_i / sum_i d . n_i`` at depth ``det / sum_i d . n_i``: ratios of linear
functions of the pixel's ``p = (x, y, 1)``, since ``d = K^-1 p``. They are set up once for each triangle that is seen,

    U = K^-T sum_i (u_i - u_a) n_i,   V likewise,   S = K^-T sum_i n_i,   t = 1 / (S . p),
    u = u_a + (U . p) t,   v = v_a + (V . p) t,   z = det t,   du/dx = (U_x - (u - u_a) S_x) t,

and a pixel costs three products with p and one division. Backwards, the gradients of U, V, S and det are summed over
a triangle's pixels, and go on to corners, K and texture coordinates once for each triangle. Triangles get their place
in a kernel's memory as they are met: most of a mesh is not seen, and is never touched. Everything is computed in
float64 (``np.float64(x)``: in numba ``float(x)`` of a float32 stays one), and planes from differences of corners:
in products of positions, a metre away, grazing triangles would cancel. :func:`lipflow.render.reference.interpolate`
gives the same numbers in plain torch.
"""

from __future__ import annotations

from functools import partial

import numba
import numpy as np
import torch
from torch import Tensor

from lipflow.memory import empty
from lipflow.render.parallel import row_bands, run_parallel

_PLANES = 12
"""Doubles a triangle: U, V, S, det, u_a, v_a. Their gradients take the same places (the last two: of u and v)."""


def interpolate_cpu(
    corners: Tensor,
    intrinsics: Tensor,
    triangle_id: Tensor,
    faces: Tensor,
    face_uvs: Tensor,
    *,
    derivatives: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Texture coordinates and depth maps of CPU tensors.

    Args:
        corners: ``(N, V, 3)`` camera-space vertices of N views, mm.
        intrinsics: ``(N, 3, 3)`` K, upper triangular with last row (0, 0, 1).
        triangle_id: ``(N, H, W)`` int32, -1 where nothing is seen.
        faces: ``(F, 3)`` int64.
        face_uvs: ``(F, 3, 2)``.
        derivatives: also the change of the texture coordinates from pixel to pixel.

    Returns:
        ``(N, H, W, 2)`` texture coordinates, ``(N, H, W)`` depths in mm and, if asked for, ``(N, H, W, 2, 2)``
        derivatives of u, v by x, y; all 0 where nothing is seen. In the dtype of ``corners``.
    """
    uv, depth, uv_da = _Interpolate.apply(corners, intrinsics, triangle_id, faces, face_uvs, derivatives)
    return uv, depth, uv_da if derivatives else None


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, corners, intrinsics, triangle_id, faces, face_uvs, derivatives):
        shape = triangle_id.shape
        uv, depth = empty((*shape, 2), corners.dtype), empty(shape, corners.dtype)
        uv_da = empty((*(shape if derivatives else (shape[0], 0, 0)), 2, 2), corners.dtype)
        ctx.save_for_backward(corners, intrinsics, triangle_id, faces, face_uvs)
        ctx.derivatives = derivatives
        meshes, cameras, ids, faces, texture = _arrays(corners, intrinsics, triangle_id, faces, face_uvs)
        outputs = uv.numpy(), depth.numpy(), uv_da.numpy()

        def draw(view: int, begin: int, stop: int) -> None:
            band = [output[view, begin:stop] for output in outputs]
            _forward(meshes[view], cameras[view], ids[view, begin:stop], begin, faces, texture, *band)  # type: ignore[call-arg]

        run_parallel(partial(draw, *band) for band in row_bands(*shape[:2]))
        return uv, depth, uv_da

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_uv, grad_depth, grad_uv_da):
        corners, intrinsics, triangle_id, faces, face_uvs = ctx.saved_tensors
        meshes, cameras, ids, faces, texture = _arrays(corners, intrinsics, triangle_id, faces, face_uvs)
        gradients = _arrays(grad_uv, grad_depth, grad_uv_da)
        grad_corners, grad_inverse = np.zeros(meshes.shape), np.zeros(cameras.shape)
        wanted = ctx.needs_input_grad[4]
        grad_face_uvs = np.zeros(texture.shape if wanted else (0, 3, 2))
        bands = row_bands(*ids.shape[:2])

        def gather(view: int, begin: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            band = [gradient[view, begin:stop] for gradient in gradients]
            return _backward(meshes[view], cameras[view], ids[view, begin:stop], begin, faces, texture, *band)  # type: ignore[call-arg]

        for (view, _, _), met in zip(bands, run_parallel(partial(gather, *band) for band in bands), strict=True):
            targets = grad_corners[view], grad_inverse[view], grad_face_uvs
            _distribute(meshes[view], cameras[view], faces, texture, *met, *targets)
        return (
            torch.from_numpy(grad_corners).to(corners.dtype),
            torch.from_numpy(_through_inverse(cameras, grad_inverse)).to(intrinsics.dtype),
            None,
            None,
            torch.from_numpy(grad_face_uvs).to(face_uvs.dtype) if wanted else None,
            None,
        )


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _through_inverse(intrinsics: np.ndarray, grad_inverse: np.ndarray) -> np.ndarray:
    """Gradients of K ``(N, 3, 3)`` from those of its inverse; only the five free entries of K have one."""
    gradient = np.zeros(intrinsics.shape)
    seeing = np.any(grad_inverse != 0, axis=(1, 2))  # the others may have any K
    inverse = np.linalg.inv(intrinsics[seeing].astype(np.float64)).swapaxes(-1, -2)
    gradient[seeing] = -np.triu(inverse @ grad_inverse[seeing] @ inverse)
    gradient[:, 2] = 0.0
    return gradient


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _inverse(intrinsics):
    """The free entries of K^-1, row by row."""
    fx, skew, cx = np.float64(intrinsics[0, 0]), np.float64(intrinsics[0, 1]), np.float64(intrinsics[0, 2])
    fy, cy = np.float64(intrinsics[1, 1]), np.float64(intrinsics[1, 2])
    return 1.0 / fx, -skew / (fx * fy), (skew * cy / fy - cx) / fx, 1.0 / fy, -cy / fy


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _corner(corners, index):
    return np.float64(corners[index, 0]), np.float64(corners[index, 1]), np.float64(corners[index, 2])


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _cross(p, q):
    return p[1] * q[2] - p[2] * q[1], p[2] * q[0] - p[0] * q[2], p[0] * q[1] - p[1] * q[0]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _minus(p, q):
    return p[0] - q[0], p[1] - q[1], p[2] - q[2]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _mix(first, p, second, q):
    return first * p[0] + second * q[0], first * p[1] + second * q[1], first * p[2] + second * q[2]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _to_pixels(inverse, plane):
    """K^-T plane."""
    m00, m01, m02, m11, m12 = inverse
    return m00 * plane[0], m01 * plane[0] + m11 * plane[1], m02 * plane[0] + m12 * plane[1] + plane[2]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _from_pixels(inverse, plane):
    """K^-1 plane, which carries gradients the other way."""
    m00, m01, m02, m11, m12 = inverse
    return m00 * plane[0] + m01 * plane[1] + m02 * plane[2], m11 * plane[1] + m12 * plane[2], plane[2]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _set_up(corners, inverse, faces, face_uvs, face, planes):
    """Fill ``planes (12,)`` with U, V, S, det, u_a, v_a of a face."""
    a, b, c = _corner(corners, faces[face, 0]), _corner(corners, faces[face, 1]), _corner(corners, faces[face, 2])
    to_c, to_b = _minus(c, a), _minus(b, a)
    normal, plane_b, plane_c = _cross(to_c, to_b), _cross(a, to_c), _cross(to_b, a)
    u_a, v_a = np.float64(face_uvs[face, 0, 0]), np.float64(face_uvs[face, 0, 1])
    u = _to_pixels(inverse, _mix(face_uvs[face, 1, 0] - u_a, plane_b, face_uvs[face, 2, 0] - u_a, plane_c))
    v = _to_pixels(inverse, _mix(face_uvs[face, 1, 1] - v_a, plane_b, face_uvs[face, 2, 1] - v_a, plane_c))
    s = _to_pixels(inverse, normal)
    planes[0], planes[1], planes[2] = u
    planes[3], planes[4], planes[5] = v
    planes[6], planes[7], planes[8] = s
    planes[9] = a[0] * normal[0] + a[1] * normal[1] + a[2] * normal[2]
    planes[10], planes[11] = u_a, v_a


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _no_faces(faces, triangle_id):
    """The place of each face, -1 as yet; the face at each place; and room for the planes at each place."""
    most = min(faces.shape[0], triangle_id.size)
    return np.full(faces.shape[0], -1, np.int32), np.empty(most, np.int32), np.empty((most, 12))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _forward(corners, intrinsics, triangle_id, begin, faces, face_uvs, uv, depth, uv_da):
    """Fill one band of a view; its first row is the image's row ``begin``."""
    inverse = _inverse(intrinsics)
    places, met, planes = _no_faces(faces, triangle_id)
    count = 0
    derivatives = uv_da.size > 0
    rows, width = triangle_id.shape
    for row in range(rows):
        y = begin + row + 0.5
        column = 0
        while column < width:
            face = triangle_id[row, column]
            stop = column + 1
            while stop < width and triangle_id[row, stop] == face:
                stop += 1
            if face < 0:
                uv[row, column:stop] = 0.0
                depth[row, column:stop] = 0.0
                if derivatives:
                    uv_da[row, column:stop] = 0.0
                column = stop
                continue
            if places[face] < 0:
                places[face], met[count] = count, face
                _set_up(corners, inverse, faces, face_uvs, face, planes[count])
                count += 1
            plane = planes[places[face]]
            u_x, u_row = plane[0], plane[1] * y + plane[2]
            v_x, v_row = plane[3], plane[4] * y + plane[5]
            s_x, s_row = plane[6], plane[7] * y + plane[8]
            determinant, u_a, v_a = plane[9], plane[10], plane[11]
            for pixel in range(column, stop):
                x = pixel + 0.5
                t = 1.0 / (s_x * x + s_row)
                du, dv = (u_x * x + u_row) * t, (v_x * x + v_row) * t
                uv[row, pixel, 0], uv[row, pixel, 1] = u_a + du, v_a + dv
                depth[row, pixel] = determinant * t
                if derivatives:
                    uv_da[row, pixel, 0, 0] = (u_x - du * s_x) * t
                    uv_da[row, pixel, 0, 1] = (plane[1] - du * plane[7]) * t
                    uv_da[row, pixel, 1, 0] = (v_x - dv * s_x) * t
                    uv_da[row, pixel, 1, 1] = (plane[4] - dv * plane[7]) * t
            column = stop


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _backward(corners, intrinsics, triangle_id, begin, faces, face_uvs, grad_uv, grad_depth, grad_uv_da):
    """The faces ``(M,)`` that one band of a view shows, and the gradients of their planes ``(M, 12)``."""
    inverse = _inverse(intrinsics)
    places, met, planes = _no_faces(faces, triangle_id)
    sums = np.empty_like(planes)
    count = 0
    derivatives = grad_uv_da.size > 0
    rows, width = triangle_id.shape
    for row in range(rows):
        y = begin + row + 0.5
        column = 0
        while column < width:
            face = triangle_id[row, column]
            stop = column + 1
            while stop < width and triangle_id[row, stop] == face:
                stop += 1
            if face < 0:
                column = stop
                continue
            if places[face] < 0:
                places[face], met[count] = count, face
                _set_up(corners, inverse, faces, face_uvs, face, planes[count])
                sums[count] = 0.0
                count += 1
            plane, total = planes[places[face]], sums[places[face]]
            u_x, u_y, u_row = plane[0], plane[1], plane[1] * y + plane[2]
            v_x, v_y, v_row = plane[3], plane[4], plane[4] * y + plane[5]
            s_x, s_y, s_row = plane[6], plane[7], plane[7] * y + plane[8]
            determinant = plane[9]
            sum_u = sum_v = sum_s = sum_ux = sum_vx = sum_sx = sum_det = sum_ua = sum_va = 0.0
            for pixel in range(column, stop):
                x = pixel + 0.5
                t = 1.0 / (s_x * x + s_row)
                du, dv = (u_x * x + u_row) * t, (v_x * x + v_row) * t
                grad_u, grad_v = np.float64(grad_uv[row, pixel, 0]), np.float64(grad_uv[row, pixel, 1])
                grad_z = np.float64(grad_depth[row, pixel])
                sum_ua += grad_u
                sum_va += grad_v
                rest = grad_z * determinant * t
                if derivatives:
                    ux, uy = np.float64(grad_uv_da[row, pixel, 0, 0]), np.float64(grad_uv_da[row, pixel, 0, 1])
                    vx, vy = np.float64(grad_uv_da[row, pixel, 1, 0]), np.float64(grad_uv_da[row, pixel, 1, 1])
                    total[0] += ux * t
                    total[1] += uy * t
                    total[3] += vx * t
                    total[4] += vy * t
                    total[6] -= (ux * du + vx * dv) * t
                    total[7] -= (uy * du + vy * dv) * t
                    grad_u -= (ux * s_x + uy * s_y) * t
                    grad_v -= (vx * s_x + vy * s_y) * t
                    rest += (ux * (u_x - du * s_x) + uy * (u_y - du * s_y)) * t
                    rest += (vx * (v_x - dv * s_x) + vy * (v_y - dv * s_y)) * t
                part_u, part_v = grad_u * t, grad_v * t
                part_s = (grad_u * du + grad_v * dv + rest) * t
                sum_u += part_u
                sum_v += part_v
                sum_s += part_s
                sum_ux += part_u * x
                sum_vx += part_v * x
                sum_sx += part_s * x
                sum_det += grad_z * t
            total[0] += sum_ux
            total[1] += sum_u * y
            total[2] += sum_u
            total[3] += sum_vx
            total[4] += sum_v * y
            total[5] += sum_v
            total[6] -= sum_sx
            total[7] -= sum_s * y
            total[8] -= sum_s
            total[9] += sum_det
            total[10] += sum_ua
            total[11] += sum_va
            column = stop
    return met[:count], sums[:count]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _distribute(corners, intrinsics, faces, face_uvs, met, sums, grad_corners, grad_inverse, grad_face_uvs):
    """Carry the gradients of the planes of the faces ``met (M,)`` on to what they were made of.

    Adds to those of corners ``(V, 3)``, K^-1 ``(3, 3)`` and, unless it is empty, texture coordinates ``(F, 3, 2)``.
    """
    inverse = _inverse(intrinsics)
    for place in range(met.shape[0]):
        face, total = met[place], sums[place]
        moved = False
        for gradient in total:
            moved = moved or gradient != 0.0
        if not moved:
            continue
        ia, ib, ic = faces[face, 0], faces[face, 1], faces[face, 2]
        a, b, c = _corner(corners, ia), _corner(corners, ib), _corner(corners, ic)
        to_c, to_b = _minus(c, a), _minus(b, a)
        normal, plane_b, plane_c = _cross(to_c, to_b), _cross(a, to_c), _cross(to_b, a)
        grad_u, grad_v = (total[0], total[1], total[2]), (total[3], total[4], total[5])
        grad_s = (total[6], total[7], total[8])
        u_a, v_a = np.float64(face_uvs[face, 0, 0]), np.float64(face_uvs[face, 0, 1])
        b_u, b_v = face_uvs[face, 1, 0] - u_a, face_uvs[face, 1, 1] - v_a
        c_u, c_v = face_uvs[face, 2, 0] - u_a, face_uvs[face, 2, 1] - v_a
        pixels_b, pixels_c = _mix(b_u, grad_u, b_v, grad_v), _mix(c_u, grad_u, c_v, grad_v)
        for i, (x, y, z) in enumerate(zip(plane_b, plane_c, normal)):  # noqa: B905 (numba knows no strict)
            for j in range(3):
                grad_inverse[i, j] += x * pixels_b[j] + y * pixels_c[j] + z * grad_s[j]
        grad_b, grad_c = _from_pixels(inverse, pixels_b), _from_pixels(inverse, pixels_c)
        grad_normal = _mix(1.0, _from_pixels(inverse, grad_s), total[9], a)
        from_c, from_b = _cross(to_b, grad_normal), _cross(grad_normal, to_c)
        b_of_c, b_of_a = _cross(grad_b, a), _cross(c, grad_b)
        c_of_a, c_of_b = _cross(grad_c, b), _cross(a, grad_c)
        for axis in range(3):
            grad_corners[ia, axis] += (
                total[9] * normal[axis] + b_of_a[axis] + c_of_a[axis] - from_c[axis] - from_b[axis]
            )
            grad_corners[ib, axis] += c_of_b[axis] + from_b[axis]
            grad_corners[ic, axis] += b_of_c[axis] + from_c[axis]
        if grad_face_uvs.shape[0] == 0:
            continue
        imaged_b, imaged_c = _to_pixels(inverse, plane_b), _to_pixels(inverse, plane_c)
        for axis in range(2):
            grad_plane = grad_u if axis == 0 else grad_v
            at_b = imaged_b[0] * grad_plane[0] + imaged_b[1] * grad_plane[1] + imaged_b[2] * grad_plane[2]
            at_c = imaged_c[0] * grad_plane[0] + imaged_c[1] * grad_plane[1] + imaged_c[2] * grad_plane[2]
            grad_face_uvs[face, 0, axis] += total[10 + axis] - at_b - at_c
            grad_face_uvs[face, 1, axis] += at_b
            grad_face_uvs[face, 2, axis] += at_c


__all__ = ["interpolate_cpu"]
