"""Five head-fixed monochrome cameras, near, wide and partial, as a headset carries them.

A rig is placed by landmarks, so that it fits any head frame. What its cameras see is dimmed by their lenses
(vignetting) and cut by the headset's own housing: the lens barrel above and beside the nose for the eye cameras, the
rim of the face-plate above the mouth, the two barrels below the cyclops. The housing is near and out of focus, so
its edges are soft, and it is dark, with a glint along the edge, not black.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lipflow.render.camera import look_at
from lipflow.types import Camera
from pipeline.driving.landmarks import AXES_LANDMARKS, face_axes


@dataclass(frozen=True)
class HeadsetRig:
    """The cameras of a headset and what stands in their way.

    Attributes:
        cameras: C cameras with images of one size; ``cam_from_world`` holds cam_from_head.
        gains: ``(C,)`` of their sensors.
        housing: ``(C, h, w)`` float32, the share of the light that passes the housing: 1 where the view is free.
    """

    cameras: tuple[Camera, ...]
    gains: np.ndarray
    housing: np.ndarray


@dataclass(frozen=True)
class _Barrel:
    """A round part of the housing: what lies inside the circle is hidden.

    Image coordinates run from -1 to 1 along either axis, x to the right, y down.
    """

    centre: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class _Mount:
    """Where a camera sits: what it looks at, and its offset from there along the face's left, up and out, mm."""

    camera_id: str
    looked_at: tuple[str, ...]
    offset_mm: tuple[float, float, float]
    focal: float
    barrels: tuple[_Barrel, ...]


def _eye(side: str, sign: float) -> _Mount:
    # The camera looks up from below the lens, whose rim hides the brow and the side of the nose.
    looked_at = tuple(f"eye_{side}_{part}" for part in ("inner", "outer", "upper", "lower"))
    barrel = _Barrel(centre=(-sign * 1.15, -1.75), radius=1.45)
    return _Mount(f"{side}-eye", looked_at, (sign * 24.0, -24.0, 46.0), 0.62, (barrel,))


def _mouth(side: str, sign: float) -> _Mount:
    # The face-plate ends above the lips; its rim is nearly straight, and falls towards the cheek.
    looked_at = (f"lip_corner_{side}", "lip_upper", "lip_lower")
    plate = _Barrel(centre=(sign * 0.9, -4.65), radius=4.0)
    return _Mount(f"{side}-mouth", looked_at, (sign * 34.0, 14.0, 62.0), 0.62, (plate,))


_BROWS = ("nose_bridge", "brow_left_inner", "brow_right_inner")
_BARRELS = (_Barrel(centre=(-0.95, 1.2), radius=0.85), _Barrel(centre=(0.95, 1.2), radius=0.85))
_MOUNTS = (
    _eye("left", 1.0),
    _eye("right", -1.0),
    _mouth("left", 1.0),
    _mouth("right", -1.0),
    _Mount("cyclops", _BROWS, (0.0, 26.0, 62.0), 0.5, _BARRELS),
)
HEADSET_CAMERA_IDS: tuple[str, ...] = tuple(mount.camera_id for mount in _MOUNTS)
HEADSET_LANDMARKS: tuple[str, ...] = tuple(sorted(set(AXES_LANDMARKS).union(*(mount.looked_at for mount in _MOUNTS))))
"""The landmarks without which a headset cannot be placed."""

_GAIN_RANGE = (0.85, 1.15)
_VIGNETTE = 0.35
_EDGE_WIDTH = 0.16
"""Of the housing's soft edge, in half image heights."""
_HOUSING_GREY, _GLINT_GREY = 7.0, 16.0


def headset_rig(landmark_positions: Mapping[str, np.ndarray], image_size_hw: tuple[int, int], seed: int) -> HeadsetRig:
    """A headset that sits on a head.

    Args:
        landmark_positions: name to ``(3,)`` mm in the head frame, on a neutral or mean head; at least
            ``HEADSET_LANDMARKS``.
        image_size_hw: (height, width), pixels.
        seed: of the mounting tolerances (about a millimetre and a degree), the sensors' gains and the housing.
    """
    generator = np.random.default_rng([seed, 11])
    head_from_face = face_axes(landmark_positions)
    height, width = image_size_hw
    cameras = []
    for mount in _MOUNTS:
        spots = np.stack([landmark_positions[name] for name in mount.looked_at]).astype(np.float64)
        target = spots.mean(axis=0) + head_from_face @ generator.normal(0.0, 1.0, 3)
        centre = target + head_from_face @ (np.array(mount.offset_mm) + generator.normal(0.0, 0.8, 3))
        focal = mount.focal * width
        intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
        up = head_from_face[:, 1]
        pose = look_at(centre, target, up=(float(up[0]), float(up[1]), float(up[2])))
        cameras.append(Camera(mount.camera_id, intrinsics, pose, (height, width)))
    gains = np.random.default_rng([seed, 12]).uniform(*_GAIN_RANGE, len(_MOUNTS))
    tolerances = np.random.default_rng([seed, 13])
    housing = np.stack([_transmission(mount.barrels, image_size_hw, tolerances) for mount in _MOUNTS])
    return HeadsetRig(tuple(cameras), gains, housing)


def headset_exposure(
    images: np.ndarray, rig: HeadsetRig, noise_std: float, generator: np.random.Generator
) -> np.ndarray:
    """What the headset's sensors make of rendered colours.

    Args:
        images: ``(C, h, w, 3)`` float32 0..255, 0 where nothing is seen.
        rig: the headset.
        noise_std: of the sensor noise, grey levels.
        generator: of the noise.

    Returns:
        ``(C, h, w)`` uint8.
    """
    # Near infrared: skin is bright and even, blood hardly shows.
    grey = images @ np.array([0.55, 0.35, 0.10], np.float32)
    y, x = _image_coordinates((grey.shape[1], grey.shape[2]))
    vignette = 1.0 - _VIGNETTE * 0.5 * (y**2 + x**2)
    hidden = 1.0 - rig.housing
    reflection = hidden * (_HOUSING_GREY + _GLINT_GREY * rig.housing)
    exposed = rig.gains[:, None, None] * vignette * (grey * rig.housing + reflection)
    exposed = exposed + noise_std * generator.standard_normal(grey.shape)
    return np.clip(exposed + 0.5, 0, 255).astype(np.uint8)


def _transmission(
    barrels: tuple[_Barrel, ...], image_size_hw: tuple[int, int], generator: np.random.Generator
) -> np.ndarray:
    """``(h, w)`` float32: the light that passes all barrels, each displaced by its mounting tolerance."""
    y, x = _image_coordinates(image_size_hw)
    passed = np.ones(image_size_hw)
    for barrel in barrels:
        across, down = np.array(barrel.centre) + generator.normal(0.0, 0.03, 2)
        outside = np.hypot(x - across, y - down) - barrel.radius
        t = np.clip(outside / _EDGE_WIDTH + 0.5, 0.0, 1.0)
        passed *= t * t * (3.0 - 2.0 * t)
    return passed.astype(np.float32)


def _image_coordinates(image_size_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """y ``(h, 1)`` and x ``(1, w)`` of the pixel centres, from -1 to 1."""
    height, width = image_size_hw
    return (np.arange(height)[:, None] + 0.5) / height * 2 - 1, (np.arange(width)[None] + 0.5) / width * 2 - 1
