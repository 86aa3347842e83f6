r"""Lens distortion: the Brown-Conrady model with three radial and two tangential coefficients.

For a point (x, y) of the normalised image plane (z = 1) and r^2 = x^2 + y^2, in OpenCV's order k1, k2, p1, p2, k3:

.. math::

    x' &= x (1 + k_1 r^2 + k_2 r^4 + k_3 r^6) + 2 p_1 x y + p_2 (r^2 + 2 x^2) \\
    y' &= y (1 + k_1 r^2 + k_2 r^4 + k_3 r^6) + p_1 (r^2 + 2 y^2) + 2 p_2 x y

The model is a fit: beyond :func:`valid_radius` it maps points back towards the centre, which no lens does. Points
out there have to be refused or masked by the caller.

References:
    | D. C. Brown, "Close-Range Camera Calibration", Photogrammetric Engineering 37(8), 1971.
    | A. E. Conrady, "Decentred Lens-Systems", Monthly Notices of the Royal Astronomical Society 79, 1919.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_NEWTON_STEPS = 50
_TOLERANCE_EPS = 16.0
"""An inverse is accepted if it maps to within so many roundings of its point; Newton ends within 4 on sane lenses."""


def distort(points: Tensor, coefficients: Tensor) -> Tensor:
    """Where a lens images the points of a pinhole camera. Differentiable in both arguments.

    Args:
        points: ``(..., N, 2)`` normalised image points (x / z, y / z), no unit.
        coefficients: ``(..., 5)`` k1, k2, p1, p2, k3; leading dimensions broadcast.

    Returns:
        ``(..., N, 2)`` normalised image points of the distorted image, meaningless beyond :func:`valid_radius`.
    """
    k1, k2, p1, p2, k3 = coefficients[..., None, :].unbind(-1)
    x, y = points.unbind(-1)
    squared = x * x + y * y
    radial = 1 + squared * (k1 + squared * (k2 + squared * k3))
    twice_xy = 2 * x * y
    return torch.stack(
        [
            x * radial + p1 * twice_xy + p2 * (squared + 2 * x * x),
            y * radial + p1 * (squared + 2 * y * y) + p2 * twice_xy,
        ],
        dim=-1,
    )


def undistort(points: Tensor, coefficients: Tensor) -> Tensor:
    """The inverse of :func:`distort` for one lens, by Newton's method to rounding.

    Args:
        points: ``(..., N, 2)`` normalised points of the distorted image.
        coefficients: ``(5,)``.

    Returns:
        ``(..., N, 2)``; NaN where no point inside the valid radius maps there.
    """
    k1, k2, p1, p2, k3 = coefficients.unbind(-1)
    estimate = points
    for _ in range(_NEWTON_STEPS):
        residual = distort(estimate, coefficients) - points
        x, y = estimate.unbind(-1)
        squared = x * x + y * y
        radial = 1 + squared * (k1 + squared * (k2 + squared * k3))
        slope = 2 * (k1 + squared * (2 * k2 + squared * 3 * k3))
        dxx = radial + slope * x * x + 2 * p1 * y + 6 * p2 * x
        dxy = slope * x * y + 2 * p1 * x + 2 * p2 * y
        dyy = radial + slope * y * y + 6 * p1 * y + 2 * p2 * x
        determinant = dxx * dyy - dxy * dxy
        step = torch.stack(
            [dyy * residual[..., 0] - dxy * residual[..., 1], dxx * residual[..., 1] - dxy * residual[..., 0]], dim=-1
        )
        step = step / determinant[..., None]
        estimate = estimate - step
        if not (step.abs() > torch.finfo(points.dtype).eps).any():
            break
    size = torch.linalg.vector_norm(points, dim=-1)
    error = torch.linalg.vector_norm(distort(estimate, coefficients) - points, dim=-1)
    exact = error <= _TOLERANCE_EPS * torch.finfo(points.dtype).eps * (1 + size)
    inside = torch.linalg.vector_norm(estimate, dim=-1) <= valid_radius(coefficients)
    return torch.where((exact & inside)[..., None], estimate, torch.nan)


def valid_radius(coefficients: Tensor | np.ndarray) -> float:
    """The normalised radius up to which the radial map r (1 + k1 r^2 + k2 r^4 + k3 r^6) is increasing.

    Args:
        coefficients: ``(5,)`` of one lens; the tangential ones do not matter.

    Returns:
        The smallest radius at which the map turns back; infinity if it never does.
    """
    k1, k2, _, _, k3 = np.asarray(coefficients, np.float64).tolist()
    slope = np.polynomial.Polynomial([1.0, 3 * k1, 5 * k2, 7 * k3])  # of the squared radius
    roots = slope.trim().roots()
    turning = np.sort(roots[(np.abs(roots.imag) <= 1e-9 * np.abs(roots.real)) & (roots.real > 0)].real)
    for index, root in enumerate(turning):
        beyond = turning[index + 1] if index + 1 < len(turning) else 2 * root
        if slope((root + beyond) / 2) < 0:  # a double root only touches zero: the map goes on rising
            return math.sqrt(root)
    return math.inf


__all__ = ["distort", "undistort", "valid_radius"]
