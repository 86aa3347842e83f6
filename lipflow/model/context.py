"""What an avatar knows of its capture: enough to be used without it, and to know it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lipflow.errors import ConfigError
from lipflow.types import Camera, Normalization, Topology


@dataclass(frozen=True)
class AvatarContext:
    """The capture's constants that the networks, the fitting and the renderer need.

    Attributes:
        topology: of all meshes.
        normalization: statistics of the training segments and cameras.
        camera_ids: all dome cameras, in the order that ``FrameBatch.camera_index`` refers to.
        train_camera_ids: those with images in training, in any order; only they get colour parameters. The first of
            them in the order of ``camera_ids`` is the anchor.
        headset_cameras: in the order of ``DrivingSignals.hmc_images``, at the size of those images; () if none.
        frontal_camera_id: the camera of the frontal image and of the keypoints; None if none.
        frontal_image_hw: (height, width) of the frontal image, to which its intrinsics refer; None if none.
        keypoint_names: keys of ``topology.landmarks`` in the order of ``DrivingSignals.keypoints``; () if none.
    """

    topology: Topology
    normalization: Normalization
    camera_ids: tuple[str, ...]
    train_camera_ids: tuple[str, ...]
    headset_cameras: tuple[Camera, ...] = ()
    frontal_camera_id: str | None = None
    frontal_image_hw: tuple[int, int] | None = None
    keypoint_names: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.train_camera_ids:
            raise ConfigError("the context names no training camera: give at least one in train_camera_ids")
        strangers = sorted(set(self.train_camera_ids) - set(self.camera_ids))
        if strangers:
            raise ConfigError(
                f"training cameras {strangers} are not among the capture's {len(self.camera_ids)} cameras"
            )
        unknown = sorted(set(self.keypoint_names) - set(self.topology.landmarks))
        if unknown:
            raise ConfigError(f"keypoints {unknown} are no landmarks of the topology: name only those it has")
        sizes = {camera.image_size_hw for camera in self.headset_cameras}
        if len(sizes) > 1:
            raise ConfigError(f"headset cameras have images of different sizes {sorted(sizes)}: resize them to one")

    @property
    def offered_signals(self) -> tuple[str, ...]:
        """The driving signals that this capture can show."""
        from lipflow.model.drivers import registered_signals  # not above: the drivers are built from contexts

        return tuple(signal.name for signal in registered_signals() if signal.offered(self))

    @property
    def landmark_vertices(self) -> list[int]:
        """Vertex index of every keypoint."""
        return [int(self.topology.landmarks[name]) for name in self.keypoint_names]

    def require_same_capture(self, found: AvatarContext, signals: Sequence[str] = (), *, cameras: bool = True) -> None:
        """Refuse the constants of another capture than this avatar's.

        Args:
            found: what a shard set says of its capture.
            signals: that the avatar is to be driven by with it.
            cameras: whether its dome cameras are looked through, too.

        Raises:
            ConfigError: the mesh, the dome cameras, or what shows one of the signals is not that of this capture.
        """
        remedy = "give a shard set of the same capture"
        made = "the avatar was made for"
        expected, there = self.topology, found.topology
        if expected.num_vertices != there.num_vertices or not np.array_equal(expected.faces, there.faces):
            raise ConfigError(
                f"the avatar's mesh has {expected.num_vertices} vertices, the shard set's {there.num_vertices}, or "
                f"other faces: {remedy}"
            )
        if cameras and self.camera_ids != found.camera_ids:
            raise ConfigError(
                f"{made} {len(self.camera_ids)} cameras, the shard set has {len(found.camera_ids)}, or other cameras: "
                f"{remedy}"
            )
        for signal in signals:
            theirs = found._shown_by(signal)
            for what, mine in self._shown_by(signal).items():
                if mine != theirs[what]:
                    raise ConfigError(
                        f"{signal}: {made} {what} {mine}, the shard set has {theirs[what]}: {remedy}, or use another "
                        "signal"
                    )

    def _shown_by(self, signal: str) -> dict[str, object]:
        """The names of what shows a signal; images may have any size."""
        if signal == "hmc":
            return {"headset cameras": [camera.camera_id for camera in self.headset_cameras]}
        if signal == "frontal":
            return {"frontal camera": self.frontal_camera_id}
        return {"frontal camera": self.frontal_camera_id, "keypoints": list(self.keypoint_names)}
