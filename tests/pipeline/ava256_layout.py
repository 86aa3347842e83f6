"""Writes the synthetic dome in the exact layout of the public Ava-256 release, for tests.

The layout is that of the release's data sheet and loader: AVIF in stored zips, PLY meshes, K and T transposed and K
for the full sensor, frame numbers that are unique over the capture, and an unpaired headset capture beside it.
AVIF of colour goes through YUV: at quality 100 and 4:4:4, pixels come back at most 3 grey levels off (measured over
noise and ramps); of grey it is lossless. Compare with the AVIF's own decode where equality is meant.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lipflow.types import Camera
from pipeline.captures.obj import ObjMesh, format_obj
from pipeline.dome.scene import DomeConfig, DomeFrame, dome_scene, synthesise_frame
from pipeline.dome.writer import plan_dome

SENSOR_SIZE_HW = (4096, 2668)
FIRST_FRAME, FRAME_STEP, FIRST_HEADSET_FRAME = 120, 3, 7001
HEADSET_ZIPS = {
    "cyclops": "cam-cyclop",
    "left-eye": "cam-left-eye-atl-temporal",
    "left-mouth": "cam-left-mouth",
    "right-eye": "cam-right-eye-atl-temporal",
    "right-mouth": "cam-right-mouth",
}
"""The dome's names of the headset cameras to those of Ava-256."""

LAYOUT_CONFIG = DomeConfig(
    cameras=3,
    image_size_hw=(128, 83),
    texture_size=32,
    segments=2,
    frames_per_segment=2,
    missing_fraction=0.0,
    headset_image_size_hw=(16, 20),
    supersampling=1,
)
"""A small capture whose images have the sensor's aspect; ``model_copy(update=...)`` for another."""


@dataclass(frozen=True)
class PlannedFrame:
    """One frame of the capture, and the dome's frame that it shows: ``synthesise_frame(config, segment, index)``."""

    segment: str
    index: int
    stem: str


def planned_frames(config: DomeConfig) -> list[PlannedFrame]:
    """The frames that :func:`write_ava256` lists, in writing order; stems are unique over the capture."""
    pairs = [(segment, index) for segment, stems in plan_dome(config).segments.items() for index in range(len(stems))]
    return [
        PlannedFrame(segment, index, f"{FIRST_FRAME + FRAME_STEP * number:06d}")
        for number, (segment, index) in enumerate(pairs)
    ]


def planned_headset_frames(config: DomeConfig) -> list[PlannedFrame]:
    """The frames of the headset capture: those of the first segment alone, under other numbers."""
    frames = [frame for frame in planned_frames(config) if frame.segment == planned_frames(config)[0].segment]
    return [
        PlannedFrame(frame.segment, frame.index, f"{FIRST_HEADSET_FRAME + number:06d}")
        for number, frame in enumerate(frames)
    ]


def write_ava256(
    folder: Path, config: DomeConfig, distortion: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
) -> None:
    """Write the dome of ``config`` to ``folder/decoder`` and ``folder/encoder``, and ``folder/face_topology.obj``.

    Args:
        folder: the capture; made where it is missing.
        config: ``image_size_hw`` must have the sensor's aspect, such as (128, 83). Views that the config loses
            are not in the zips.
        distortion: k1, k2, p1, p2 stated for every camera. The images are a pinhole's, whatever is stated.
    """
    frames = planned_frames(config)
    made = {frame: synthesise_frame(config, frame.segment, frame.index) for frame in frames}
    face, cameras = dome_scene(config).face, dome_scene(config).cameras
    mesh = ObjMesh(face.neutral.astype(np.float32), face.topology.uvs, face.topology.faces, face.topology.uv_faces)
    decoder = folder / "decoder"
    for name in ("head_pose", "image", "keypoints_3d", "kinematic_tracking", "segmentation_parts", "uv_image"):
        (decoder / name).mkdir(parents=True, exist_ok=True)
    (folder / "face_topology.obj").write_text(format_obj(mesh))
    (decoder / "camera_calibration.json").write_text(calibration_json(cameras, distortion))
    (decoder / "frame_list.csv").write_text(frame_list_csv(frames))
    write_zip(
        decoder / "head_pose/head_pose.zip",
        {f"{frame.stem}.txt": pose_text(shown.world_from_head) for frame, shown in made.items()},
    )
    write_zip(
        decoder / "keypoints_3d/keypoints_3d.zip",
        {f"{frame.stem}.npy": npy_bytes(keypoints_3d(config, frame)) for frame in frames},
    )
    write_zip(
        decoder / "kinematic_tracking/registration_vertices.zip",
        {f"{frame.stem}.ply": ply_bytes(shown.vertices) for frame, shown in made.items()},
    )
    write_zip(
        decoder / "uv_image/color.zip",
        {f"color/{frame.stem}.avif": avif_bytes(shown.average_texture[::-1]) for frame, shown in made.items()},
    )
    for number, camera in enumerate(cameras):
        name = f"cam{camera.camera_id}"
        seen = {frame: shown.images[number] for frame, shown in made.items() if not shown.missing[number]}
        images = {f"{name}/{frame.stem}.avif": avif_bytes(image) for frame, image in seen.items()}
        parts = {f"{name}/{frame.stem}.png": png_bytes(segmentation(image)) for frame, image in seen.items()}
        write_zip(decoder / f"image/{name}.zip", images)
        write_zip(decoder / f"segmentation_parts/{name}.zip", parts)
    _write_statistics(decoder, list(made.values()))
    _write_headset(folder / "encoder", config, {(frame.segment, frame.index): shown for frame, shown in made.items()})


