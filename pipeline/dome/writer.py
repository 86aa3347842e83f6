"""A synthetic dome capture in the Multiface layout, so that it goes through the same reader as real data.

:func:`plan_dome` names what will be written; :func:`write_dome_static`, :func:`write_dome_run` (one call for each run
of frames, in any order and in parallel) and :func:`finish_dome` write it. Every byte is a function of the config
alone, and a run takes the memory of one picture, whatever the number of cameras and frames. ``frame_list.txt`` is
written last: without it, no reader takes the folder for a capture.
"""

from __future__ import annotations

import io
import json
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.captures.krt import format_krt
from pipeline.captures.multiface import TEXTURE_FOLDER, WEIGHT_MASK_UNIT
from pipeline.captures.obj import ObjMesh, format_obj
from pipeline.dome.face import FaceAsset
from pipeline.dome.motion import segment_names
from pipeline.dome.scene import DomeConfig, DomeScene, FrameShoot, dome_scene

__all__ = [
    "DomeConfig",
    "DomePlan",
    "FrameRun",
    "finish_dome",
    "pending_runs",
    "plan_dome",
    "write_dome",
    "write_dome_run",
    "write_dome_static",
]

_STATISTICS_FOLDER = "driving/statistics"
_PIXELS_PER_RUN = 300_000_000
"""About a minute or two of work."""
_MOST_FRAMES_PER_RUN = 16


@dataclass(frozen=True)
class FrameRun:
    """Successive frames of one segment, which are written by one call.

    Attributes:
        segment: its name.
        start: index of the first frame.
        stop: index after the last one.
    """

    segment: str
    start: int
    stop: int

    @property
    def statistics_file(self) -> str:
        """The name of the run's share of the statistics, which is the last thing that a run writes."""
        return f"{self.segment}-{self.start:06d}-{self.stop:06d}.npz"


@dataclass(frozen=True)
class DomePlan:
    """The segments of a dome and their frame stems, in writing order, and the runs that they are written in."""

    segments: dict[str, tuple[str, ...]]
    runs: tuple[FrameRun, ...]

    @property
    def frames(self) -> int:
        """Number of frames."""
        return sum(len(frames) for frames in self.segments.values())


