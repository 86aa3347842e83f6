"""Which triangle is seen at each pixel centre: homogeneous scan conversion in spans (numba).

With camera-space corners ``v0, v1, v2`` and the ray ``d = K^-1 (x, y, 1)`` through a pixel centre, the edge function
``e_i = d . (v_k x v_j)`` has the sign of the ray's side of edge i (Olano and Greer, "Triangle Scan Conversion using 2D
Homogeneous Coordinates", 1997). It is linear in (x, y, 1), so that it is solved for the column where its sign changes
once a row: the pixels between the edges are covered, and no pixel outside is ever looked at. The inverse depth
``1 / z = d . sum_i (v_k x v_j) / det`` is linear too. No clipping against the near plane is needed: a triangle that
reaches behind the camera is drawn exactly where it is in front.

An edge shared by two triangles gives bitwise opposite edge functions, and rounding keeps them monotone along a row: one
triangle ends in the column before the one where the other begins, so that there are neither cracks nor double hits.
A pixel centre exactly on an edge belongs to the triangle on its right (below it, if the edge is a row). The solved
column is only a guess, checked against the edge function itself, whose values are those of
:mod:`lipflow.render.reference` to the last bit: both cover the same pixels.

Depth is compared before anything else is computed of a pixel, and attributes are interpolated for what is seen alone
(:mod:`lipflow.render.interpolate`). The cost is that of the triangles, their rows and the pixels they cover.
"""

from __future__ import annotations

import numba
import numpy as np

_SLACK_PX = 1e-3
"""Rounding of a triangle's bounding box must not decide what is covered: the lines do."""


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _first_centre(position, count):
    """The first of ``count`` pixels whose centre (index + 0.5) is at or beyond ``position``."""
    return int(np.ceil(min(max(position - 0.5, 0.0), np.float64(count))))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _crossing(slope, rest, inverse, count):
    """The first of ``count`` pixels where ``slope * centre + rest >= 0``; the slope is positive, inverse 1 / slope."""
    index = _first_centre(-rest * inverse, count)
    while index > 0 and slope * (index - 0.5) + rest >= 0.0:
        index -= 1
    while index < count and slope * (index + 0.5) + rest < 0.0:
        index += 1
    return index


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _to_pixels(x, y, z, per_fx, per_fy, skew, cx, cy):
    """K^-T (x, y, z), in an order of operations that keeps opposite planes opposite."""
    along_x = x * per_fx
    along_y = (y - skew * along_x) * per_fy
    return along_x, along_y, z - cx * along_x - cy * along_y


