"""Five head-fixed monochrome cameras, near, wide and partial, as a headset carries them."""

from __future__ import annotations

import numpy as np

from lipflow.types import Camera
from pipeline.captures.face import FaceAsset
from pipeline.captures.rig import look_at

# Name, landmarks whose mean is looked at, offset of the camera from there (mm; x is mirrored on the right side).
_EYE = "eye_{}_inner", "eye_{}_outer", "eye_{}_upper", "eye_{}_lower"
_MOUNTS: tuple[tuple[str, tuple[str, ...], tuple[float, float, float], float], ...] = (
    ("left-eye", tuple(name.format("left") for name in _EYE), (24.0, -24.0, 46.0), 0.62),
    ("right-eye", tuple(name.format("right") for name in _EYE), (-24.0, -24.0, 46.0), 0.62),
    ("left-mouth", ("lip_corner_left", "lip_upper", "lip_lower"), (34.0, 14.0, 62.0), 0.62),
    ("right-mouth", ("lip_corner_right", "lip_upper", "lip_lower"), (-34.0, 14.0, 62.0), 0.62),
    ("cyclops", ("nose_bridge", "brow_left_inner", "brow_right_inner"), (0.0, 26.0, 62.0), 0.5),
)
_VIGNETTE = 0.35


def headset_cameras(face: FaceAsset, image_size_hw: tuple[int, int], seed: int) -> tuple[Camera, ...]:
    """The cameras; ``cam_from_world`` holds cam_from_head.

    Args:
        face: its landmarks place the cameras.
        image_size_hw: (height, width), pixels.
        seed: of the mounting tolerances (about a millimetre and a degree).
    """
    generator = np.random.default_rng([seed, 11])
    height, width = image_size_hw
    cameras = []
    for name, looked_at, offset, focal in _MOUNTS:
        target = face.neutral[[face.topology.landmarks[landmark] for landmark in looked_at]].mean(axis=0)
        target = target.astype(np.float64) + generator.normal(0.0, 1.0, 3)
        centre = target + np.array(offset) + generator.normal(0.0, 0.8, 3)
        intrinsics = np.array([[focal * width, 0, width / 2], [0, focal * width, height / 2], [0, 0, 1.0]])
        cameras.append(Camera(name, intrinsics, look_at(centre, target, up=(0.0, 1.0, 0.0)), (height, width)))
    return tuple(cameras)


def headset_exposure(
    images: np.ndarray, gains: np.ndarray, noise_std: float, generator: np.random.Generator
) -> np.ndarray:
    """What the headset's sensors make of rendered colours.

    Args:
        images: ``(C, h, w, 3)`` 0..255, 0 where nothing is seen.
        gains: ``(C,)``.
        noise_std: of the sensor noise, grey levels.
        generator: of the noise.

    Returns:
        ``(C, h, w)`` uint8.
    """
    # Near infrared: skin is bright and even, blood hardly shows.
    grey = images @ np.array([0.55, 0.35, 0.10], np.float32)
    height, width = grey.shape[1:]
    y = (np.arange(height) + 0.5) / height * 2 - 1
    x = (np.arange(width) + 0.5) / width * 2 - 1
    vignette = 1.0 - _VIGNETTE * 0.5 * (y[:, None] ** 2 + x[None] ** 2)
    exposed = grey * gains[:, None, None] * vignette + noise_std * generator.standard_normal(grey.shape)
    return np.clip(exposed + 0.5, 0, 255).astype(np.uint8)


def headset_gains(count: int, seed: int) -> np.ndarray:
    """Gain of every headset camera, within 15 %."""
    return np.random.default_rng([seed, 12]).uniform(0.85, 1.15, count)
