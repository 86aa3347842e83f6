"""Reader of the public Multiface layout (v1 and v2), and of what the synthetic dome adds to it.

``images/SEG/CAM/FRAME.png``, ``unwrapped_uv_1024/SEG/{CAM,average}/FRAME.png``, ``tracked_mesh/SEG/FRAME.bin``
(V x 3 float32), ``FRAME.obj``, ``FRAME_transform.txt`` (3 x 4 world_from_head), ``KRT``, ``frame_list.txt``,
``tex_mean.png``, ``tex_var.txt``, ``vert_mean.bin``, ``vert_var.txt``. The optional folder ``driving/`` holds
``headset.json``, ``landmarks.json``, ``frontal.json``, ``weight_mask.png``, ``headset/SEG/CAM/FRAME.png`` and
``keypoints/SEG/FRAME.npy``.

Source: Wuu et al., "Multiface: A Dataset for Neural Face Rendering", arXiv:2207.11243, and its public loader.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image, UnidentifiedImageError

from lipflow.errors import CaptureError
from lipflow.types import Camera, Normalization, Topology
from pipeline import storage
from pipeline.captures.krt import parse_krt
from pipeline.captures.obj import ObjMesh, parse_obj

TEXTURE_FOLDER = "unwrapped_uv_1024"
WEIGHT_MASK_UNIT = 32.0
"""``driving/weight_mask.png`` stores weights in units of 1/32, 8 bits."""

_COMPLETE = {
    "KRT": "fetch the calibration again",
    "frame_list.txt": "it is written last: fetch or synthesise the capture again",
}
_RIGID_TOLERANCE = 1e-3
_SIZE_PROBES = 8


class MultifaceCapture:
    """A capture in the Multiface layout; implements :class:`pipeline.capture.Capture`.

    Args:
        uri: the folder that holds ``KRT`` and ``frame_list.txt``; a path, ``file://`` or ``s3://``.

    Raises:
        CaptureError: the folder is no such capture, or its calibration or frame list cannot be used.
    """

    def __init__(self, uri: str):
        self.uri = storage.normalize_uri(uri)
        missing = [name for name in ("KRT", "frame_list.txt") if not storage.exists(storage.join(self.uri, name))]
        if len(missing) == 2:
            raise CaptureError(
                f"{self.uri}: not a capture: it has neither KRT nor frame_list.txt; "
                "give the folder that holds images/, tracked_mesh/, KRT and frame_list.txt"
            )
        if missing:
            hint = "the capture is incomplete (frame_list.txt is written last)" if "KRT" not in missing else "calibrate"
            raise CaptureError(f"{self.uri}: {missing[0]} is missing; {hint}: fetch or synthesise it again")
        self.segments = self._read_frame_list()

    def frame(self, segment: str, frame: str) -> MultifaceFrame:
        """The frame of that segment and stem.

        Raises:
            CaptureError: the frame list does not hold it.
        """
        if frame not in self.segments.get(segment, ()):
            raise CaptureError(f"{self.uri}: frame {segment}/{frame} is not in frame_list.txt")
        return MultifaceFrame(self, segment, frame)

    @cached_property
    def cameras(self) -> tuple[Camera, ...]:
        """The dome cameras in the order of ``KRT``, K in pixels of the stored images."""
        path = storage.join(self.uri, "KRT")
        return parse_krt(storage.read_text(path), self._image_size_hw(), path)

    @cached_property
    def headset_cameras(self) -> tuple[Camera, ...]:
        """Head-fixed cameras; ``cam_from_world`` holds cam_from_head. Empty if the capture has none."""
        entries = self._json("driving/headset.json")
        return tuple(_camera_from_json(entry, f"{self.uri}/driving/headset.json") for entry in entries or ())

    @cached_property
    def frontal_camera_id(self) -> str | None:
        """The declared frontal camera."""
        declared = self._json("driving/frontal.json")
        if declared is None:
            return None
        known = [camera.camera_id for camera in self.cameras]
        camera_id = declared.get("camera_id") if isinstance(declared, dict) else None
        if camera_id not in known:
            raise CaptureError(f"{self.uri}/driving/frontal.json: camera {camera_id!r} is not one of KRT")
        return str(camera_id)

    @cached_property
    def keypoint_names(self) -> tuple[str, ...]:
        """The names of the rows of the stored keypoints."""
        return tuple(self.topology.landmarks)

    @cached_property
    def topology(self) -> Topology:
        """Faces and atlas of the first tracked ``.obj``; the weight mask is 1 where the capture has none."""
        mesh = self._first_obj()
        landmarks = self._json("driving/landmarks.json") or {}
        count = len(mesh.vertices)
        bad = [name for name, index in landmarks.items() if not (isinstance(index, int) and 0 <= index < count)]
        if bad:
            raise CaptureError(f"{self.uri}/driving/landmarks.json: {bad[0]} is no index of the {count} vertices")
        topology = Topology(mesh.faces, mesh.uvs, mesh.uv_faces, np.ones((1, 1), np.float32), landmarks, count)
        return replace(topology, weight_mask=self._weight_mask())

    @cached_property
    def texture_size(self) -> int:
        """Edge length of the average texture files; of ``tex_mean.png`` where there are none."""
        for segment, frames in self.segments.items():
            path = storage.join(self.uri, TEXTURE_FOLDER, segment, "average", f"{frames[0]}.png")
            if storage.exists(path):
                return _square(_image_size_hw(path), path)
        path = storage.join(self.uri, "tex_mean.png")
        if storage.exists(path):
            return _square(_image_size_hw(path), path)
        raise CaptureError(
            f"{self.uri}: no texture tells its size; expected {TEXTURE_FOLDER}/SEG/average or tex_mean.png"
        )

    def normalization(self) -> Normalization | None:
        """The statistics files of the capture, over all of its segments; None unless all four are there."""
        names = ("tex_mean.png", "tex_var.txt", "vert_mean.bin", "vert_var.txt")
        bodies = [self._optional(name) for name in names]
        if any(body is None for body in bodies):
            return None
        texture, texture_var, vertices, vertices_var = (body or b"" for body in bodies)
        image = decode_rgb(texture, f"{self.uri}/tex_mean.png")
        return Normalization(
            texture_mean=np.ascontiguousarray(image[::-1].transpose(2, 0, 1)).astype(np.float32),
            texture_std=_positive(texture_var, f"{self.uri}/tex_var.txt") ** 0.5,
            vertices_mean=_vertices(vertices, self.topology.num_vertices, f"{self.uri}/vert_mean.bin"),
            vertices_std=_positive(vertices_var, f"{self.uri}/vert_var.txt") ** 0.5,
        )

    def _optional(self, *parts: str) -> bytes | None:
        """The object, or None where the capture lacks it."""
        try:
            return storage.read_bytes(storage.join(self.uri, *parts))
        except storage.ObjectNotFoundError:
            return None

    def _json(self, name: str):
        body = self._optional(name)
        if body is None:
            return None
        try:
            return json.loads(body)
        except ValueError as error:
            raise CaptureError(f"{self.uri}/{name}: not JSON ({error}); fetch it again") from error

    def _read_frame_list(self) -> dict[str, tuple[str, ...]]:
        path = storage.join(self.uri, "frame_list.txt")
        found: dict[str, set[str]] = {}
        for number, line in enumerate(storage.read_text(path).splitlines(), start=1):
            words = line.split()
            if not words:
                continue
            if len(words) != 2 or any("/" in word or word in (".", "..") for word in words):
                raise CaptureError(f"{path}:{number}: expected 'SEGMENT FRAME', found {line.strip()!r}")
            found.setdefault(words[0], set()).add(words[1])
        if not found:
            raise CaptureError(f"{path}: no frame is listed")
        return {segment: tuple(sorted(found[segment])) for segment in sorted(found)}

    def _image_size_hw(self) -> tuple[int, int]:
        for segment in list(self.segments)[:_SIZE_PROBES]:
            folder = storage.join(self.uri, "images", segment)
            if not storage.exists(folder):
                continue
            for camera_id in [name for name in storage.listdir(folder) if name.endswith("/")][:_SIZE_PROBES]:
                names = [name for name in storage.listdir(storage.join(folder, camera_id)) if name.endswith(".png")]
                if names:
                    return _image_size_hw(storage.join(folder, camera_id, names[0]))
        raise CaptureError(f"{self.uri}: no image tells the cameras' resolution; expected images/SEG/CAM/FRAME.png")

    def _first_obj(self) -> ObjMesh:
        for segment, frames in self.segments.items():
            body = self._optional("tracked_mesh", segment, f"{frames[0]}.obj")
            if body is not None:
                return parse_obj(body.decode("utf-8", "replace"), f"{self.uri}/tracked_mesh/{segment}/{frames[0]}.obj")
        for segment in self.segments:
            folder = storage.join(self.uri, "tracked_mesh", segment)
            names = storage.listdir(folder) if storage.exists(folder) else []
            for name in (name for name in names if name.endswith(".obj")):
                path = storage.join(folder, name)
                return parse_obj(storage.read_text(path), path)
        raise CaptureError(f"{self.uri}: no topology; expected at least one tracked_mesh/SEG/FRAME.obj")

    def _weight_mask(self) -> np.ndarray:
        body = self._optional("driving/weight_mask.png")
        if body is None:
            return np.ones((self.texture_size, self.texture_size), np.float32)
        image = decode_rgb(body, f"{self.uri}/driving/weight_mask.png")[::-1, :, 0]
        return np.ascontiguousarray(image).astype(np.float32) / WEIGHT_MASK_UNIT


@dataclass(frozen=True)
class MultifaceFrame:
    """One frame; implements :class:`pipeline.capture.CaptureFrame`. Every method reads storage."""

    capture: MultifaceCapture
    segment: str
    frame: str

    def vertices(self) -> np.ndarray:
        """``(V, 3)`` float32 mm, head frame.

        Raises:
            CaptureError: the file has another number of vertices than the topology, or a value that is not finite.
        """
        path = storage.join(self.capture.uri, "tracked_mesh", self.segment, f"{self.frame}.bin")
        return _vertices(self._required(path), self.capture.topology.num_vertices, path)

    def world_from_head(self) -> np.ndarray:
        """``(3, 4)`` float64 rigid head pose.

        Raises:
            CaptureError: not twelve numbers, or not a rotation and a translation.
        """
        path = storage.join(self.capture.uri, "tracked_mesh", self.segment, f"{self.frame}_transform.txt")
        words = self._required(path).decode("utf-8", "replace").split()
        try:
            pose = np.array([float(word) for word in words])
        except ValueError as error:
            raise CaptureError(f"{path}: expected 12 numbers, found text: {error}") from error
        if pose.size != 12 or not np.isfinite(pose).all():
            raise CaptureError(f"{path}: expected 12 finite numbers (3 x 4), found {pose.size}")
        pose = pose.reshape(3, 4)
        rotation = pose[:, :3]
        off = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
        if off > _RIGID_TOLERANCE or np.linalg.det(rotation) < 0:
            raise CaptureError(
                f"{path}: the head pose is not rigid: R R^T is off the identity by {off:.3g}, "
                f"determinant {np.linalg.det(rotation):.3g}; expected a rotation (millimetres, no scale)"
            )
        return pose

    def average_texture_file(self) -> bytes | None:
        """PNG, row 0 is v = 1."""
        return self.capture._optional(TEXTURE_FOLDER, self.segment, "average", f"{self.frame}.png")

    def image_file(self, camera_id: str) -> bytes | None:
        """PNG of one camera; None if that view is missing."""
        return self.capture._optional("images", self.segment, camera_id, f"{self.frame}.png")

    def view_texture_file(self, camera_id: str) -> bytes | None:
        """PNG unwrapped from one camera, row 0 is v = 1; None if the capture lacks it."""
        return self.capture._optional(TEXTURE_FOLDER, self.segment, camera_id, f"{self.frame}.png")

    def headset_file(self, camera_id: str) -> bytes | None:
        """PNG of one headset camera; None if it is missing."""
        return self.capture._optional("driving/headset", self.segment, camera_id, f"{self.frame}.png")

    def keypoints(self) -> np.ndarray | None:
        """``(L, 3)`` float32 x_px, y_px, confidence; None where the capture has none.

        Raises:
            CaptureError: the file does not hold one finite row for each landmark.
        """
        body = self.capture._optional("driving/keypoints", self.segment, f"{self.frame}.npy")
        if body is None:
            return None
        path = f"{self.capture.uri}/driving/keypoints/{self.segment}/{self.frame}.npy"
        try:
            points = np.load(io.BytesIO(body), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise CaptureError(f"{path}: not an npy array ({error})") from error
        expected = (len(self.capture.keypoint_names), 3)
        if points.shape != expected or not np.isfinite(points).all():
            raise CaptureError(f"{path}: expected {expected} finite numbers, found shape {points.shape}")
        return points.astype(np.float32)

    def _required(self, path: str) -> bytes:
        try:
            return storage.read_bytes(path)
        except storage.ObjectNotFoundError as error:
            raise CaptureError(f"{path}: the file is missing, but frame_list.txt lists its frame") from error


def decode_rgb(body: bytes, source: str) -> np.ndarray:
    """An encoded image as ``(H, W, 3)`` uint8, in file orientation.

    Raises:
        CaptureError: the bytes are no image, or only a part of one.
    """
    try:
        with Image.open(io.BytesIO(body)) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise CaptureError(f"{source}: not a readable image ({error}); fetch it again") from error


def _image_size_hw(path: str) -> tuple[int, int]:
    """(height, width) from the file's header alone."""
    with storage.open_for_reading(path) as stream:
        try:
            with Image.open(stream) as image:
                return image.height, image.width
        except (UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
            raise CaptureError(f"{path}: not a readable image; fetch it again") from error


def _square(size_hw: tuple[int, int], path: str) -> int:
    if size_hw[0] != size_hw[1]:
        raise CaptureError(f"{path}: a texture has to be square, found {size_hw[1]} x {size_hw[0]} (W x H)")
    return size_hw[0]


def _vertices(body: bytes, count: int, path: str) -> np.ndarray:
    if len(body) != count * 12:
        raise CaptureError(
            f"{path}: {len(body) / 12:g} vertices (float32 x 3), but the capture's topology has {count}; "
            "fetch it again, or track it with that topology"
        )
    vertices = np.frombuffer(body, dtype="<f4").reshape(count, 3).copy()
    if not np.isfinite(vertices).all():
        bad = int((~np.isfinite(vertices).all(axis=1)).sum())
        raise CaptureError(f"{path}: {bad} of {count} vertices are not finite numbers; track the frame again")
    return vertices


def _positive(body: bytes, path: str) -> float:
    text = body.decode("utf-8", "replace").strip()
    try:
        value = float(text)
    except ValueError as error:
        raise CaptureError(f"{path}: expected one number, found {text[:40]!r}") from error
    if not (np.isfinite(value) and value > 0):
        raise CaptureError(f"{path}: expected a positive variance, found {value}")
    return value


def _camera_from_json(entry: dict, path: str) -> Camera:
    try:
        intrinsics = np.array(entry["intrinsics"], dtype=np.float64).reshape(3, 3)
        cam_from_head = np.array(entry["cam_from_head"], dtype=np.float64).reshape(3, 4)
        height, width = (int(edge) for edge in entry["image_size_hw"])
        return Camera(str(entry["camera_id"]), intrinsics, cam_from_head, (height, width))
    except (KeyError, TypeError, ValueError) as error:
        raise CaptureError(
            f"{path}: expected camera_id, intrinsics (3, 3), cam_from_head (3, 4), image_size_hw: {error}"
        ) from error
