"""The one function that opens a capture, in whichever layout it is."""

from __future__ import annotations

from pathlib import Path

from lipflow.errors import CaptureError
from pipeline import storage
from pipeline.capture import Capture
from pipeline.captures.ava256 import Ava256Capture
from pipeline.captures.goliath import refuse_goliath
from pipeline.captures.multiface import MultifaceCapture


def open_capture(uri: str | Path) -> Capture:
    """Open the capture at a path, ``file://`` or ``s3://`` URI, in whichever layout it is.

    Raises:
        CaptureError: there is no capture, or its calibration or frame list cannot be used.
    """
    folder = storage.normalize_uri(uri)
    if MultifaceCapture.is_at(folder):
        return MultifaceCapture(folder)
    if Ava256Capture.is_at(folder):
        return Ava256Capture(folder)
    refuse_goliath(folder)
    raise CaptureError(
        f"{folder}: not a capture: it has neither KRT and frame_list.txt (Multiface) nor "
        "decoder/camera_calibration.json and decoder/frame_list.csv (Ava-256); give the folder that holds them"
    )
