"""Reader of the public Multiface layout (v1 and v2), and of what the synthetic dome adds to it.

``images/SEG/CAM/FRAME.png``, ``unwrapped_uv_1024/SEG/{CAM,average}/FRAME.png``, ``tracked_mesh/SEG/FRAME.bin``
(V x 3 float32), ``FRAME.obj``, ``FRAME_transform.txt`` (3 x 4 world_from_head), ``audio/SEG.wav``, ``KRT``,
``frame_list.txt``, ``tex_mean.png``, ``tex_var.txt``, ``vert_mean.bin``, ``vert_var.txt``. The optional folder
``driving/`` holds ``headset.json``, ``landmarks.json``, ``frontal.json``, ``weight_mask.png``,
``headset/SEG/CAM/FRAME.png`` and ``keypoints/SEG/FRAME.npy``.

Source: Wuu et al., "Multiface: A Dataset for Neural Face Rendering", arXiv:2207.11243, and its public loader.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice

import numpy as np

from lipflow.errors import CaptureError
from lipflow.types import Camera, Normalization, Topology
from pipeline import storage
from pipeline.capture import Asset, SegmentListing
from pipeline.capture_errors import EmptySegmentError, MissingFileError
from pipeline.captures.krt import parse_krt
from pipeline.captures.multiface_frame import TEXTURE_FOLDER, MultifaceFrame, check_wav
from pipeline.captures.obj import ObjMesh, parse_obj
from pipeline.captures.tracked import parse_variance, parse_vertices
from pipeline.images.codecs import CodecError, decode_any_image, image_size_hw

__all__ = ["TEXTURE_FOLDER", "WEIGHT_MASK_UNIT", "MultifaceCapture"]

WEIGHT_MASK_UNIT = 32.0
"""``driving/weight_mask.png`` stores weights in units of 1/32, 8 bits."""

_STATISTICS = ("tex_mean.png", "tex_var.txt", "vert_mean.bin", "vert_var.txt")
_SIZE_PROBES = 5


class MultifaceCapture:
    """A capture in the Multiface layout; implements :class:`pipeline.capture.Capture`.

    Args:
        uri: the folder that holds ``KRT`` and ``frame_list.txt``; a path, ``file://`` or ``s3://``.

    Raises:
        CaptureError: the folder is no such capture, or its calibration or frame list cannot be used.
    """

    layout = "multiface"
    headset_sequence = None

    def __init__(self, uri: str):
        self.uri = storage.normalize_uri(uri)
        for name, remedy in (
            ("KRT", "calibrate the cameras, or fetch the calibration"),
            ("frame_list.txt", "it is written last, so the capture is incomplete: fetch or synthesise it again"),
        ):
            if not storage.exists(storage.join(self.uri, name)):
                raise MissingFileError(f"{self.uri}/{name}: the file is missing; {remedy}")
        self.segments = self._read_frame_list()
        self._last_listing: tuple[str, SegmentListing] | None = None

    @staticmethod
    def is_at(uri: str) -> bool:
        """Whether a folder is in this layout, complete or not."""
        return any(storage.exists(storage.join(uri, name)) for name in ("KRT", "frame_list.txt"))

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
        """The dome cameras in the order of ``KRT``, K in pixels of the stored images, distortion as stated there."""
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
        if not isinstance(landmarks, dict):
            raise CaptureError(
                f"{self.uri}/driving/landmarks.json: expected an object of name to vertex index, "
                f"found a {type(landmarks).__name__}"
            )
        count = len(mesh.vertices)
        bad = [name for name, index in landmarks.items() if not (isinstance(index, int) and 0 <= index < count)]
        if bad:
            raise CaptureError(f"{self.uri}/driving/landmarks.json: {bad[0]} is no index of the {count} vertices")
        topology = Topology(mesh.faces, mesh.uvs, mesh.uv_faces, np.ones((1, 1), np.float32), landmarks, count)
        return replace(topology, weight_mask=self._weight_mask())

    @cached_property
    def texture_size(self) -> int:
        """Edge length of the average texture files; of ``tex_mean.png`` where there are none."""
        stored = (
            storage.join(self.uri, TEXTURE_FOLDER, segment, "average", f"{frames[0]}.png")
            for segment, frames in self.segments.items()
        )
        unreadable: CodecError | None = None
        for path in (*islice(filter(storage.exists, stored), _SIZE_PROBES), storage.join(self.uri, "tex_mean.png")):
            try:
                return _square(_stored_size_hw(path), path)
            except storage.ObjectNotFoundError:
                break
            except CodecError as error:
                unreadable = error
        if unreadable is not None:
            raise unreadable
        raise CaptureError(
            f"{self.uri}: no texture tells its size; expected {TEXTURE_FOLDER}/SEG/average or tex_mean.png, or set "
            "shard.texture_size"
        )

    def normalization(self) -> Normalization | None:
        """The statistics files of the capture, over all of its segments; None unless all four are there."""
        bodies = [self.optional_file(name) for name in _STATISTICS]
        if any(body is None for body in bodies):
            return None
        texture, texture_var, vertices, vertices_var = (body or b"" for body in bodies)
        image = decode_any_image(texture, f"{self.uri}/tex_mean.png")
        return Normalization(
            texture_mean=np.ascontiguousarray(image[::-1].transpose(2, 0, 1)).astype(np.float32),
            texture_std=parse_variance(texture_var, f"{self.uri}/tex_var.txt") ** 0.5,
            vertices_mean=parse_vertices(vertices, self.topology.num_vertices, f"{self.uri}/vert_mean.bin"),
            vertices_std=parse_variance(vertices_var, f"{self.uri}/vert_var.txt") ** 0.5,
        )

    def audio_file(self, segment: str) -> bytes | None:
        """The WAV that was recorded with a sentence; None where there is none. It is not cut into frames."""
        return self.optional_file("audio", f"{segment}.wav")

    def listing(self, segment: str) -> SegmentListing:
        """Which files of a segment are there: one folder listing for each camera, and a few more.

        The listing of the last segment is kept, for the checks of its frames.
        """
        last = self._last_listing
        if last is None or last[0] != segment:
            last = self._last_listing = (segment, self._list(segment))
        return last[1]

    def _list(self, segment: str) -> SegmentListing:
        mesh_names = self._names("tracked_mesh", segment)
        poses = frozenset(name.removesuffix("_transform") for name in _stems(mesh_names, ".txt"))
        view_textures = self._stems_by_camera(TEXTURE_FOLDER, segment)
        return SegmentListing(
            vertices=_stems(mesh_names, ".bin"),
            poses=poses,
            average_textures=view_textures.pop("average", frozenset()),
            images=self._stems_by_camera("images", segment),
            view_textures=view_textures,
            headset=self._stems_by_camera("driving/headset", segment),
            keypoints=_stems(self._names("driving/keypoints", segment), ".npy"),
        )

    def shared_assets(self) -> Iterator[Asset]:
        """Calibration, topology, driving metadata, statistics and audio; checks read what they need of them."""
        yield Asset(f"{self.uri}/KRT", lambda: self.cameras)
        yield Asset(f"{self.uri}/tracked_mesh", lambda: self.topology)
        for name, check in (
            ("driving/headset.json", lambda: self.headset_cameras),
            ("driving/frontal.json", lambda: self.frontal_camera_id),
        ):
            if storage.exists(storage.join(self.uri, name)):
                yield Asset(f"{self.uri}/{name}", check)
        if any(storage.exists(storage.join(self.uri, name)) for name in _STATISTICS):
            yield Asset(f"{self.uri}/tex_mean.png", self._check_statistics)
        for name in self._names("audio"):
            yield Asset(f"{self.uri}/audio/{name}", partial(self._check_audio, name))

    def notes(self) -> tuple[str, ...]:
        """Whether there is audio."""
        recorded = {name.removesuffix(".wav") for name in self._names("audio")}
        with_audio = len(recorded & set(self.segments))
        return (f"audio of {with_audio} of {len(self.segments)} segments",) if with_audio else ()

    def optional_file(self, *parts: str) -> bytes | None:
        """The object under the capture's folder, or None where the capture lacks it."""
        try:
            return storage.read_bytes(storage.join(self.uri, *parts))
        except storage.ObjectNotFoundError:
            return None

    def _check_statistics(self) -> None:
        missing = [name for name in _STATISTICS if not storage.exists(storage.join(self.uri, name))]
        if missing:
            raise CaptureError(
                f"{self.uri}/{missing[0]}: missing, but other statistics are there; "
                f"fetch {', '.join(missing)} again, or remove the others"
            )
        self.normalization()

    def _check_audio(self, name: str) -> None:
        check_wav(storage.read_bytes(storage.join(self.uri, "audio", name)), f"{self.uri}/audio/{name}")

    def _names(self, *parts: str) -> list[str]:
        """The names in a folder of the capture; none where there is no such folder."""
        try:
            return storage.listdir(storage.join(self.uri, *parts))
        except storage.ObjectNotFoundError:
            return []

    def _stems_by_camera(self, folder: str, segment: str) -> dict[str, frozenset[str]]:
        folders = [name.rstrip("/") for name in self._names(folder, segment) if name.endswith("/")]
        return {camera_id: _stems(self._names(folder, segment, camera_id), ".png") for camera_id in folders}

    def _json(self, name: str):
        body = self.optional_file(name)
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
            if len(words) == 1:
                raise EmptySegmentError(
                    f"{path}:{number}: {words[0]} is listed without a frame; expected 'SEGMENT FRAME', "
                    "remove the line or fetch the list again"
                )
            if len(words) != 2 or any("/" in word or word in (".", "..") for word in words):
                raise CaptureError(f"{path}:{number}: expected 'SEGMENT FRAME', found {line.strip()!r}")
            found.setdefault(words[0], set()).add(words[1])
        if not found:
            raise CaptureError(f"{path}: no frame is listed")
        return {segment: tuple(sorted(found[segment])) for segment in sorted(found)}

    def _image_size_hw(self) -> tuple[int, int]:
        """The size of most of a few images, one a camera: a single image may be broken."""
        sizes: Counter[tuple[int, int]] = Counter()
        unreadable: CodecError | None = None
        for segment in list(self.segments)[:_SIZE_PROBES]:
            for camera_id in [name.rstrip("/") for name in self._names("images", segment) if name.endswith("/")]:
                names = [name for name in self._names("images", segment, camera_id) if name.endswith(".png")]
                try:
                    sizes.update(
                        _stored_size_hw(storage.join(self.uri, "images", segment, camera_id, name))
                        for name in names[:1]
                    )
                except CodecError as error:
                    unreadable = error
                if sizes.total() >= _SIZE_PROBES:
                    break
            if sizes:
                return sizes.most_common(1)[0][0]
        if unreadable is not None:
            raise unreadable
        raise CaptureError(f"{self.uri}: no image tells the cameras' resolution; expected images/SEG/CAM/FRAME.png")

    def _first_obj(self) -> ObjMesh:
        for segment, frames in self.segments.items():
            body = self.optional_file("tracked_mesh", segment, f"{frames[0]}.obj")
            if body is not None:
                return parse_obj(body.decode("utf-8", "replace"), f"{self.uri}/tracked_mesh/{segment}/{frames[0]}.obj")
        for segment in self.segments:
            for name in (name for name in self._names("tracked_mesh", segment) if name.endswith(".obj")):
                path = storage.join(self.uri, "tracked_mesh", segment, name)
                return parse_obj(storage.read_text(path), path)
        raise CaptureError(f"{self.uri}: no topology; expected at least one tracked_mesh/SEG/FRAME.obj")

    def _weight_mask(self) -> np.ndarray:
        body = self.optional_file("driving/weight_mask.png")
        if body is None:
            return np.ones((1, 1), np.float32)
        image = decode_any_image(body, f"{self.uri}/driving/weight_mask.png", "L")[::-1]
        return np.ascontiguousarray(image).astype(np.float32) / WEIGHT_MASK_UNIT


def _stems(names: list[str], suffix: str) -> frozenset[str]:
    return frozenset(name.removesuffix(suffix) for name in names if name.endswith(suffix))


def _stored_size_hw(path: str) -> tuple[int, int]:
    """(height, width) from the file's header alone."""
    with storage.open_for_reading(path) as stream:
        return image_size_hw(stream, path)


def _square(size_hw: tuple[int, int], path: str) -> int:
    if size_hw[0] != size_hw[1]:
        raise CaptureError(f"{path}: a texture has to be square, found {size_hw[1]} x {size_hw[0]} (W x H)")
    return size_hw[0]


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
