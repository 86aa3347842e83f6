"""An Ava-256 capture goes through the shard job like any other: undistorted, driven, its zips as they are."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import dome_scene
from pipeline.driving.driven import DrivingConfig
from pipeline.loading.loader import ShardSet
from pipeline.sharding.shards import ShardConfig, write_shards
from pipeline.sharding.splits import SplitConfig
from pipeline.sharding.undistort import Undistorter
from tests.pipeline.ava256_layout import LAYOUT_CONFIG, write_ava256

LENS = (-0.3, 0.1, 0.002, -0.001)


def test_ava256_becomes_a_shard_set_of_pinhole_cameras_with_driving_signals(tmp_path: Path):
    capture_folder, shards_folder = tmp_path / "capture", tmp_path / "shards"
    write_ava256(capture_folder, LAYOUT_CONFIG, LENS)
    landmarks = tmp_path / "landmarks.json"
    landmarks.write_text(json.dumps(dict(dome_scene(LAYOUT_CONFIG).face.topology.landmarks)))
    config = ShardConfig(
        splits=SplitConfig(test_fraction=0, val_fraction=0), driving=DrivingConfig(landmarks=str(landmarks))
    )
    capture = open_capture(capture_folder)
    manifest = write_shards(capture, config, str(shards_folder))
    assert sum(len(shard.samples) for shard in manifest.shards) == sum(map(len, capture.segments.values()))
    assert manifest.frontal_camera_id in {camera.camera_id for camera in capture.cameras}
    assert len(manifest.headset_cameras) == 5
    for shard in manifest.shards:
        for sample in shard.samples:
            segment, _, stem = sample.frame_id.partition("/")
            for camera in capture.cameras:
                body = capture.frame(segment, stem).image_file(camera.camera_id)
                captured = np.asarray(Image.open(io.BytesIO(body or b"")).convert("RGB"))
                offset, size, _ = sample.members[f"{camera.camera_id}.image.png"]
                stored = Image.open(io.BytesIO(storage.read_range(shards_folder / shard.name, offset, size)))
                np.testing.assert_array_equal(np.asarray(stored), Undistorter(camera).apply(captured))
    batch = ShardSet.open(shards_folder).frames([manifest.shards[0].samples[0].frame_id], manifest.train_camera_ids)
    assert batch.driving.available() == ("hmc", "frontal", "keypoints")
    assert bool(batch.driving.hmc_present.all())
    assert (batch.driving.keypoints[..., 2] > 0).float().mean() > 0.5
