"""The headset capture of Ava-256: ``encoder/``, with its own segments and frames, not paired with the dome's.

Source: ``DATASHEET.md`` (Composition, question 4) of https://github.com/facebookresearch/ava-256.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from lipflow.errors import CaptureError
from pipeline import storage
from pipeline.capture import Asset
from pipeline.captures.ava256_files import parse_frame_list
from pipeline.captures.frame_zip import FrameZip
from pipeline.images.codecs import decode_any_image

HEADSET_CAMERA_IDS = (
    "cyclop",
    "left-eye-atl-temporal",
    "left-mouth",
    "right-eye-atl-temporal",
    "right-mouth",
)
"""The five infrared cameras; their zips are named ``cam-ID.zip``."""


class ZippedHeadsetSequence:
    """The headset capture in a folder; implements :class:`pipeline.capture.HeadsetSequence`.

    Args:
        uri: the folder ``encoder``, which holds ``frame_list.csv`` and ``image/cam-ID.zip``.

    Raises:
        CaptureError: its frame list cannot be used.
    """

    def __init__(self, uri: str):
        self.uri = storage.normalize_uri(uri)
        path = storage.join(self.uri, "frame_list.csv")
        self.segments = parse_frame_list(storage.read_text(path), path)
        self._zips = {
            camera_id: FrameZip(storage.join(self.uri, "image", f"cam-{camera_id}.zip"), f"cam-{camera_id}", "avif")
            for camera_id in HEADSET_CAMERA_IDS
        }

    @property
    def camera_ids(self) -> tuple[str, ...]:
        """The five cameras, without the ``cam-`` of their files."""
        return HEADSET_CAMERA_IDS

    def image_file(self, segment: str, frame: str, camera_id: str) -> bytes | None:
        """AVIF of one camera; None if it is missing.

        Raises:
            CaptureError: no such frame or camera, or a damaged zip.
        """
        self._check_listed(segment, frame)
        if camera_id not in self._zips:
            raise CaptureError(
                f"{self.uri}: no headset camera {camera_id!r}; there are {', '.join(HEADSET_CAMERA_IDS)}"
            )
        return self._zips[camera_id].read(frame)

    def present(self, segment: str, camera_id: str) -> frozenset[str]:
        """The listed frames of a segment that a camera has, by the zip's index alone."""
        return self._zips[camera_id].present(self.segments[segment])

    def assets(self, segment: str, frame: str) -> Iterator[Asset]:
        """The images of one frame that are there."""
        self._check_listed(segment, frame)
        for frames in self._zips.values():
            if frames.has(frame):
                yield Asset(frames.source_of(frame), partial(_check_image, frames, frame))

    def shared_assets(self) -> Iterator[Asset]:
        """The directories of the zips that are there."""
        return (Asset(frames.uri, frames.check) for frames in self._zips.values() if frames.is_there)

    def _check_listed(self, segment: str, frame: str) -> None:
        if frame not in self.segments.get(segment, ()):
            raise CaptureError(f"{self.uri}: frame {segment}/{frame} is not in frame_list.csv")


def _check_image(frames: FrameZip, frame: str) -> None:
    decode_any_image(frames.read(frame) or b"", frames.source_of(frame), "L")
