"""Blinn-Phong highlights over the texels of a skin, for one camera in one pass: no intermediate images are held.

With the unit vectors n (normal), e (towards the eye) and l (towards a light), and the half vector h between the last
two, ``n . h = (n . e + n . l) / |e + l|`` and ``|e + l|^2 = 2 + 2 e . l``.

All arithmetic is in float32 and without branches, so that the compiler can treat several texels at once.
"""

from __future__ import annotations

import numba
import numpy as np

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_LEAST_SQUARE = np.float32(1e-3)
# Below it nothing of a highlight is left (0.3 ** 16 = 4e-9), and higher powers would be subnormal numbers, which take
# many times as long.
_LEAST_HALF = np.float32(0.3)
_FRESNEL_FRONT, _FRESNEL_RISE = np.float32(0.75), np.float32(0.25)
_SKIN_SHARE, _WET_SHARE = np.float32(0.7), np.float32(0.5)
_WHITE = np.float32(255)
# A view counts in an average by the squared cosine beyond this one, and by this share where it grazes.
_GRAZING_COSINE, _LEAST_SHARE = np.float32(0.15), np.float32(0.01)

Light = tuple[np.float32, np.float32, np.float32, np.float32]
"""The unit vector towards a light, and the strength of its highlight."""


@numba.njit(nogil=True, cache=True, error_model="numpy")
def interpolate(corners, weights, values, out):
    """``out[:, n] = sum_j weights[n, j] values[corners[n, j]]`` for ``corners (N, 3)`` and ``values (V, 3)``."""
    for texel in range(corners.shape[0]):
        for axis in range(3):
            total = _ZERO
            for corner in range(3):
                total += weights[texel, corner] * values[corners[texel, corner], axis]
            out[axis, texel] = total


@numba.njit(nogil=True, cache=True, error_model="numpy")
def highlights(position, normal, oil, wet, lights, eye, gloss, facing):
    """What shines on a skin, seen from one camera.

    Args:
        position: ``(3, N)`` float32 mm.
        normal: ``(3, N)`` float32 unit vectors.
        oil: ``(N,)`` float32 strength of the skin's highlights.
        wet: ``(N,)`` float32 strength of the highlights of eyes and mouth.
        lights: a tuple of :data:`Light`, in the frame of the positions.
        eye: the camera centre, a tuple of three float32, mm.
        gloss: output ``(N,)`` float32, what the highlights add to a colour, 0..255.
        facing: output ``(N,)`` float32 cosine between normal and camera.
    """
    for texel in range(gloss.shape[0]):
        x, y, z = eye[0] - position[0, texel], eye[1] - position[1, texel], eye[2] - position[2, texel]
        to_unit = _ONE / np.sqrt(max(x * x + y * y + z * z, _ONE))
        x, y, z = x * to_unit, y * to_unit, z * to_unit
        normal_x, normal_y, normal_z = normal[0, texel], normal[1, texel], normal[2, texel]
        cosine = normal_x * x + normal_y * y + normal_z * z
        skin_lobe, wet_lobe = _ZERO, _ZERO
        for light in lights:
            lit = normal_x * light[0] + normal_y * light[1] + normal_z * light[2]
            squared = _TWO + _TWO * (x * light[0] + y * light[1] + z * light[2])
            half = (cosine + lit) / np.sqrt(max(squared, _LEAST_SQUARE))
            lobe = min(max(half, _LEAST_HALF), _ONE)
            for _ in range(4):
                lobe = lobe * lobe
            lobe = lobe if lit > _ZERO else _ZERO
            skin_lobe += light[3] * lobe
            lobe = lobe * lobe
            wet_lobe += light[3] * (lobe * lobe)
        away = _ONE - min(max(cosine, _ZERO), _ONE)
        away = away * away
        fresnel = _FRESNEL_FRONT + _FRESNEL_RISE * (away * away)
        skin = oil[texel] * fresnel * (_SKIN_SHARE * skin_lobe + _WET_SHARE * wet_lobe)
        gloss[texel] = _WHITE * (skin + wet[texel] * wet_lobe)
        facing[texel] = cosine


@numba.njit(nogil=True, cache=True, error_model="numpy")
def add_view(base, gloss, facing, total, weight):
    """Add a view to an average: its colours to ``total (N, 3)``, weighted, and the weights to ``weight (N,)``."""
    for texel in range(gloss.shape[0]):
        share = max((facing[texel] - _GRAZING_COSINE) / (_ONE - _GRAZING_COSINE), _LEAST_SHARE)
        share = share * share
        for channel in range(3):
            total[texel, channel] += share * min(base[texel, channel] + gloss[texel], _WHITE)
        weight[texel] += share


@numba.njit(nogil=True, cache=True, error_model="numpy")
def fill_atlas(base, gloss, target, source, atlas):
    """Colours ``base (N, 3)`` with their highlights ``gloss (N,)`` into an atlas.

    Args:
        base: float32, 0..255.
        gloss: float32, 0..255.
        target: ``(M,)`` atlas texels to fill, row by row.
        source: ``(M,)`` which of the N texels each one shows.
        atlas: output ``(T * T, 3)`` float32, 0..255; other texels are left as they are.
    """
    for index in range(target.shape[0]):
        texel = source[index]
        for channel in range(3):
            atlas[target[index], channel] = min(base[texel, channel] + gloss[texel], _WHITE)
