"""Texture of the procedural head, painted over its neutral shape: every texel asks where it lies on the head.

Patterns are functions of the position in space and so have no seams and look alike at every texture size.
"""

from __future__ import annotations

import numpy as np

from lipflow.render.unwrap import Unwrapper
from lipflow.types import Topology
from pipeline.dome.head import EYE_CENTRE, HeadGrid, bump, smoothstep

_SKIN = np.array([206.0, 156.0, 130.0])
_BLOOD = np.array([182.0, 92.0, 82.0])
_LIP = np.array([176.0, 88.0, 84.0])
_HAIR = np.array([52.0, 38.0, 30.0])
_SCLERA = np.array([226.0, 220.0, 214.0])
_IRIS = np.array([84.0, 124.0, 140.0])
_TOOTH = np.array([226.0, 216.0, 196.0])
_TONGUE = np.array([120.0, 52.0, 52.0])


def paint_texture(topology: Topology, head: HeadGrid, texture_size: int, seed: int) -> np.ndarray:
    """``(T, T, 3)`` uint8 albedo, row 0 is v = 0; the empty atlas is skin-coloured."""
    atlas = _Texels(topology, head, texture_size)
    x, y, z = atlas.position
    noise = _ValueNoise(seed)
    skin = _skin(x, y, z, atlas, noise)
    colour = _hair(skin, x, y, z, noise)
    colour = _mix(colour, _mouth_inside(atlas, noise), atlas.web(0))
    for index, sign in ((1, 1.0), (2, -1.0)):
        colour = _mix(colour, _eye(x, y, z, sign, atlas, noise), atlas.web(index))
    image = np.zeros((texture_size, texture_size, 3))
    image[atlas.covered] = colour
    image[~atlas.covered] = _SKIN
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def paint_weight_mask(topology: Topology, head: HeadGrid, texture_size: int) -> np.ndarray:
    """``(T, T)`` float32 loss weights: 1 on skin, up to 4 on eyes and 5 on the mouth, 0 in the empty atlas and 0.3
    on the back of the head."""
    atlas = _Texels(topology, head, texture_size)
    x, y, z = atlas.position
    side = np.abs(x)
    weight = 1.0 + 3.0 * bump(side, y, (32.0, 25.0), (17.0, 11.0)) + 4.0 * bump(x, y, (0.0, -52.0), (28.0, 15.0))
    weight = np.where(z > 0, weight, 1.0) * (0.3 + 0.7 * smoothstep(-80.0, -40.0, z))
    mask = np.zeros((texture_size, texture_size), np.float32)
    mask[atlas.covered] = weight
    return mask


class _Texels:
    """What the covered texels of the atlas know: position and slit of the neutral head."""

    def __init__(self, topology: Topology, head: HeadGrid, texture_size: int):
        unwrapper = Unwrapper(topology, texture_size)
        self.covered = unwrapper.covered.numpy()
        corners = topology.faces[unwrapper.triangle_id.numpy()[self.covered]]
        weights = unwrapper.barycentric.numpy()[self.covered].astype(np.float64)
        self.position = (weights[..., None] * head.neutral[corners]).sum(axis=1).T
        self.base = (weights[..., None] * head.base[corners]).sum(axis=1).T
        self.level = (weights * head.level[corners]).sum(axis=1)
        triangles = unwrapper.triangle_id.numpy()[self.covered]
        self._web = {
            index: np.isin(triangles, head.webs[name]).astype(np.float64)
            for index, name in enumerate(("mouth", "eye_left", "eye_right"))
        }

    def web(self, index: int) -> np.ndarray:
        """1 on the texels of a slit's web, else 0."""
        return self._web[index]


