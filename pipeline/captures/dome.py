"""A synthetic dome capture in the Multiface layout, so that it goes through the same reader as real data.

:func:`plan_dome` names what will be written; :func:`write_dome_static`, :func:`write_dome_segment` (one call a
segment, in any order and in parallel) and :func:`finish_dome` write it. Every byte is a function of the config
alone. ``frame_list.txt`` is written last: without it, no reader takes the folder for a capture.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.captures.face import FaceAsset
from pipeline.captures.krt import format_krt
from pipeline.captures.motion import segment_names
from pipeline.captures.multiface import TEXTURE_FOLDER, WEIGHT_MASK_UNIT
from pipeline.captures.obj import ObjMesh, format_obj
from pipeline.captures.scene import DomeConfig, DomeFrame, dome_scene, synthesise_frame

__all__ = [
    "DomeConfig",
    "DomePlan",
    "finish_dome",
    "plan_dome",
    "write_dome",
    "write_dome_segment",
    "write_dome_static",
]

_STATISTICS_FOLDER = "driving/statistics"


@dataclass(frozen=True)
class DomePlan:
    """The segments of a dome and their frame stems, in writing order."""

    segments: dict[str, tuple[str, ...]]

    @property
    def frames(self) -> int:
        """Number of frames."""
        return sum(len(frames) for frames in self.segments.values())


def plan_dome(config: DomeConfig) -> DomePlan:
    """The segments and frames that the config describes; touches nothing."""
    frames = tuple(f"{index:06d}" for index in range(config.frames_per_segment))
    return DomePlan(dict.fromkeys(segment_names(config.segments), frames))


def write_dome_static(config: DomeConfig, out_uri: str) -> None:
    """Write what all frames share: calibration, and the ``driving/`` metadata."""
    scene = dome_scene(config)
    headset = [
        {
            "camera_id": camera.camera_id,
            "intrinsics": camera.intrinsics.tolist(),
            "cam_from_head": camera.cam_from_world.tolist(),
            "image_size_hw": list(camera.image_size_hw),
        }
        for camera in scene.headset
    ]
    mask = np.clip(np.rint(scene.face.topology.weight_mask * WEIGHT_MASK_UNIT), 0, 255).astype(np.uint8)
    documents = {
        "driving/headset.json": headset,
        "driving/landmarks.json": dict(scene.face.topology.landmarks),
        "driving/frontal.json": {"camera_id": scene.frontal_camera_id},
    }
    storage.write_bytes(storage.join(out_uri, "KRT"), format_krt(scene.cameras).encode())
    storage.write_bytes(storage.join(out_uri, "driving/weight_mask.png"), _png(mask[::-1]))
    for name, document in documents.items():
        storage.write_bytes(storage.join(out_uri, name), json.dumps(document, indent=1).encode())


def write_dome_segment(config: DomeConfig, segment: str, out_uri: str) -> int:
    """Write the frames of one planned segment, and its share of the statistics; returns the number of views."""
    scene = dome_scene(config)
    frames = plan_dome(config).segments[segment]
    sums = _StatisticSums.zero(config.texture_size, scene.face.topology.num_vertices)
    views = 0
    for index, stem in enumerate(frames):
        frame = synthesise_frame(config, segment, index)
        sums.add(frame)
        mesh = storage.join(out_uri, "tracked_mesh", segment, stem)
        storage.write_bytes(f"{mesh}.bin", frame.vertices.astype("<f4").tobytes())
        storage.write_bytes(f"{mesh}_transform.txt", _text_matrix(frame.world_from_head))
        if index == 0:
            storage.write_bytes(f"{mesh}.obj", _obj(scene.face, frame.vertices))
        texture = storage.join(out_uri, TEXTURE_FOLDER, segment, "average", f"{stem}.png")
        storage.write_bytes(texture, _png(frame.average_texture[::-1]))
        keypoints = io.BytesIO()
        np.save(keypoints, frame.keypoints, allow_pickle=False)
        storage.write_bytes(storage.join(out_uri, "driving/keypoints", segment, f"{stem}.npy"), keypoints.getvalue())
        folders = [("images", camera.camera_id) for camera in scene.cameras]
        folders += [("driving/headset", camera.camera_id) for camera in scene.headset]
        pictures = [*frame.images, *frame.headset_images]
        for (folder, camera_id), picture, missing in zip(folders, pictures, frame.missing, strict=True):
            if not missing:
                storage.write_bytes(storage.join(out_uri, folder, segment, camera_id, f"{stem}.png"), _png(picture))
                views += 1
    storage.write_bytes(storage.join(out_uri, _STATISTICS_FOLDER, f"{segment}.npz"), sums.to_bytes())
    return views


def finish_dome(config: DomeConfig, out_uri: str) -> None:
    """Add up the segments' statistics, write the capture's own, and the frame list last.

    The variances are means over frames, all texels and channels (or vertices and axes) of the squared distance to
    the mean, as one number each.

    Raises:
        StorageError: a segment's statistics are missing, because it was not written.
    """
    plan = plan_dome(config)
    scene = dome_scene(config)
    total = _StatisticSums.zero(config.texture_size, scene.face.topology.num_vertices)
    names = [storage.join(out_uri, _STATISTICS_FOLDER, f"{segment}.npz") for segment in plan.segments]
    for name in names:
        total.merge(storage.read_bytes(name))
    texture_mean, texture_var, vertices_mean, vertices_var = total.reduce()
    files = {
        "tex_mean.png": _png(texture_mean[::-1]),
        "tex_var.txt": f"{texture_var!r}\n".encode(),
        "vert_mean.bin": vertices_mean.astype("<f4").tobytes(),
        "vert_var.txt": f"{vertices_var!r}\n".encode(),
    }
    for file, body in files.items():
        storage.write_bytes(storage.join(out_uri, file), body)
    lines = [f"{segment} {stem}\n" for segment, stems in plan.segments.items() for stem in stems]
    storage.write_bytes(storage.join(out_uri, "frame_list.txt"), "".join(lines).encode())
    for name in names:
        storage.delete(name)


def write_dome(config: DomeConfig, out_uri: str) -> None:
    """Write the whole capture in this process."""
    write_dome_static(config, out_uri)
    for segment in plan_dome(config).segments:
        write_dome_segment(config, segment, out_uri)
    finish_dome(config, out_uri)


@dataclass
class _StatisticSums:
    """Exact sums over frames; adding them up in another order gives the same integers, and doubles for vertices."""

    frames: int
    texture: np.ndarray
    texture_squares: int
    vertices: np.ndarray
    vertices_squares: np.ndarray

    @classmethod
    def zero(cls, texture_size: int, vertices: int) -> _StatisticSums:
        return cls(
            0,
            np.zeros((texture_size, texture_size, 3), np.int64),
            0,
            np.zeros((vertices, 3)),
            np.zeros((vertices, 3)),
        )

    def add(self, frame: DomeFrame) -> None:
        texture, vertices = frame.average_texture.astype(np.int64), frame.vertices.astype(np.float64)
        self.frames += 1
        self.texture += texture
        self.texture_squares += int((texture**2).sum())
        self.vertices += vertices
        self.vertices_squares += vertices**2

    def to_bytes(self) -> bytes:
        stream = io.BytesIO()
        np.savez(
            stream,
            frames=np.asarray(self.frames),
            texture=self.texture,
            texture_squares=np.asarray(self.texture_squares),
            vertices=self.vertices,
            vertices_squares=self.vertices_squares,
        )
        return stream.getvalue()

    def merge(self, body: bytes) -> None:
        with np.load(io.BytesIO(body), allow_pickle=False) as part:
            self.frames += int(part["frames"])
            self.texture += part["texture"]
            self.texture_squares += int(part["texture_squares"])
            self.vertices += part["vertices"]
            self.vertices_squares += part["vertices_squares"]

    def reduce(self) -> tuple[np.ndarray, float, np.ndarray, float]:
        texture_mean, vertices_mean = self.texture / self.frames, self.vertices / self.frames
        texture_var = self.texture_squares / (self.frames * self.texture.size) - float((texture_mean**2).mean())
        vertices_var = float((self.vertices_squares / self.frames - vertices_mean**2).mean())
        return (texture_mean + 0.5).astype(np.uint8), max(texture_var, 1e-6), vertices_mean, max(vertices_var, 1e-6)


def _obj(face: FaceAsset, vertices: np.ndarray) -> bytes:
    topology = face.topology
    return format_obj(ObjMesh(vertices, topology.uvs, topology.faces, topology.uv_faces)).encode()


def _text_matrix(matrix: np.ndarray) -> bytes:
    return "".join(" ".join(repr(float(value)) for value in row) + "\n" for row in matrix).encode()


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()
