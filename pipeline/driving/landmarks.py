"""The named landmarks that every face asset has, and their projections as a driving signal.

The vertices of the Multiface topology (that of Multiface and Ava-256) at the landmarks are our own annotation,
``multiface_landmarks.json``; with their places in the atlas, by which the topology is recognised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources

import numpy as np
import torch

from lipflow.errors import CaptureError
from lipflow.render.camera import compose, project
from lipflow.render.cpu import rasterize
from lipflow.render.unwrap import vertex_normals
from lipflow.types import Camera, Topology
from pipeline import storage

_EYE = ("eye_{}_inner", "eye_{}_upper", "eye_{}_outer", "eye_{}_lower")
_BROW = ("brow_{}_inner", "brow_{}_middle", "brow_{}_outer")
LANDMARK_NAMES: tuple[str, ...] = (
    *(name.format(side) for side in ("left", "right") for name in (*_EYE, *_BROW)),
    *("nose_bridge", "nose_tip", "nose_wing_left", "nose_wing_right"),
    *("lip_corner_left", "lip_corner_right", "lip_upper", "lip_lower"),
    *("lip_upper_left", "lip_upper_right", "lip_lower_left", "lip_lower_right", "chin"),
)
"""Left and right are the subject's own; the lip landmarks lie on the red of the lips."""

AXES_LANDMARKS = ("eye_left_outer", "eye_right_outer", "chin")
"""The three landmarks that tell where a face looks."""

_SAME_PLACE_UV = 0.002
"""The file's places are rounded to three digits: the true topology's are at most 0.0007 away."""
_OCCLUSION_TOLERANCE_MM = 4.0
_VISIBLE_COSINE = 0.1


def nearest_vertices(points: np.ndarray, vertices: np.ndarray, candidates: np.ndarray | None = None) -> np.ndarray:
    """Index of the vertex nearest to each of ``points (N, D)``, among ``candidates`` if given."""
    pool = np.arange(len(vertices)) if candidates is None else candidates
    distance = np.linalg.norm(vertices[pool][None] - np.asarray(points)[:, None], axis=-1)
    return pool[distance.argmin(axis=1)]


def multiface_landmarks(topology: Topology) -> dict[str, int] | None:
    """Name to vertex index of ``LANDMARK_NAMES`` if the topology is Multiface's; None if it is another."""
    document = json.loads(resources.files(__package__).joinpath("multiface_landmarks.json").read_text("utf-8"))
    if topology.num_vertices != document["num_vertices"]:
        return None
    found = {name: document["landmarks"][name] for name in LANDMARK_NAMES}
    vertices = {name: int(entry["vertex"]) for name, entry in found.items()}
    place_of_vertex = np.full((topology.num_vertices, 2), np.inf)
    place_of_vertex[topology.faces.ravel()] = topology.uvs[topology.uv_faces.ravel()]
    off = place_of_vertex[list(vertices.values())] - np.array([entry["uv"] for entry in found.values()])
    return vertices if np.linalg.norm(off, axis=1).max() <= _SAME_PLACE_UV else None


def read_landmarks(uri: str, topology: Topology, required: Sequence[str]) -> dict[str, int]:
    """Landmarks from a JSON document ``{"nose_tip": 226, ...}``; names beyond the required ones are kept.

    Raises:
        CaptureError: the file is missing or no such document, lacks a required name, or names a vertex that no face
            of the topology has.
    """
    try:
        document = json.loads(storage.read_text(uri))
    except storage.ObjectNotFoundError as error:
        raise CaptureError(f"{uri}: no such file; expected a JSON of landmark names and vertex indices") from error
    except ValueError as error:
        raise CaptureError(f"{uri}: not JSON ({error}); expected landmark names and vertex indices") from error
    if not isinstance(document, dict):
        raise CaptureError(f'{uri}: expected one object such as {{"nose_tip": 226}}, found {type(document).__name__}')
    missing = [name for name in required if name not in document]
    if missing:
        raise CaptureError(f"{uri}: {', '.join(missing)} missing; expected at least {', '.join(required)}")
    used = set(np.unique(topology.faces).tolist())
    for name, vertex in document.items():
        if type(vertex) is not int or vertex not in used:
            raise CaptureError(
                f"{uri}: {name} is {vertex!r}; expected the index of a vertex that the faces use, "
                f"of the {topology.num_vertices} of this topology"
            )
    return document


def face_axes(landmark_positions: Mapping[str, np.ndarray]) -> np.ndarray:
    """``(3, 3)`` head_from_face rotation: its columns are the face's left, up and out, in the head frame.

    Left runs between the outer corners of the eyes, out is the normal of their plane with the chin.

    Args:
        landmark_positions: name to ``(3,)`` mm; at least ``AXES_LANDMARKS``.
    """
    left, right, chin = (np.asarray(landmark_positions[name], np.float64) for name in AXES_LANDMARKS)
    out = np.cross(right - left, chin - left)
    out = out / np.linalg.norm(out)
    across = (left - right) / np.linalg.norm(left - right)
    return np.stack([across, np.cross(out, across), out], axis=1)


def frontal_camera_id(
    cameras: Sequence[Camera], landmarks: Mapping[str, int], vertices: np.ndarray, world_from_head: np.ndarray
) -> str:
    """The camera whose direction from the face is nearest to the face's normal.

    Args:
        cameras: to choose from.
        landmarks: name to vertex index; at least ``AXES_LANDMARKS``.
        vertices: ``(V, 3)`` mm, head frame.
        world_from_head: ``(3, 4)``.
    """
    spots = {name: np.asarray(vertices[landmarks[name]], np.float64) for name in AXES_LANDMARKS}
    middle, out = np.mean(list(spots.values()), axis=0), face_axes(spots)[:, 2]
    poses = np.stack([compose(camera.cam_from_world, world_from_head) for camera in cameras])
    centres = -(poses[:, :, :3].transpose(0, 2, 1) @ poses[:, :, 3:])[..., 0]
    directions = (centres - middle) / np.linalg.norm(centres - middle, axis=1, keepdims=True)
    return cameras[int(np.argmax(directions @ out))].camera_id


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
