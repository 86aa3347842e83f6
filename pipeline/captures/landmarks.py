"""The named landmarks that every face asset has, and their projections as a driving signal."""

from __future__ import annotations

import numpy as np
import torch

from lipflow.render.camera import compose, project
from lipflow.render.cpu import rasterize
from lipflow.render.unwrap import vertex_normals
from lipflow.types import Camera, Topology

_EYE = ("eye_{}_inner", "eye_{}_upper", "eye_{}_outer", "eye_{}_lower")
_BROW = ("brow_{}_inner", "brow_{}_middle", "brow_{}_outer")
LANDMARK_NAMES: tuple[str, ...] = (
    *(name.format(side) for side in ("left", "right") for name in (*_EYE, *_BROW)),
    *("nose_bridge", "nose_tip", "nose_wing_left", "nose_wing_right"),
    *("lip_corner_left", "lip_corner_right", "lip_upper", "lip_lower"),
    *("lip_upper_left", "lip_upper_right", "lip_lower_left", "lip_lower_right", "chin"),
)
"""Left and right are the subject's own; the lip landmarks lie on the red of the lips."""

_OCCLUSION_TOLERANCE_MM = 4.0
_VISIBLE_COSINE = 0.1


def nearest_vertices(points: np.ndarray, vertices: np.ndarray, candidates: np.ndarray | None = None) -> np.ndarray:
    """Index of the vertex nearest to each of ``points (N, D)``, among ``candidates`` if given."""
    pool = np.arange(len(vertices)) if candidates is None else candidates
    distance = np.linalg.norm(vertices[pool][None] - np.asarray(points)[:, None], axis=-1)
    return pool[distance.argmin(axis=1)]


def project_landmarks(
    topology: Topology, vertices: np.ndarray, camera: Camera, world_from_head: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where a camera sees the landmarks.

    Args:
        topology: faces and landmarks.
        vertices: ``(V, 3)`` mm, head frame.
        camera: the camera, K in pixels of its ``image_size_hw``.
        world_from_head: ``(3, 4)``.

    Returns:
        Pixels ``(L, 2)`` float64 and visibility ``(L,)`` in 0..1: 0 behind other surface, outside the image or
        turned away, and the cosine of the viewing angle mapped to 0..1 elsewhere.
    """
    cam_from_head = torch.from_numpy(compose(camera.cam_from_world, world_from_head))
    mesh = torch.from_numpy(np.asarray(vertices, np.float64))
    pixels, depth = project(mesh, torch.from_numpy(camera.intrinsics), cam_from_head)
    indices = np.fromiter(topology.landmarks.values(), dtype=np.int64)
    points = (mesh @ cam_from_head[:, :3].T + cam_from_head[:, 3]).numpy()
    _, surface = rasterize(points[None], topology.faces, camera.intrinsics[None], camera.image_size_hw)
    normals = (vertex_normals(mesh, torch.from_numpy(topology.faces)) @ cam_from_head[:, :3].T).numpy()[indices]
    toward_camera = -points[indices] / np.linalg.norm(points[indices], axis=-1, keepdims=True)
    cosine = (normals * toward_camera).sum(axis=-1)
    seen = np.zeros(len(indices))
    height, width = camera.image_size_hw
    for row, vertex in enumerate(indices):
        x, y = pixels[vertex].tolist()
        if depth[vertex] <= 0 or not (0 <= x < width and 0 <= y < height):
            continue
        # The farthest surface of the neighbourhood: on slopes the pixel's centre may lie in front of the landmark.
        window = surface[0, max(0, int(y) - 1) : int(y) + 2, max(0, int(x) - 1) : int(x) + 2]
        behind = window[np.isfinite(window)]
        hidden = len(behind) > 0 and depth[vertex].item() > behind.max() + _OCCLUSION_TOLERANCE_MM
        seen[row] = 0.0 if hidden else np.clip((cosine[row] - _VISIBLE_COSINE) / 0.4, 0.0, 1.0)
    return pixels.numpy()[indices], seen


def noisy_keypoints(
    pixels: np.ndarray, visibility: np.ndarray, noise_px: float, generator: np.random.Generator
) -> np.ndarray:
    """Keypoints ``(L, 3)`` float32 x_px, y_px, confidence as a detector would give them; (0, 0, 0) if not seen."""
    noisy = pixels + noise_px * generator.standard_normal(pixels.shape)
    keypoints = np.concatenate([noisy, visibility[:, None]], axis=1)
    return np.where(visibility[:, None] > 0, keypoints, 0.0).astype(np.float32)
