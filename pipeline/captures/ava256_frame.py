"""One frame of a capture in the Ava-256 layout; see :mod:`pipeline.captures.ava256`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lipflow.types import Camera
from pipeline.capture import Asset, AssetKind
from pipeline.capture_errors import ImageSizeError, MissingFileError, check_image_size
from pipeline.captures.ava256_files import parse_keypoints_3d, parse_ply_vertices
from pipeline.captures.frame_zip import FrameZip
from pipeline.captures.tracked import parse_pose
from pipeline.images.codecs import decode_any_image

if TYPE_CHECKING:
    from pipeline.captures.ava256 import Ava256Capture


@dataclass(frozen=True)
class Ava256Frame:
    """One frame; implements :class:`pipeline.capture.CaptureFrame`. Every method is one range request, or none."""

    capture: Ava256Capture
    segment: str
    frame: str

    def vertices(self) -> np.ndarray:
        """``(V, 3)`` float32 mm, head frame.

        Raises:
            MissingFileError: there is no mesh, but the frame is listed.
            VertexCountError: the mesh has another number of vertices than the topology.
            VertexNotFiniteError: a coordinate is not a finite number.
            CaptureError: not a PLY mesh.
        """
        meshes = self.capture.zips.vertices
        return parse_ply_vertices(self._required(meshes), self.capture.topology.num_vertices, self._source(meshes))

    def world_from_head(self) -> np.ndarray:
        """``(3, 4)`` float64 rigid head pose.

        Raises:
            MissingFileError: there is none, but the frame is listed.
            PoseNotRigidError: not a rotation and a translation.
            CaptureError: not twelve numbers.
        """
        poses = self.capture.zips.poses
        return parse_pose(self._required(poses), self._source(poses))

    def average_texture_file(self) -> bytes | None:
        """AVIF, row 0 is v = 1."""
        return self.capture.zips.textures.read(self.frame)

    def image_file(self, camera_id: str) -> bytes | None:
        """AVIF of one camera; None if that view is missing."""
        return self.capture.zips.images(camera_id).read(self.frame)

    def segmentation_file(self, camera_id: str) -> bytes | None:
        """Grey PNG of one camera's image, of its size; ``SEGMENTATION_CLASSES`` names its values. None if missing."""
        return self.capture.zips.segmentations(camera_id).read(self.frame)

    def keypoints_3d(self) -> np.ndarray | None:
        """``(N, 6)`` float64: id in 0..273, x, y, z in mm in the world, sum of confidences, number of inliers.

        Rows of keypoints that too few cameras saw are missing. None where the frame has no file.

        Raises:
            CaptureError: not such rows, or an id that comes twice or is out of range.
        """
        keypoints = self.capture.zips.keypoints
        body = keypoints.read(self.frame)
        return None if body is None else parse_keypoints_3d(body, self._source(keypoints))

    def view_texture_file(self, camera_id: str) -> bytes | None:
        """None: the release has no textures of single cameras."""
        return None

    def headset_file(self, camera_id: str) -> bytes | None:
        """None: the headset capture is another one, :attr:`Ava256Capture.headset_sequence`."""
        return None

    def keypoints(self) -> np.ndarray | None:
        """None: the release has no 2-D keypoints; see :meth:`keypoints_3d`."""
        return None

    def source_of(self, kind: AssetKind, camera_id: str | None = None) -> str:
        """``ARCHIVE!MEMBER``; of kinds that the layout lacks, the capture."""
        zips = self.capture.zips
        if kind == "image":
            return self._source(zips.images(str(camera_id)))
        known = {"vertices": zips.vertices, "pose": zips.poses, "average_texture": zips.textures}
        return self._source(known[kind]) if kind in known else f"{self.capture.uri} (no {kind} in this layout)"

    def assets(self) -> Iterator[Asset]:
        """The mesh and the pose, and whatever else the zips' indices name of the frame."""
        zips = self.capture.zips
        yield Asset(self._source(zips.vertices), self.vertices)
        yield Asset(self._source(zips.poses), self.world_from_head)
        if zips.textures.has(self.frame):
            yield Asset(self._source(zips.textures), self._check_texture)
        if zips.keypoints.has(self.frame):
            yield Asset(self._source(zips.keypoints), self.keypoints_3d)
        for camera in self.capture.cameras:
            for frames in (zips.images(camera.camera_id), zips.segmentations(camera.camera_id)):
                if frames.has(self.frame):
                    yield Asset(self._source(frames), partial(self._check_image, frames, camera))

    def _check_texture(self) -> None:
        source, size = self.source_of("average_texture"), self.capture.texture_size
        height, width = decode_any_image(self.average_texture_file() or b"", source).shape[:2]
        if (height, width) != (size, size):
            raise ImageSizeError(
                f"{source}: a texture of {width}x{height}, but the capture's are {size}x{size}; fetch it again"
            )

    def _check_image(self, frames: FrameZip, camera: Camera) -> None:
        source = self._source(frames)
        check_image_size(decode_any_image(frames.read(self.frame) or b"", source).shape[:2], camera, source)

    def _source(self, frames: FrameZip) -> str:
        return frames.source_of(self.frame)

    def _required(self, frames: FrameZip) -> bytes:
        body = frames.read(self.frame)
        if body is None:
            raise MissingFileError(
                f"{self._source(frames)}: missing, but frame_list.csv lists its frame; fetch the zip again, or remove "
                "the frame from the list"
            )
        return body