class _ValueNoise:
    """Smooth pseudo-random fields over space: hashed lattice values, trilinearly blended."""

    def __init__(self, seed: int):
        self.table = np.random.default_rng([seed, 7]).random(4096)

    def __call__(self, x: np.ndarray, y: np.ndarray, z: np.ndarray, scale_mm: float) -> np.ndarray:
        """Values in 0..1 with features of about ``scale_mm``."""
        points = np.stack([x, y, z], axis=-1) / scale_mm + 1000.0
        cell = np.floor(points).astype(np.int64)
        t = points - cell
        t = t * t * (3.0 - 2.0 * t)
        total = np.zeros(x.shape)
        for corner in np.ndindex(2, 2, 2):
            offset = cell + np.array(corner)
            mixed = (offset[..., 0] * 73856093) ^ (offset[..., 1] * 19349663) ^ (offset[..., 2] * 83492791)
            weight = np.prod(np.where(np.array(corner) == 1, t, 1.0 - t), axis=-1)
            total += weight * self.table[(mixed ^ (mixed >> 13)) % len(self.table)]
        return total


def _mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return first + (second - first) * np.clip(weight, 0.0, 1.0)[:, None]


def _skin(x: np.ndarray, y: np.ndarray, z: np.ndarray, atlas: _Texels, noise: _ValueNoise) -> np.ndarray:
    side = np.abs(x)
    front = smoothstep(-20.0, 15.0, z)
    mottle = 0.5 * noise(x, y, z, 14.0) + 0.3 * noise(x, y, z, 5.0) + 0.2 * noise(x, y, z, 2.0)
    colour = _SKIN * (0.90 + 0.2 * mottle)[:, None]
    blood = front * (
        0.26 * bump(side, y, (40.0, -16.0), (17.0, 14.0))
        + 0.30 * bump(x, y, (0.0, -9.0), (13.0, 9.0))
        + 0.16 * bump(x, y, (0.0, -98.0), (16.0, 12.0))
        + 0.18 * bump(side, y, (32.0, 14.0), (15.0, 6.0))
        + 0.14 * bump(side, y, (30.0, 36.0), (16.0, 5.0))
    )
    upward, forward = (y - 6.0) / 31.0, (z + 46.0) / 19.0
    on_ear = smoothstep(79.0, 83.0, side) * smoothstep(1.25, 1.0, np.hypot(upward, forward))
    colour = _mix(colour, _BLOOD, (blood + 0.25 * on_ear) * (0.55 + 0.9 * noise(x, y, z, 7.0)))
    hollow = np.exp(-(((forward - 0.1) / 0.33) ** 2) - ((upward + 0.12) / 0.3) ** 2)
    groove = np.exp(-(((np.hypot(forward + 0.05, upward - 0.05) - 0.56) / 0.12) ** 2)) * (upward > -0.35)
    ear_shade = np.maximum(0.75 * hollow, 0.5 * groove) * (side > 70) * smoothstep(1.1, 0.9, np.hypot(upward, forward))
    colour = _mix(colour, np.array([112.0, 62.0, 52.0]), ear_shade)
    stubble = front * smoothstep(-28.0, -42.0, y) * smoothstep(-150.0, -112.0, y) * smoothstep(72.0, 55.0, side)
    beardless = bump(side, y, (42.0, -32.0), (18.0, 22.0))
    stubble = stubble * (1.0 - 0.8 * beardless) * (0.55 + 0.5 * (noise(x, y, z, 1.3) > 0.55))
    colour = _mix(colour, np.array([122.0, 98.0, 92.0]), 0.34 * stubble)
    freckles = smoothstep(0.72, 0.86, noise(x, y, z, 2.6)) * front
    freckles = freckles * (bump(side, y, (26.0, -4.0), (26.0, 14.0)) + 0.25 * smoothstep(30.0, 60.0, y))
    colour = _mix(colour, np.array([150.0, 98.0, 74.0]), 0.55 * freckles)
    for mole_x, mole_y, radius in ((33.0, -36.0, 1.7), (-47.0, 4.0, 1.3), (-14.0, 66.0, 1.2)):
        spot = np.exp(-((((x - mole_x) ** 2 + (y - mole_y) ** 2) / radius**2) ** 2)) * front
        colour = _mix(colour, np.array([92.0, 56.0, 44.0]), 0.85 * spot)
    colour = colour * (1.0 - 0.10 * (noise(x, y, z, 0.9) - 0.5))[:, None]
    colour = _lips(colour, x, y, z, atlas, noise)
    nostril = bump(side, y, (6.5, -19.6), (3.6, 2.0)) * front
    colour = _mix(colour, np.array([48.0, 22.0, 20.0]), 1.2 * nostril)
    return _around_eyes(colour, side, y, atlas, front)