@numba.njit(nogil=True, cache=True, error_model="numpy")
def set_up_view(corners, faces, intrinsics, near, height, width):
    """Solve the edges of the triangles that can be seen, and drop the others.

    Args:
        corners: ``(V, 3)`` camera-space vertices, mm; computations are in float64 whatever their dtype.
        faces: ``(F, 3)``, counter-clockwise from outside.
        intrinsics: ``(3, 3)`` K, upper triangular with last row (0, 0, 1).
        near: smallest depth drawn, mm.
        height: of the image, pixels.
        width: of the image, pixels.

    Returns:
        Four things, of which the first rows of the first three describe the triangles that were kept, in the order of
        ``faces``; none is, if K has no finite inverse.

        - lines ``(F, 3, 4)``: of the triangle's left sides, then of the right ones, the edge function's slopes along x
          and y, its constant, and 1 / the slope along x, with the sign that makes this slope positive. An edge that is
          a row of pixels bounds the rows instead, and a line is repeated for it.
        - inverse_depth ``(F, 3)``: 1 / z = plane . (column, row, 1).
        - spans ``(F, 5)`` int32: face, first row, row after the last, how many lines are left sides, whether the near
          plane may cut the triangle.
        - how many were kept.
    """
    lines, inverse_depth = np.empty((faces.shape[0], 3, 4)), np.empty((faces.shape[0], 3))
    spans = np.empty((faces.shape[0], 5), np.int32)
    fx, skew, cx = np.float64(intrinsics[0, 0]), np.float64(intrinsics[0, 1]), np.float64(intrinsics[0, 2])
    fy, cy = np.float64(intrinsics[1, 1]), np.float64(intrinsics[1, 2])
    per_fx, per_fy = 1.0 / fx, 1.0 / fy
    if not np.isfinite(per_fx + per_fy + skew + cx + cy):
        return lines, inverse_depth, spans, 0
    kept = 0
    for face in range(faces.shape[0]):
        a, b, c = corners[faces[face, 0]], corners[faces[face, 1]], corners[faces[face, 2]]
        a0, a1, a2 = np.float64(a[0]), np.float64(a[1]), np.float64(a[2])
        b0, b1, b2 = np.float64(b[0]), np.float64(b[1]), np.float64(b[2])
        c0, c1, c2 = np.float64(c[0]), np.float64(c[1]), np.float64(c[2])
        q0, q1, q2, r0, r1, r2 = c0 - a0, c1 - a1, c2 - a2, b0 - a0, b1 - a1, b2 - a2
        n0, n1, n2 = q1 * r2 - q2 * r1, q2 * r0 - q0 * r2, q0 * r1 - q1 * r0
        volume = a0 * n0 + a1 * n1 + a2 * n2
        if not 0.0 < volume < np.inf:  # seen from behind, edge-on, without area, or not finite
            continue
        first_row, stop_row, first_column, stop_column = 0, height, 0, width
        cut = a2 < near or b2 < near or c2 < near
        if cut:
            if a2 < near and b2 < near and c2 < near:
                continue
        else:
            ay, by, cy_px = a1 / a2, b1 / b2, c1 / c2
            ax, bx, cx_px = fx * a0 / a2 + skew * ay, fx * b0 / b2 + skew * by, fx * c0 / c2 + skew * cy_px
            first_row = _first_centre(fy * min(ay, by, cy_px) + cy - _SLACK_PX, height)
            stop_row = _first_centre(fy * max(ay, by, cy_px) + cy + _SLACK_PX, height)
            first_column = _first_centre(min(ax, bx, cx_px) + cx - _SLACK_PX, width)
            stop_column = _first_centre(max(ax, bx, cx_px) + cx + _SLACK_PX, width)
        if first_row >= stop_row or first_column >= stop_column:
            continue
        lefts = sides = 0
        for edge in range(3):
            # The plane of the edge, bitwise the opposite of what the neighbour across it computes.
            if edge == 0:
                e0, e1, e2 = c1 * b2 - c2 * b1, c2 * b0 - c0 * b2, c0 * b1 - c1 * b0
            elif edge == 1:
                e0, e1, e2 = a1 * c2 - a2 * c1, a2 * c0 - a0 * c2, a0 * c1 - a1 * c0
            else:
                e0, e1, e2 = b1 * a2 - b2 * a1, b2 * a0 - b0 * a2, b0 * a1 - b1 * a0
            along_x, along_y, constant = _to_pixels(e0, e1, e2, per_fx, per_fy, skew, cx, cy)
            inverse = 1.0 / abs(along_x)
            if np.isfinite(inverse):
                place, sign = sides, -1.0
                if along_x > 0.0:
                    place, sign = lefts, 1.0
                    lines[kept, sides] = lines[kept, lefts]
                    lefts += 1
                sides += 1
                lines[kept, place, 0], lines[kept, place, 1] = sign * along_x, sign * along_y
                lines[kept, place, 2], lines[kept, place, 3] = sign * constant, inverse
            elif along_y > 0.0:
                first_row = max(first_row, _crossing(along_y, constant, 1.0 / along_y, height))
            elif along_y < 0.0:
                stop_row = min(stop_row, _crossing(-along_y, -constant, -1.0 / along_y, height))
            elif constant <= 0.0:
                stop_row = first_row
        if sides == 0:
            continue
        if lefts == sides:
            lefts = 3
        for side in range(sides, 3):
            lines[kept, side] = lines[kept, sides - 1]
        if first_row >= stop_row:
            continue
        along_x, along_y, constant = _to_pixels(n0, n1, n2, per_fx, per_fy, skew, cx, cy)
        inverse_depth[kept, 0], inverse_depth[kept, 1] = along_x / volume, along_y / volume
        inverse_depth[kept, 2] = constant / volume
        spans[kept, 0], spans[kept, 1], spans[kept, 2] = face, first_row, stop_row
        spans[kept, 3], spans[kept, 4] = lefts, cut
        kept += 1
    return lines, inverse_depth, spans, kept


@numba.njit(nogil=True, cache=True, error_model="numpy")
def draw_rows(triangles, near, begin, triangle_id, nearness):
    """Draw the rows of one band of a view.

    Args:
        triangles: of :func:`set_up_view`.
        near: smallest depth drawn, mm.
        begin: the image row of the band's first row.
        triangle_id: output ``(R, W)`` int32, -1 where nothing is seen. Equal depths go to the lower triangle index.
        nearness: output ``(R, W)`` float64, 1 / depth, 0 where nothing is seen.
    """
    lines, inverse_depth, spans, kept = triangles
    rows, width = triangle_id.shape
    triangle_id[:] = -1
    nearness[:] = 0.0
    nearest = 1.0 / near
    for index in range(kept):
        face, lefts, cut = spans[index, 0], spans[index, 3], spans[index, 4]
        # Copies: the compiler cannot know that drawing leaves the arrays alone.
        ax, ay, ac, a_inverse = lines[index, 0]
        bx, by, bc, b_inverse = lines[index, 1]
        cx, cy, cc, c_inverse = lines[index, 2]
        along_x, along_y, constant = inverse_depth[index]
        for row in range(max(spans[index, 1] - begin, 0), min(spans[index, 2] - begin, rows)):
            y = begin + row + 0.5
            a = _crossing(ax, ay * y + ac, a_inverse, width)
            b = _crossing(bx, by * y + bc, b_inverse, width)
            c = _crossing(cx, cy * y + cc, c_inverse, width)
            if lefts == 1:
                first, stop = a, min(b, c)
            elif lefts == 2:
                first, stop = max(a, b), c
            elif lefts == 3:
                first, stop = max(a, b, c), width
            else:
                first, stop = 0, min(a, b, c)
            base = along_y * y + constant
            for column in range(first, stop):
                value = along_x * (column + 0.5) + base
                if value > nearness[row, column] and not (cut and value > nearest):
                    nearness[row, column] = value
                    triangle_id[row, column] = face


__all__ = ["draw_rows", "set_up_view"]