def plan_dome(config: DomeConfig) -> DomePlan:
    """The segments, frames and runs that the config describes; touches nothing."""
    count = config.frames_per_segment
    pixels_per_frame = config.cameras * config.image_size_hw[0] * config.image_size_hw[1]
    length = max(1, min(_MOST_FRAMES_PER_RUN, _PIXELS_PER_RUN // pixels_per_frame))
    names = segment_names(config.segments)
    runs = (FrameRun(name, start, min(start + length, count)) for name in names for start in range(0, count, length))
    return DomePlan(dict.fromkeys(names, tuple(_stem(index) for index in range(count))), tuple(runs))


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
        for camera in scene.headset.cameras
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


def pending_runs(plan: DomePlan, out_uri: str) -> list[FrameRun]:
    """The runs that have not been written whole to ``out_uri`` yet; what is there must be of the same config."""
    try:
        finished = set(storage.listdir(storage.join(out_uri, _STATISTICS_FOLDER)))
    except storage.ObjectNotFoundError:
        finished = set()
    return [run for run in plan.runs if run.statistics_file not in finished]


def write_dome_run(config: DomeConfig, run: FrameRun, out_uri: str) -> int:
    """Write the frames of one planned run, and its share of the statistics last; returns the number of views."""
    scene = dome_scene(config)
    sums = _StatisticSums.zero(config.texture_size, scene.face.topology.num_vertices)
    views = 0
    for index in range(run.start, run.stop):
        shoot = FrameShoot(config, run.segment, index)
        views += _write_frame(shoot, run.segment, index, out_uri, sums, scene)
    storage.write_bytes(storage.join(out_uri, _STATISTICS_FOLDER, run.statistics_file), sums.to_bytes())
    return views


def _write_frame(
    shoot: FrameShoot, segment: str, index: int, out_uri: str, sums: _StatisticSums, scene: DomeScene
) -> int:
    """Write one frame, one picture at a time, and add it to ``sums``; returns the number of views."""
    stem = _stem(index)
    mesh = storage.join(out_uri, "tracked_mesh", segment, stem)
    storage.write_bytes(f"{mesh}.bin", shoot.vertices.astype("<f4").tobytes())
    storage.write_bytes(f"{mesh}_transform.txt", _text_matrix(shoot.world_from_head))
    if index == 0:
        storage.write_bytes(f"{mesh}.obj", _obj(scene.face, shoot.vertices))
    texture = shoot.average_texture()
    storage.write_bytes(storage.join(out_uri, TEXTURE_FOLDER, segment, "average", f"{stem}.png"), _png(texture[::-1]))
    sums.add(texture, shoot.vertices)
    keypoints = io.BytesIO()
    np.save(keypoints, shoot.keypoints(), allow_pickle=False)
    storage.write_bytes(storage.join(out_uri, "driving/keypoints", segment, f"{stem}.npy"), keypoints.getvalue())
    lost_dome, lost_headset = np.split(shoot.missing, [len(scene.cameras)])
    for position, camera in enumerate(scene.cameras):
        if not lost_dome[position]:
            image = storage.join(out_uri, "images", segment, camera.camera_id, f"{stem}.png")
            storage.write_bytes(image, _png(shoot.image(position)))
    for camera, picture, lost in zip(scene.headset.cameras, shoot.headset_images(), lost_headset, strict=True):
        if not lost:
            image = storage.join(out_uri, "driving/headset", segment, camera.camera_id, f"{stem}.png")
            storage.write_bytes(image, _png(picture))
    return int((~shoot.missing).sum())


def finish_dome(config: DomeConfig, out_uri: str) -> None:
    """Add up the runs' statistics, write the capture's own, and the frame list last.

    The variances are means over frames, all texels and channels (or vertices and axes) of the squared distance to
    the mean, as one number each.

    Raises:
        StorageError: a run's statistics are missing, because it was not written.
    """
    plan = plan_dome(config)
    scene = dome_scene(config)
    total = _StatisticSums.zero(config.texture_size, scene.face.topology.num_vertices)
    for run in plan.runs:
        total.merge(storage.read_bytes(storage.join(out_uri, _STATISTICS_FOLDER, run.statistics_file)))
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
    storage.delete_dir(storage.join(out_uri, _STATISTICS_FOLDER))


def write_dome(config: DomeConfig, out_uri: str) -> None:
    """Write the whole capture in this process."""
    write_dome_static(config, out_uri)
    for run in plan_dome(config).runs:
        write_dome_run(config, run, out_uri)
    finish_dome(config, out_uri)


@dataclass
class _StatisticSums:
    """Sums over frames: exact integers for textures, doubles for vertices. Runs are merged in the plan's order."""

    frames: int
    texture: np.ndarray
    texture_squares: int
    vertices: np.ndarray
    vertices_squares: np.ndarray

    @classmethod
    def zero(cls, texture_size: int, vertices: int) -> _StatisticSums:
        return cls(
            0,
            np.zeros((texture_size, texture_size, 3), np.uint32),
            0,
            np.zeros((vertices, 3)),
            np.zeros((vertices, 3)),
        )

    def add(self, average_texture: np.ndarray, vertices: np.ndarray) -> None:
        self.frames += 1
        self.texture += average_texture
        self.texture_squares += int(np.square(average_texture, dtype=np.uint32).sum(dtype=np.uint64))
        self.vertices += vertices
        self.vertices_squares += np.square(vertices, dtype=np.float64)

    def to_bytes(self) -> bytes:
        stream = io.BytesIO()
        np.savez(
            stream,
            frames=np.asarray(self.frames),
            # The sums of a run fit two bytes a value.
            texture=self.texture.astype(np.min_scalar_type(int(self.texture.max()))),
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


def _stem(index: int) -> str:
    return f"{index:06d}"


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    # Run lengths and Huffman codes alone: sensor noise has no longer matches to look for.
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return stream.getvalue()
