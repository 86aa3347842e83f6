"""One frame of a capture in the Multiface layout; see :mod:`pipeline.captures.multiface`."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lipflow.errors import CaptureError
from lipflow.types import Camera
from pipeline import storage
from pipeline.capture import Asset, AssetKind
from pipeline.capture_errors import MissingFileError, check_image_size
from pipeline.captures.tracked import parse_npy, parse_pose, parse_vertices
from pipeline.images.codecs import decode_any_image

if TYPE_CHECKING:
    from pipeline.captures.multiface import MultifaceCapture

TEXTURE_FOLDER = "unwrapped_uv_1024"


@dataclass(frozen=True)
class MultifaceFrame:
    """One frame; implements :class:`pipeline.capture.CaptureFrame`. Every method reads storage."""

    capture: MultifaceCapture
    segment: str
    frame: str

    def vertices(self) -> np.ndarray:
        """``(V, 3)`` float32 mm, head frame.

        Raises:
            MissingFileError: there is no mesh, but the frame is listed.
            VertexCountError: the file has another number of vertices than the topology.
            VertexNotFiniteError: a coordinate is not a finite number.
        """
        path = self.source_of("vertices")
        return parse_vertices(self._required(path), self.capture.topology.num_vertices, path)

    def world_from_head(self) -> np.ndarray:
        """``(3, 4)`` float64 rigid head pose.

        Raises:
            MissingFileError: there is none, but the frame is listed.
            PoseNotRigidError: not a rotation and a translation.
            CaptureError: not twelve numbers.
        """
        path = self.source_of("pose")
        return parse_pose(self._required(path), path)

    def average_texture_file(self) -> bytes | None:
        """PNG, row 0 is v = 1."""
        return self._optional("average_texture")

    def image_file(self, camera_id: str) -> bytes | None:
        """PNG of one camera; None if that view is missing."""
        return self._optional("image", camera_id)

    def view_texture_file(self, camera_id: str) -> bytes | None:
        """PNG unwrapped from one camera, row 0 is v = 1; None if the capture lacks it."""
        return self._optional("view_texture", camera_id)

    def headset_file(self, camera_id: str) -> bytes | None:
        """PNG of one headset camera; None if it is missing."""
        return self._optional("headset", camera_id)

    def keypoints(self) -> np.ndarray | None:
        """``(L, 3)`` float32 x_px, y_px, confidence; None where the capture has none.

        Raises:
            CaptureError: the file does not hold one finite row for each landmark.
        """
        body = self._optional("keypoints")
        if body is None:
            return None
        path = self.source_of("keypoints")
        points = parse_npy(body, path)
        expected = (len(self.capture.keypoint_names), 3)
        if points.shape != expected or not np.isfinite(points).all():
            raise CaptureError(f"{path}: expected {expected} finite numbers, found shape {points.shape}")
        return points.astype(np.float32)

    def source_of(self, kind: AssetKind, camera_id: str | None = None) -> str:
        """The URI of a file of this frame, whether it is there or not."""
        parts = {
            "vertices": ("tracked_mesh", self.segment, f"{self.frame}.bin"),
            "pose": ("tracked_mesh", self.segment, f"{self.frame}_transform.txt"),
            "average_texture": (TEXTURE_FOLDER, self.segment, "average", f"{self.frame}.png"),
            "image": ("images", self.segment, str(camera_id), f"{self.frame}.png"),
            "view_texture": (TEXTURE_FOLDER, self.segment, str(camera_id), f"{self.frame}.png"),
            "headset": ("driving/headset", self.segment, str(camera_id), f"{self.frame}.png"),
            "keypoints": ("driving/keypoints", self.segment, f"{self.frame}.npy"),
        }[kind]
        return "/".join((self.capture.uri, *parts))

    def assets(self) -> Iterator[Asset]:
        """The mesh and the pose, and every other file of the frame that the segment's listing names."""
        listing = self.capture.listing(self.segment)
        yield Asset(self.source_of("vertices"), self.vertices)
        yield Asset(self.source_of("pose"), self.world_from_head)
        if self.frame in listing.average_textures:
            yield self._asset("average_texture", None, decode_any_image)
        for camera in self.capture.cameras:
            if self.frame in listing.images.get(camera.camera_id, ()):
                yield self._asset("image", camera.camera_id, _image_check(camera))
            if self.frame in listing.view_textures.get(camera.camera_id, ()):
                yield self._asset("view_texture", camera.camera_id, decode_any_image)
        for camera in self.capture.headset_cameras:
            if self.frame in listing.headset.get(camera.camera_id, ()):
                yield self._asset("headset", camera.camera_id, _image_check(camera))
        if self.capture.keypoint_names and self.frame in listing.keypoints:
            yield Asset(self.source_of("keypoints"), self.keypoints)

    def _asset(self, kind: AssetKind, camera_id: str | None, check: Callable[[bytes, str], object]) -> Asset:
        source = self.source_of(kind, camera_id)
        return Asset(source, lambda: check(storage.read_bytes(source), source))

    def _optional(self, kind: AssetKind, camera_id: str | None = None) -> bytes | None:
        try:
            return storage.read_bytes(self.source_of(kind, camera_id))
        except storage.ObjectNotFoundError:
            return None

    def _required(self, path: str) -> bytes:
        try:
            return storage.read_bytes(path)
        except storage.ObjectNotFoundError as error:
            raise MissingFileError(f"{path}: the file is missing, but frame_list.txt lists its frame") from error


def _image_check(camera: Camera) -> Callable[[bytes, str], None]:
    def check(body: bytes, source: str) -> None:
        check_image_size(decode_any_image(body, source).shape[:2], camera, source)

    return check


def check_wav(body: bytes, source: str) -> None:
    """Read a WAV file to its end.

    Raises:
        CaptureError: not a WAV, or one that is cut off.
    """
    try:
        with wave.open(io.BytesIO(body)) as sound:
            expected = sound.getnframes() * sound.getnchannels() * sound.getsampwidth()
            found = len(sound.readframes(sound.getnframes()))
    except (wave.Error, EOFError) as error:
        raise CaptureError(f"{source}: not a readable WAV ({error}); fetch it again") from error
    if found != expected:
        raise CaptureError(f"{source}: {found} bytes of sound, but its header says {expected}; fetch it again")
