"""Where the cameras of a dome stand: on a spherical arc in front of the head, or as a KRT file says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from lipflow.errors import CaptureError
from lipflow.render.camera import look_at
from lipflow.types import Camera
from pipeline.capture import require_pinhole
from pipeline.captures.krt import parse_krt

HEAD_DISTANCE_MM = 1025.0
"""From the world's origin to the head in generated rigs; like Multiface, the world is a frontal camera's frame."""

_KRT_IMAGE_SIZE_HW = (2048, 1334)
_GOLDEN_ANGLE = np.pi * (3.0 - 5.0**0.5)
# The head and a margin: height over focal length that an image spans at the head's distance.
_SPAN_MM = 375.0


def upright_head(position: np.ndarray) -> np.ndarray:
    """``(3, 4)`` world_from_head of a head that faces the camera at the world's origin (y down, z away)."""
    return np.concatenate([np.diag([1.0, -1.0, -1.0]), np.asarray(position, np.float64)[:, None]], axis=1)


def arc_rig(count: int, image_size_hw: tuple[int, int], seed: int) -> tuple[tuple[Camera, ...], np.ndarray]:
    """A Multiface-like rig about a metre from the head: front and sides, some from above and below.

    Args:
        count: number of cameras; the first is the frontal one.
        image_size_hw: (height, width), pixels.
        seed: of the placement's irregularities.

    Returns:
        The cameras and the mean head pose ``world_from_head (3, 4)``.
    """
    generator = np.random.default_rng([seed, 21])
    world_from_head = upright_head(np.array([0.0, 0.0, HEAD_DISTANCE_MM]))
    height, width = image_size_hw
    cameras = []
    for index in range(count):
        # A sunflower over the unit disc, stretched to the field of directions: even, and densest nowhere.
        radius, angle = np.sqrt(index / max(count - 1, 1)), index * _GOLDEN_ANGLE
        azimuth = np.radians(88.0) * radius * np.cos(angle)
        elevation = np.radians(38.0) * radius * np.sin(angle) + np.radians(6.0) * radius
        distance = HEAD_DISTANCE_MM * generator.uniform(0.95, 1.06)
        direction = [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]
        target = np.array([0.0, -20.0, -20.0]) + generator.normal(0.0, 4.0, 3)
        roll = generator.normal(0.0, np.radians(2.0))
        cam_from_head = look_at(target + distance * np.array(direction), target, (np.sin(roll), np.cos(roll), 0.0))
        focal = min(height, width * 1.3) / _SPAN_MM * HEAD_DISTANCE_MM * generator.uniform(0.98, 1.02)
        centre = np.array([width, height]) / 2 + generator.normal(0.0, 0.01, 2) * height
        intrinsics = np.array([[focal, 0.0, centre[0]], [0.0, focal, centre[1]], [0.0, 0.0, 1.0]])
        rotation = cam_from_head[:, :3] @ world_from_head[:, :3].T
        translation = cam_from_head[:, 3] - rotation @ world_from_head[:, 3]
        pose = np.concatenate([rotation, translation[:, None]], axis=1)
        cameras.append(Camera(str(400001 + index), intrinsics, pose, (height, width)))
    return tuple(cameras), world_from_head


def krt_rig(path: Path, image_size_hw: tuple[int, int]) -> tuple[tuple[Camera, ...], np.ndarray]:
    """The rig of a KRT file, its images scaled and centred to ``image_size_hw`` with square pixels.

    The head stands where ``photo_pose.npz`` beside the file says; without it, where the optical axes meet, upright.

    Raises:
        CaptureError: the file is missing or cannot be used, or a camera has distortion, which the renderer does
            not model.
    """
    if not path.is_file():
        raise CaptureError(f"{path}: no such KRT file; give the calibration of a rig, or leave it out for an arc")
    cameras = parse_krt(path.read_text(encoding="utf-8", errors="replace"), _KRT_IMAGE_SIZE_HW, str(path))
    require_pinhole(cameras, str(path))
    scale = min(image_size_hw[0] / _KRT_IMAGE_SIZE_HW[0], image_size_hw[1] / _KRT_IMAGE_SIZE_HW[1])
    margin = (np.array(image_size_hw) - scale * np.array(_KRT_IMAGE_SIZE_HW)) / 2
    to_image = np.array([[scale, 0.0, margin[1]], [0.0, scale, margin[0]], [0.0, 0.0, 1.0]])
    placed = tuple(
        replace(camera, intrinsics=to_image @ camera.intrinsics, image_size_hw=image_size_hw) for camera in cameras
    )
    pose_path = path.parent / "photo_pose.npz"
    if pose_path.exists():
        with np.load(pose_path, allow_pickle=False) as stored:
            return placed, stored["world_from_head"].astype(np.float64)
    return placed, upright_head(_axes_meet(cameras))


def _axes_meet(cameras: tuple[Camera, ...]) -> np.ndarray:
    """The point nearest to all optical axes, least squares."""
    normal, right = np.zeros((3, 3)), np.zeros(3)
    for camera in cameras:
        rotation, translation = camera.cam_from_world[:, :3], camera.cam_from_world[:, 3]
        across = np.eye(3) - np.outer(rotation[2], rotation[2])
        normal += across
        right += across @ (-rotation.T @ translation)
    return np.linalg.solve(normal, right)