def _lips(
    colour: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray, atlas: _Texels, noise: _ValueNoise
) -> np.ndarray:
    base_y = atlas.base[1]
    side = np.abs(x)
    across = np.sqrt(np.clip(1.0 - (side / 26.5) ** 2, 0.0, 1.0))
    bow = 1.4 * bump(side, 0 * y, (5.0, 0.0), (4.5, 1.0)) - 1.2 * bump(x, 0 * y, (0.0, 0.0), (2.8, 1.0))
    top, bottom = -52.0 + (7.0 + bow) * across, -52.0 - 9.6 * across
    edge = 1.1
    inside = smoothstep(-edge, edge, top - base_y) * smoothstep(-edge, edge, base_y - bottom)
    inside = inside * smoothstep(27.0, 23.5, side) * (z > 0)
    creases = 0.88 + 0.24 * noise(x * 3.0, y * 0.5, z * 0.5, 2.2)
    lip = _LIP * creases[:, None] * np.where(base_y > -52.0, 0.92, 1.05)[:, None]
    line = np.exp(-(((base_y + 52.0) / 1.5) ** 2)) * smoothstep(29.0, 24.0, side) * (z > 0)
    return _mix(_mix(colour, lip, 0.85 * inside), np.array([96.0, 40.0, 40.0]), 0.6 * line)


def _around_eyes(colour: np.ndarray, side: np.ndarray, y: np.ndarray, atlas: _Texels, front: np.ndarray) -> np.ndarray:
    base_x, base_y, _ = atlas.base
    across = smoothstep(14.0, 18.0, np.abs(base_x)) * smoothstep(50.0, 45.0, np.abs(base_x))
    lash = across * front * np.where(base_y >= 24.0, smoothstep(27.0, 25.3, base_y), smoothstep(22.6, 24.0, base_y))
    colour = _mix(colour, np.array([46.0, 30.0, 26.0]), np.where(base_y >= 24.0, 0.85, 0.35) * lash)
    crease = across * front * np.exp(-(((base_y - 30.3) / 1.1) ** 2))
    colour = _mix(colour, np.array([146.0, 92.0, 78.0]), 0.45 * crease)
    bags = bump(side, y, (30.0, 12.0), (13.0, 3.5)) * front
    return _mix(colour, np.array([150.0, 104.0, 98.0]), 0.35 * bags)


def _hair(colour: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray, noise: _ValueNoise) -> np.ndarray:
    side = np.abs(x)
    strands = noise(x * 2.0, y * 0.5, z * 0.5, 2.4)
    ragged = noise(x, y, z, 6.0) - 0.5
    front_line = 86.0 + 4.0 * np.cos(side / 11.0) + 6.0 * ragged
    # The line drops at the temple, runs before the ear as a sideburn, round it, and down to the nape.
    temple = 58.0 + 4.0 * np.sin(y / 9.0) + 6.0 * ragged
    behind = smoothstep(-4.0, 4.0, side - temple) * smoothstep(8.0, -4.0, z + 5.0 * ragged)
    sideburn = smoothstep(-8.0, 34.0, y) * smoothstep(-29.0, -20.0, z) * smoothstep(-2.0, -14.0, z)
    rear = z + 9.0 * ragged
    nape = smoothstep(-64.0, -76.0, rear) * smoothstep(-72.0, -56.0, y + 8.0 * ragged)
    above_ear = smoothstep(38.0, 50.0, y) + smoothstep(-64.0, -76.0, rear) * smoothstep(-46.0, -30.0, y)
    lower = behind * np.clip(0.9 * sideburn + above_ear + nape, 0.0, 1.0)
    cap = np.maximum(smoothstep(-4.0, 4.0, y - front_line), np.maximum(lower, nape))
    hair = _HAIR * (0.62 + 0.85 * strands)[:, None]
    colour = _mix(colour, hair, cap * (0.86 + 0.14 * strands))
    arch = 44.5 + 3.4 * np.sin(np.clip((side - 11.0) / 36.0, 0.0, 1.0) * np.pi * 0.8)
    arch = arch - 3.0 * smoothstep(38.0, 50.0, side)
    thickness = 3.6 - 2.0 * smoothstep(26.0, 50.0, side)
    ends = smoothstep(8.0, 13.0, side) * smoothstep(52.0, 46.0, side)
    brow = np.exp(-(np.abs((y - arch) / thickness) ** 3)) * ends
    fibres = 0.62 + 0.5 * noise(x * 1.6 + y, y * 1.6 - side, z, 1.6)
    return _mix(colour, _HAIR * 0.95, 0.9 * brow * fibres * (z > 0))


