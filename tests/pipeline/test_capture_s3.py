"""A capture on S3 is read like one on disk."""

import numpy as np
import pytest

from lipflow.errors import CaptureError
from pipeline.captures.opening import open_capture
from pipeline.dome.scene import synthesise_frame
from pipeline.dome.writer import DomeConfig, write_dome

CONFIG = DomeConfig(
    cameras=2, image_size_hw=(24, 16), texture_size=16, segments=1, frames_per_segment=1, missing_fraction=0.3
)


def test_dome_is_written_to_and_read_from_s3(s3_server):
    uri = s3_server.uri("captures", "tiny")
    write_dome(CONFIG, uri)
    capture = open_capture(uri)
    ((segment, (stem,)),) = capture.segments.items()
    made, read = synthesise_frame(CONFIG, segment, 0), capture.frame(segment, stem)
    np.testing.assert_array_equal(read.vertices(), made.vertices)
    np.testing.assert_array_equal(read.world_from_head(), made.world_from_head)
    np.testing.assert_array_equal(read.keypoints(), made.keypoints)
    lost = [read.image_file(camera.camera_id) is None for camera in capture.cameras]
    lost += [read.headset_file(camera.camera_id) is None for camera in capture.headset_cameras]
    assert lost == made.missing.tolist()
    assert capture.normalization() is not None


def test_folder_on_s3_that_is_no_capture_is_refused(s3_server):
    with pytest.raises(CaptureError, match="not a capture"):
        open_capture(s3_server.uri("nothing", "here"))
