"""Captures seen through another one: everything is the inner capture's, but what a subclass changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lipflow.types import Camera, Normalization, Topology
from pipeline.capture import Asset, Capture, CaptureFrame, HeadsetSequence, SegmentListing


class CaptureView:
    """Delegates the whole :class:`pipeline.capture.Capture` protocol to ``inner``."""

    def __init__(self, inner: Capture):
        self.inner = inner

    @property
    def layout(self) -> str:
        """As the inner capture's."""
        return self.inner.layout

    @property
    def uri(self) -> str:
        """As the inner capture's."""
        return self.inner.uri

    @property
    def cameras(self) -> tuple[Camera, ...]:
        """As the inner capture's."""
        return self.inner.cameras

    @property
    def headset_cameras(self) -> tuple[Camera, ...]:
        """As the inner capture's."""
        return self.inner.headset_cameras

    @property
    def frontal_camera_id(self) -> str | None:
        """As the inner capture's."""
        return self.inner.frontal_camera_id

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        """As the inner capture's."""
        return self.inner.keypoint_names

    @property
    def topology(self) -> Topology:
        """As the inner capture's."""
        return self.inner.topology

    @property
    def segments(self) -> dict[str, tuple[str, ...]]:
        """As the inner capture's."""
        return self.inner.segments

    @property
    def texture_size(self) -> int:
        """As the inner capture's."""
        return self.inner.texture_size

    @property
    def headset_sequence(self) -> HeadsetSequence | None:
        """As the inner capture's."""
        return self.inner.headset_sequence

    def frame(self, segment: str, frame: str) -> CaptureFrame:
        """As the inner capture's."""
        return self.inner.frame(segment, frame)

    def normalization(self) -> Normalization | None:
        """As the inner capture's."""
        return self.inner.normalization()

    def listing(self, segment: str) -> SegmentListing:
        """As the inner capture's."""
        return self.inner.listing(segment)

    def shared_assets(self) -> Iterator[Asset]:
        """As the inner capture's."""
        return self.inner.shared_assets()

    def notes(self) -> tuple[str, ...]:
        """As the inner capture's."""
        return self.inner.notes()


class SelectedCameras(CaptureView):
    """A capture with some of its dome cameras alone."""

    def __init__(self, inner: Capture, camera_ids: Collection[str]):
        super().__init__(inner)
        self._cameras = tuple(camera for camera in inner.cameras if camera.camera_id in camera_ids)

    @property
    def cameras(self) -> tuple[Camera, ...]:
        """The selected ones, in calibration order."""
        return self._cameras