def _eye(x: np.ndarray, y: np.ndarray, z: np.ndarray, sign: float, atlas: _Texels, noise: _ValueNoise) -> np.ndarray:
    dx, dy = x - sign * EYE_CENTRE[0], y - EYE_CENTRE[1] - 0.9
    radius, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
    rays = noise(np.cos(angle) * 30, np.sin(angle) * 30, radius * 2.0, 4.0)
    white = _SCLERA * (1.0 - 0.012 * np.clip(np.abs(dx) - 4.0, 0.0, None) ** 1.5)[:, None]
    white = _mix(white, _BLOOD, 0.5 * smoothstep(8.5, 13.5, np.abs(dx)) + 0.1 * noise(x, y, z, 1.5))
    iris = _IRIS * (0.55 + 0.7 * rays + 0.25 * smoothstep(5.5, 2.5, radius))[:, None]
    iris = _mix(iris, np.array([26.0, 34.0, 40.0]), 0.9 * smoothstep(4.9, 5.9, radius))
    colour = _mix(white, iris, smoothstep(6.1, 5.5, radius))
    colour = _mix(colour, np.array([10.0, 9.0, 10.0]), smoothstep(2.7, 2.2, radius))
    glint = np.exp(-(((dx + 2.0) ** 2 + (dy - 2.2) ** 2) / 1.1))
    shade = 1.0 - 0.45 * smoothstep(0.72, 1.0, atlas.level)
    return _mix(colour * shade[:, None], np.array([250.0, 250.0, 250.0]), 0.9 * glint)


def _mouth_inside(atlas: _Texels, noise: _ValueNoise) -> np.ndarray:
    x = atlas.position[0]
    level = atlas.level
    dark = np.array([44.0, 16.0, 16.0])
    colour = np.broadcast_to(dark, (len(x), 3))
    tongue = smoothstep(0.12, 0.2, level) * smoothstep(0.46, 0.34, level) * smoothstep(20.0, 12.0, np.abs(x))
    colour = _mix(colour, _TONGUE * (0.8 + 0.4 * noise(x, 20 * level, 0 * x, 2.0))[:, None], 0.85 * tongue)
    inner_lip = np.maximum(smoothstep(0.12, 0.0, level), smoothstep(0.9, 1.0, level))
    colour = _mix(colour, _LIP * 0.7, inner_lip)
    tooth_width = np.where(np.abs(x) < 8.0, 8.0, 6.6)
    gap = np.abs(((np.abs(x) + np.where(np.abs(x) < 8.0, 0.0, -8.0)) / tooth_width) % 1.0 - 0.5) * 2.0
    teeth = smoothstep(0.63, 0.67, level) * smoothstep(0.88, 0.84, level) * smoothstep(24.0, 18.0, np.abs(x))
    shade = 1.0 - 0.35 * smoothstep(0.86, 1.0, gap)
    shade = shade * (1.0 - 0.5 * smoothstep(6.0, 22.0, np.abs(x)))
    return _mix(colour, _TOOTH * shade[:, None], teeth)
