"""Reader of the public Ava-256 layout: AVIF, PLY and PNG files in zips, which are read in place.

``decoder/`` holds ``camera_calibration.json``, ``frame_list.csv``, ``head_pose/head_pose.zip`` (3 x 4 world_from_head),
``image/camCAM.zip``, ``keypoints_3d/keypoints_3d.zip``, ``kinematic_tracking/registration_vertices.zip`` with
``registration_vertices_mean.npy`` and ``registration_vertices_variance.txt``, ``segmentation_parts/camCAM.zip`` and
``uv_image/color.zip`` with ``color_mean.png`` and ``color_variance.txt``; ``encoder/`` is the headset capture of the
same subject (:mod:`pipeline.captures.headset_sequence`). Members are named ``FRAME.EXT`` with six digits, with or
without their zip's name as a folder. Textures have v = 1 in row 0, as the public code flips the UV map to them.

The topology is one file for the whole data set and in no capture: ``face_topology.obj``, of the public repository.

Source: ``DATASHEET.md`` (Composition, question 4), ``data/ava_dataset.py`` and ``utils.py`` of
https://github.com/facebookresearch/ava-256; Martinez et al., "Codec Avatar Studio", NeurIPS 2024.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cached_property
from itertools import islice

import numpy as np

from lipflow.errors import CaptureError
from lipflow.types import Camera, Normalization, Topology
from pipeline import storage
from pipeline.capture import Asset, SegmentListing
from pipeline.capture_errors import MissingFileError
from pipeline.captures.ava256_calibration import parse_calibration
from pipeline.captures.ava256_files import parse_frame_list
from pipeline.captures.ava256_frame import Ava256Frame
from pipeline.captures.frame_zip import FrameZip
from pipeline.captures.goliath import is_goliath, refuse_goliath
from pipeline.captures.headset_sequence import ZippedHeadsetSequence
from pipeline.captures.obj import parse_obj
from pipeline.captures.tracked import checked_vertices, parse_npy, parse_variance
from pipeline.images.codecs import CodecError, decode_any_image, image_size_hw

SEGMENTATION_CLASSES = {
    1: "Hair",
    2: "Body",
    3: "Chair",
    4: "Apparel",
    5: "Lenses",
    6: "UpperLip",
    7: "LowerLip",
    8: "UpperTeeth",
    9: "LowerTeeth",
    10: "TongueVisible",
}
"""Values of the pixels of :meth:`Ava256Frame.segmentation_file`; 0 is none of them."""

TOPOLOGY_NAME = "face_topology.obj"

_CALIBRATION, _FRAME_LIST = "camera_calibration.json", "frame_list.csv"
_STATISTICS = (
    "uv_image/color_mean.png",
    "uv_image/color_variance.txt",
    "kinematic_tracking/registration_vertices_mean.npy",
    "kinematic_tracking/registration_vertices_variance.txt",
)
_SIZE_PROBES = 8


class DecoderZips:
    """The zips of a ``decoder`` folder; none is opened before it is asked for a frame.

    Args:
        decoder_uri: that folder.
    """

    def __init__(self, decoder_uri: str):
        self._uri = decoder_uri
        self.vertices = self._zip("kinematic_tracking", "registration_vertices", "ply")
        self.poses = self._zip("head_pose", "head_pose", "txt")
        self.textures = self._zip("uv_image", "color", "avif")
        self.keypoints = self._zip("keypoints_3d", "keypoints_3d", "npy")
        self._by_camera: dict[tuple[str, str], FrameZip] = {}

    def images(self, camera_id: str) -> FrameZip:
        """The images of one camera."""
        return self._of_camera("image", camera_id, "avif")

    def segmentations(self, camera_id: str) -> FrameZip:
        """The segmentations of one camera."""
        return self._of_camera("segmentation_parts", camera_id, "png")

    def _of_camera(self, folder: str, camera_id: str, extension: str) -> FrameZip:
        key = (folder, camera_id)
        if key not in self._by_camera:
            self._by_camera[key] = self._zip(folder, f"cam{camera_id}", extension)
        return self._by_camera[key]

    def _zip(self, folder: str, name: str, extension: str) -> FrameZip:
        return FrameZip(storage.join(self._uri, folder, f"{name}.zip"), name, extension)


class Ava256Capture:
    """A capture in the Ava-256 layout; implements :class:`pipeline.capture.Capture`.

    Args:
        uri: the folder that holds ``decoder/``, or that folder itself; a path, ``file://`` or ``s3://``.

    Raises:
        CaptureError: the folder is no such capture, or its frame list cannot be used.
    """

    layout = "ava256"
    headset_cameras: tuple[Camera, ...] = ()
    frontal_camera_id: str | None = None
    keypoint_names: tuple[str, ...] = ()

    def __init__(self, uri: str):
        self.uri = storage.normalize_uri(uri)
        nested = storage.join(self.uri, "decoder")
        is_nested = any(storage.exists(storage.join(nested, name)) for name in (_CALIBRATION, _FRAME_LIST))
        self.decoder_uri = nested if is_nested else self.uri
        self._root = self.uri if is_nested else _parent(self.uri)
        for name in (_CALIBRATION, _FRAME_LIST):
            if not storage.exists(storage.join(self.decoder_uri, name)):
                refuse_goliath(self.uri)
                raise MissingFileError(
                    f"{self.decoder_uri}/{name}: the file is missing; give the folder that holds decoder/ "
                    "(or decoder/ itself), and fetch the capture's camera_calibration and frame_list"
                )
        path = storage.join(self.decoder_uri, _FRAME_LIST)
        self.segments = parse_frame_list(storage.read_text(path), path)
        self.zips = DecoderZips(self.decoder_uri)

    @staticmethod
    def is_at(uri: str) -> bool:
        """Whether a folder is in this layout, complete or not; captures of Goliath are not."""
        names = (f"decoder/{_FRAME_LIST}", _CALIBRATION, _FRAME_LIST, f"decoder/{_CALIBRATION}")
        return any(storage.exists(storage.join(uri, name)) for name in names) and not is_goliath(uri)

    def frame(self, segment: str, frame: str) -> Ava256Frame:
        """The frame of that segment and stem.

        Raises:
            CaptureError: the frame list does not hold it.
        """
        if frame not in self.segments.get(segment, ()):
            raise CaptureError(f"{self.uri}: frame {segment}/{frame} is not in {_FRAME_LIST}")
        return Ava256Frame(self, segment, frame)

    @cached_property
    def cameras(self) -> tuple[Camera, ...]:
        """The calibrated cameras in the file's order, K in pixels of the stored images; some may have no image."""
        path = storage.join(self.decoder_uri, _CALIBRATION)
        return parse_calibration(storage.read_text(path), self._image_size_hw(), path)

    @cached_property
    def topology(self) -> Topology:
        """Faces and atlas of ``face_topology.obj``; the weight mask is 1 everywhere, and no landmark has a name.

        Raises:
            CaptureError: it is in none of the places where it is looked for, or cannot be used.
        """
        path = self._topology_uri()
        if path is None:
            raise CaptureError(
                f"{self.uri}: no topology: put assets/{TOPOLOGY_NAME} of https://github.com/facebookresearch/ava-256 "
                f"into this folder, or once for the whole data set into {_parent(self._root)}"
            )
        mesh = parse_obj(storage.read_text(path), path)
        return Topology(mesh.faces, mesh.uvs, mesh.uv_faces, np.ones((1, 1), np.float32), {}, len(mesh.vertices))

    @cached_property
    def texture_size(self) -> int:
        """Edge length of the textures: of ``color_mean.png``, or of the first texture where there is none."""
        textures = self.zips.textures
        path, body = storage.join(self.decoder_uri, _STATISTICS[0]), self._optional(_STATISTICS[0])
        if body is None:
            stem = next((stem for stems in self.segments.values() for stem in stems if textures.has(stem)), None)
            path, body = (path, None) if stem is None else (textures.source_of(stem), textures.read(stem))
        if body is None:
            raise CaptureError(f"{self.uri}: no texture tells its size; expected uv_image/color_mean.png or color.zip")
        height, width = image_size_hw(io.BytesIO(body), path)
        if height != width:
            raise CaptureError(f"{path}: a texture has to be square, found {width} x {height} (W x H)")
        return height

    def normalization(self) -> Normalization | None:
        """The statistics files of the capture, over all of its segments; None unless all four are there."""
        bodies = [self._optional(name) for name in _STATISTICS]
        if any(body is None for body in bodies):
            return None
        texture, texture_var, vertices, vertices_var = (body or b"" for body in bodies)
        sources = [storage.join(self.decoder_uri, name) for name in _STATISTICS]
        image = decode_any_image(texture, sources[0])
        return Normalization(
            texture_mean=np.ascontiguousarray(image[::-1].transpose(2, 0, 1)).astype(np.float32),
            texture_std=parse_variance(texture_var, sources[1]) ** 0.5,
            vertices_mean=checked_vertices(parse_npy(vertices, sources[2]), self.topology.num_vertices, sources[2]),
            vertices_std=parse_variance(vertices_var, sources[3]) ** 0.5,
        )

    def listing(self, segment: str) -> SegmentListing:
        """Which files of a segment are there, by the zips' indices alone.

        A zip that cannot be read counts as holding every frame; see :meth:`FrameZip.present`.
        """
        stems, zips = self.segments[segment], self.zips
        return SegmentListing(
            vertices=zips.vertices.present(stems),
            poses=zips.poses.present(stems),
            average_textures=zips.textures.present(stems),
            images={camera.camera_id: zips.images(camera.camera_id).present(stems) for camera in self.cameras},
        )

    def shared_assets(self) -> Iterator[Asset]:
        """Calibration, topology, statistics, and the central directory of every zip."""
        yield Asset(storage.join(self.decoder_uri, _CALIBRATION), lambda: self.cameras)
        yield Asset(self._topology_uri() or storage.join(self.uri, TOPOLOGY_NAME), lambda: self.topology)
        if any(storage.exists(storage.join(self.decoder_uri, name)) for name in _STATISTICS):
            yield Asset(storage.join(self.decoder_uri, _STATISTICS[0]), self._check_statistics)
        zips = [self.zips.vertices, self.zips.poses, self.zips.textures, self.zips.keypoints]
        zips += [self.zips.images(camera_id) for camera_id in self._cameras_with_zip("image")]
        zips += [self.zips.segmentations(camera_id) for camera_id in self._cameras_with_zip("segmentation_parts")]
        yield from (Asset(frames.uri, frames.check) for frames in zips if frames.is_there)
        if self.headset_sequence is not None:
            yield from self.headset_sequence.shared_assets()

    def notes(self) -> tuple[str, ...]:
        """3-D keypoints and segmentations, where they are there."""
        lines = []
        if self.zips.keypoints.is_there:
            lines.append("3-D keypoints (up to 274 a frame, world, mm)")
        segmented = set(self._cameras_with_zip("segmentation_parts"))
        if segmented:
            known = sum(camera.camera_id in segmented for camera in self.cameras)
            lines.append(f"segmentations of {known} of {len(self.cameras)} cameras")
        return tuple(lines)

    @cached_property
    def headset_sequence(self) -> ZippedHeadsetSequence | None:
        """The headset capture beside ``decoder/``; None if there is none.

        Raises:
            CaptureError: its frame list cannot be used.
        """
        encoder = storage.join(self._root, "encoder")
        return ZippedHeadsetSequence(encoder) if storage.exists(storage.join(encoder, _FRAME_LIST)) else None

    def _optional(self, name: str) -> bytes | None:
        try:
            return storage.read_bytes(storage.join(self.decoder_uri, name))
        except storage.ObjectNotFoundError:
            return None

    def _image_size_hw(self) -> tuple[int, int]:
        """The size that two cameras' first images agree on, or else the first one's.

        K needs it, as the calibration states the sensor's size alone. One odd image must not decide for all.
        """
        sizes: list[tuple[int, int]] = []
        faults: list[Exception] = []
        for images, stem in islice(self._first_images(), _SIZE_PROBES):
            try:
                sizes.append(image_size_hw(io.BytesIO(images.read(stem) or b""), images.source_of(stem)))
            except (CaptureError, CodecError) as error:
                faults.append(error)
                continue
            if sizes.count(sizes[-1]) == 2:
                return sizes[-1]
        if sizes:
            return sizes[0]
        if faults:
            raise faults[0]
        raise CaptureError(f"{self.uri}: no image tells the cameras' resolution; expected decoder/image/camCAM.zip")

    def _first_images(self) -> Iterator[tuple[FrameZip, str]]:
        """Of each camera that has any image, its zip and the first frame."""
        for camera_id in self._cameras_with_zip("image"):
            images = self.zips.images(camera_id)
            stem = next((stem for stems in self.segments.values() for stem in stems if images.has(stem)), None)
            if stem is not None:
                yield images, stem

    def _cameras_with_zip(self, folder: str) -> list[str]:
        """Ids of the cameras that have a zip in a folder of ``decoder/``, calibrated or not."""
        uri = storage.join(self.decoder_uri, folder)
        names = storage.listdir(uri) if storage.exists(uri) else []
        return [name[3:-4] for name in names if name.startswith("cam") and name.endswith(".zip")]

    def _topology_uri(self) -> str | None:
        folders = dict.fromkeys((self.uri, self.decoder_uri, self._root, _parent(self._root)))
        places = (storage.join(folder, TOPOLOGY_NAME) for folder in folders)
        return next((place for place in places if storage.exists(place)), None)

    def _check_statistics(self) -> None:
        missing = [name for name in _STATISTICS if not storage.exists(storage.join(self.decoder_uri, name))]
        if missing:
            raise CaptureError(
                f"{storage.join(self.decoder_uri, missing[0])}: missing, but other statistics are there; "
                f"fetch {', '.join(missing)} again, or remove the others"
            )
        self.normalization()


def _parent(uri: str) -> str:
    """The folder above; of a bucket or the root, itself."""
    above = uri.rpartition("/")[0]
    return uri if above in ("s3:/", "file:/", "file://") else above