def calibration_json(cameras: tuple[Camera, ...], distortion: tuple[float, float, float, float]) -> str:
    """``camera_calibration.json``: K for the full sensor and T, both transposed."""
    entries = []
    for camera in cameras:
        full = camera.resized(SENSOR_SIZE_HW)
        entries.append(
            {
                "cameraId": camera.camera_id,
                "projectionModel": "Pinhole",
                "distortionModel": "RadialAndTangential",
                "K": full.intrinsics.T.tolist(),
                "distortion": list(distortion),
                "T": np.vstack([camera.cam_from_world, [0.0, 0.0, 0.0, 1.0]]).T.tolist(),
            }
        )
    return json.dumps({"KRT": entries}, indent=1)


def frame_list_csv(frames: list[PlannedFrame]) -> str:
    """``frame_list.csv``."""
    return "seg_id,frame_id\n" + "".join(f"{frame.segment},{frame.stem}\n" for frame in frames)


def keypoints_3d(config: DomeConfig, frame: PlannedFrame) -> np.ndarray:
    """``(N, 6)`` float64: the landmarks in the world, numbered; every fifth is lost, another one in each frame."""
    shown, face = synthesise_frame(config, frame.segment, frame.index), dome_scene(config).face
    indices = np.fromiter(face.topology.landmarks.values(), np.int64)
    rotation, translation = shown.world_from_head[:, :3], shown.world_from_head[:, 3]
    world = shown.vertices[indices].astype(np.float64) @ rotation.T + translation
    ids = np.arange(len(indices))
    inliers = 3.0 + ids % 4
    rows = np.column_stack([ids, world, 0.9 * inliers, inliers])
    return rows[(ids + frame.index) % 5 != 0]


def segmentation(image: np.ndarray) -> np.ndarray:
    """``(H, W)`` uint8: body (2) where something is seen, else 0."""
    return np.where(image.max(axis=-1) > 24, 2, 0).astype(np.uint8)


def write_zip(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    """A zip whose bytes depend on its members alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, body in members.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = method
            archive.writestr(entry, body)


def read_zip(path: Path) -> dict[str, bytes]:
    """All members of a zip, by the standard library; to change one and :func:`write_zip` them again."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def avif_bytes(pixels: np.ndarray) -> bytes:
    """AVIF of ``(H, W[, 3])`` uint8 at the highest quality."""
    stream = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.save(stream, "AVIF", quality=100, subsampling="4:4:4", speed=10, max_threads=1)
    return stream.getvalue()


def png_bytes(pixels: np.ndarray) -> bytes:
    """PNG of ``(H, W[, 3])`` uint8."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    """An ``npy`` file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def ply_bytes(vertices: np.ndarray, *, text: bool = False) -> bytes:
    """A PLY of ``(V, 3)`` float32 without faces, as the release has them; little-endian, or text."""
    encoding = "ascii" if text else "binary_little_endian"
    properties = "".join(f"property float {axis}\n" for axis in "xyz")
    header = f"ply\nformat {encoding} 1.0\nelement vertex {len(vertices)}\n{properties}end_header\n"
    lines = "".join(f"{x:.9g} {y:.9g} {z:.9g}\n" for x, y, z in vertices.tolist())
    return header.encode() + (lines.encode() if text else vertices.astype("<f4").tobytes())


def pose_text(pose: np.ndarray) -> bytes:
    """Three lines of four numbers."""
    return "".join(" ".join(repr(float(value)) for value in row) + "\n" for row in pose).encode()


def _write_statistics(decoder: Path, frames: list[DomeFrame]) -> None:
    textures = np.stack([frame.average_texture for frame in frames]).astype(np.float64)
    vertices = np.stack([frame.vertices for frame in frames]).astype(np.float64)
    mean = np.rint(textures.mean(axis=0)).astype(np.uint8)
    (decoder / "uv_image/color_mean.png").write_bytes(png_bytes(mean[::-1]))
    (decoder / "uv_image/color_variance.txt").write_text(f"{float(textures.var(axis=0).mean()) + 1e-6!r}\n")
    tracking = decoder / "kinematic_tracking"
    (tracking / "registration_vertices_mean.npy").write_bytes(npy_bytes(vertices.mean(axis=0).astype(np.float32)))
    (tracking / "registration_vertices_variance.txt").write_text(f"{float(vertices.var(axis=0).mean()) + 1e-6!r}\n")


def _write_headset(encoder: Path, config: DomeConfig, shown: dict[tuple[str, int], DomeFrame]) -> None:
    cameras, headset = dome_scene(config).cameras, dome_scene(config).headset.cameras
    frames = planned_headset_frames(config)
    for number, camera in enumerate(headset):
        name = HEADSET_ZIPS[camera.camera_id]
        members = {}
        for frame in frames:
            dome_frame = shown[frame.segment, frame.index]
            if not dome_frame.missing[len(cameras) + number]:
                members[f"{name}/{frame.stem}.avif"] = avif_bytes(dome_frame.headset_images[number])
        write_zip(encoder / f"image/{name}.zip", members)
    (encoder / "frame_list.csv").write_text(frame_list_csv(frames))
