"""An open shard set: what its manifest says, and random access to any frame and view."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lipflow.errors import ShardSetError
from lipflow.render.camera import cam_from_head_tensor
from lipflow.types import (
    DRIVING_SIGNALS,
    Camera,
    CameraTensors,
    DrivingSignals,
    FrameBatch,
    Normalization,
    Topology,
)
from pipeline import storage
from pipeline.loading.frames import BatchPixels, FrameArrays, FrameReader
from pipeline.loading.member_reads import fetch_members
from pipeline.manifest import CaptureRecord, Manifest, SampleRecord, ShardRecord
from pipeline.setfiles import NORMALIZATION_NAME, TOPOLOGY_NAME, decode_normalization, decode_topology
from pipeline.sharding.samples import image_suffix


@dataclass(frozen=True)
class _Calibration:
    """Of one capture: ``intrinsics (C, 3, 3)`` and ``poses (C, 3, 4)`` in the set's order of cameras."""

    intrinsics: np.ndarray
    poses: np.ndarray
    headset_intrinsics: np.ndarray
    headset_poses: np.ndarray

    @classmethod
    def of(cls, capture: CaptureRecord, manifest: Manifest) -> _Calibration:
        by_id = {record.camera_id: record.camera() for record in capture.cameras}
        # What a batch holds for an absent view is never compared with anything, but has to be a camera that renders.
        cameras = [by_id.get(camera_id, capture.cameras[0].camera()) for camera_id in manifest.camera_ids]
        headset = [record.camera() for record in capture.headset_cameras]
        return cls(
            intrinsics=np.array([camera.intrinsics for camera in cameras], np.float32),
            poses=np.array([camera.cam_from_world for camera in cameras]),
            headset_intrinsics=np.array([camera.intrinsics for camera in headset], np.float32),
            headset_poses=np.array([camera.cam_from_world for camera in headset], np.float32),
        )


