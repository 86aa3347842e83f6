"""How the images of a batch lie in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lipflow.types import colour_planes, map_tensors
from pipeline.capture import Capture
from pipeline.images.codecs import ImageCodec
from pipeline.loading.loader import LoaderConfig, ShardLoader, ShardSet
from pipeline.sharding.plan import ShardConfig
from pipeline.sharding.shards import write_shards


@pytest.mark.parametrize("codec", ["png", "jpeg", "planar"])
def test_images_lie_in_memory_as_their_codec_decodes_them(dome: Capture, tmp_path: Path, codec: ImageCodec):
    """By pixels, like channels-last tensors, or by planes; copies keep it. Textures always lie by planes."""
    write_shards(dome, ShardConfig(codec=codec), str(tmp_path))
    shard_set = ShardSet.open(tmp_path)
    config = LoaderConfig(frames_per_batch=4, views_per_frame=2)
    loaded = next(iter(ShardLoader(shard_set, "train", shard_set.train_camera_ids, config).epoch(0)))
    single = shard_set.frames(loaded.frame_ids[:1], shard_set.train_camera_ids)
    height, width = shard_set.manifest.image_size_hw
    strides = (height * width, width, 1) if codec == "planar" else (1, 3 * width, 3)
    for batch in (loaded, single, map_tensors(loaded, torch.clone)):
        assert batch.images.shape[2:] == (3, height, width)
        frontal = batch.driving.frontal_images
        assert frontal is not None
        assert batch.images.stride()[2:] == frontal.stride()[1:] == strides
        assert batch.average_texture.is_contiguous()
        planes = colour_planes(batch.images)
        assert planes.is_contiguous()
        assert planes.dtype == torch.float32
        assert torch.equal(planes, batch.images)
    view = shard_set.view(loaded.frame_ids[0], shard_set.train_camera_ids[0])
    assert view is not None
    assert view.stride() == strides