class ShardSet:
    """A committed shard set; use :meth:`open`.

    Attributes:
        uri: where it lies.
        manifest: what it holds.
        topology: with the weight mask at the stored texture size.
        normalization: statistics of the training frames.
        cameras: the dome cameras at the stored image size; ``FrameBatch.camera_index`` indexes this list.
        headset_cameras: ``cam_from_world`` holds cam_from_head.

    In a set of several captures, :attr:`cameras` and :attr:`headset_cameras` tell the calibration of the first capture
    that has each, for their ids and sizes. Batches hold K and pose of each frame's own capture; a camera that it lacks
    is an absent view, which takes those of the capture's first camera.
    """

    def __init__(self, uri: str, manifest: Manifest, topology: Topology, normalization: Normalization):
        self.uri = uri
        self.manifest = manifest
        self.topology = topology
        self.normalization = normalization
        self.cameras: list[Camera] = [record.camera() for record in manifest.cameras]
        self.headset_cameras: list[Camera] = [record.camera() for record in manifest.headset_cameras]
        self._camera_place = {camera.camera_id: place for place, camera in enumerate(self.cameras)}
        self._calibrations = {capture.name: _Calibration.of(capture, manifest) for capture in manifest.captures}
        self._samples = {sample.frame_id: (shard, sample) for shard in manifest.shards for sample in shard.samples}

    @classmethod
    def open(cls, uri: str | Path) -> ShardSet:
        """Open the set at a path or URI.

        Raises:
            ShardSetError: there is no manifest, or the files do not match it.
        """
        normal = storage.normalize_uri(uri)
        manifest = Manifest.load(normal)
        bodies = {}
        for name in (TOPOLOGY_NAME, NORMALIZATION_NAME):
            bodies[name] = storage.read_bytes(storage.join(normal, name))
            if hashlib.sha256(bodies[name]).hexdigest() != manifest.files.get(name):
                raise ShardSetError(f"{normal}: {name} does not match the manifest; shard the capture again")
        topology = decode_topology(bodies[TOPOLOGY_NAME], TOPOLOGY_NAME)
        return cls(normal, manifest, topology, decode_normalization(bodies[NORMALIZATION_NAME], NORMALIZATION_NAME))

    @property
    def digest(self) -> str:
        """SHA-256 over all that determines the data."""
        return self.manifest.digest

    @property
    def train_camera_ids(self) -> list[str]:
        """The cameras for training."""
        return list(self.manifest.train_camera_ids)

    @property
    def test_camera_ids(self) -> list[str]:
        """The held-out cameras."""
        return list(self.manifest.test_camera_ids)

    @property
    def frontal_camera_id(self) -> str | None:
        """The camera of the ``frontal`` and ``keypoints`` signals."""
        return self.manifest.frontal_camera_id

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        """The names of the rows of the keypoints."""
        return self.manifest.keypoint_names

    def frame_ids(self, split: str) -> list[str]:
        """All frames of ``"train"``, ``"val"`` or ``"test"``, sorted: segment by segment, in time."""
        samples = (sample for shard in self.shards(split) for sample in shard.samples)
        return sorted(sample.frame_id for sample in samples)

    def shards(self, split: str) -> list[ShardRecord]:
        """The shards of a split.

        Raises:
            ShardSetError: there is no such split.
        """
        if split not in self.manifest.splits:
            raise ShardSetError(f"{self.uri}: no split {split!r}; choose one of {', '.join(self.manifest.splits)}")
        return [shard for shard in self.manifest.shards if shard.split == split]

    def camera_places(self, camera_ids: Sequence[str]) -> list[int]:
        """Indices into :attr:`cameras`.

        Raises:
            ShardSetError: the set has no such camera.
        """
        unknown = [camera_id for camera_id in camera_ids if camera_id not in self._camera_place]
        if unknown:
            raise ShardSetError(f"{self.uri}: no camera {unknown[0]!r}; choose from the manifest's cameras")
        return [self._camera_place[camera_id] for camera_id in camera_ids]

    def frames(
        self, frame_ids: Sequence[str], camera_ids: Sequence[str], signals: Sequence[str] = DRIVING_SIGNALS
    ) -> FrameBatch:
        """Frames by name, each with the same views, read by range requests; for evaluation and tools.

        Range requests cannot be checked against a shard's digest; the tar's headers and the members' own formats are.

        Raises:
            ShardSetError: an unknown frame or camera, or a damaged member.
        """
        places = np.array(self.camera_places(camera_ids), np.int64).reshape(1, -1).repeat(len(frame_ids), axis=0)
        reader = FrameReader(self.manifest, signals)
        pixels = reader.allocate(len(frame_ids), len(camera_ids))
        arrays = []
        for row, frame_id in enumerate(frame_ids):
            shard, sample = self._record(frame_id)
            fetched = fetch_members(storage.join(self.uri, shard.name), sample, reader.suffixes(camera_ids))
            arrays.append(reader.read(sample, fetched, camera_ids, pixels.frame(row)))
        return self.batch(list(frame_ids), arrays, pixels, places)

    def __getitem__(self, frame_id: str) -> FrameBatch:
        """One frame with the views of all cameras and all driving signals, as a batch of one.

        Raises:
            ShardSetError: an unknown frame, or a damaged member.
        """
        return self.frames([frame_id], [camera.camera_id for camera in self.cameras])

    def view(self, frame_id: str, camera_id: str) -> torch.Tensor | None:
        """The image ``(3, H, W)`` uint8 of one view, by one range request; None where the capture lacks it.

        Its memory is as that of :attr:`FrameBatch.images`.

        Raises:
            ShardSetError: an unknown frame or camera, or a damaged member.
        """
        self.camera_places([camera_id])
        shard, sample = self._record(frame_id)
        suffix = image_suffix(camera_id, str(self.manifest.config["codec"]))
        if suffix not in sample.members:
            return None
        fetched = fetch_members(storage.join(self.uri, shard.name), sample, [suffix])
        reader = FrameReader(self.manifest, signals=())
        image = reader.allocate(1, 1).images[0, 0]
        reader.read_view(sample, fetched, camera_id, image.numpy())
        return image

    def batch(
        self, frame_ids: list[str], frames: list[FrameArrays], pixels: BatchPixels, camera_places: np.ndarray
    ) -> FrameBatch:
        """Put decoded frames together; ``camera_places (B, K)`` index :attr:`cameras`."""
        world_from_head = np.stack([frame.world_from_head for frame in frames])
        # by the frames that were decoded: one that only fills a batch has another id
        own = [self._calibrations[self.manifest.capture_of(frame.frame_id).name] for frame in frames]
        intrinsics = np.stack([one.intrinsics[row] for one, row in zip(own, camera_places, strict=True)])
        poses = np.stack([one.poses[row] for one, row in zip(own, camera_places, strict=True)])
        return FrameBatch(
            frame_ids=frame_ids,
            vertices=_stack([frame.vertices for frame in frames]),
            average_texture=pixels.average_texture,
            images=pixels.images,
            view_present=_stack([frame.view_present for frame in frames]),
            camera_index=torch.from_numpy(camera_places.astype(np.int64)),
            cameras=CameraTensors(torch.from_numpy(intrinsics), cam_from_head_tensor(poses, world_from_head[:, None])),
            driving=self._driving(frames, pixels, world_from_head, own),
        )

    def _driving(
        self, frames: list[FrameArrays], pixels: BatchPixels, world_from_head: np.ndarray, own: list[_Calibration]
    ) -> DrivingSignals:
        signals = DrivingSignals()
        if frames[0].headset is not None:
            signals.hmc_images = _stack([frame.headset for frame in frames])
            signals.hmc_present = _stack([frame.headset_present for frame in frames])
            signals.hmc_cameras = CameraTensors(
                torch.from_numpy(np.stack([one.headset_intrinsics for one in own])),
                torch.from_numpy(np.stack([one.headset_poses for one in own])),
            )
        if pixels.frontal is not None:
            signals.frontal_images = pixels.frontal
            signals.frontal_present = torch.tensor([frame.frontal_present for frame in frames])
        if frames[0].keypoints is not None:
            signals.keypoints = _stack([frame.keypoints for frame in frames])
        if self.frontal_camera_id is not None:
            place = self._camera_place[self.frontal_camera_id]
            signals.frontal_cameras = CameraTensors(
                torch.from_numpy(np.stack([one.intrinsics[place] for one in own])),
                cam_from_head_tensor(np.stack([one.poses[place] for one in own]), world_from_head),
            )
        return signals

    def _record(self, frame_id: str) -> tuple[ShardRecord, SampleRecord]:
        if frame_id not in self._samples:
            raise ShardSetError(f"{self.uri}: no frame {frame_id!r}; expected SEGMENT/FRAME of the manifest")
        return self._samples[frame_id]


def _stack(arrays: Sequence[np.ndarray | None]) -> torch.Tensor:
    return torch.from_numpy(np.stack([array for array in arrays if array is not None]))
