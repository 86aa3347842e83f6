"""How images and textures of a capture stand in its shards: codecs, sizes, lenses, textures made from images."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lipflow.errors import CaptureError, ConfigError, ShardSetError
from pipeline import storage
from pipeline.capture import Capture
from pipeline.captures.opening import open_capture
from pipeline.images.codecs import LosslessCodec, decode_any_image, decode_image
from pipeline.loading.member_reads import read_mesh_and_texture
from pipeline.loading.shardset import ShardSet
from pipeline.manifest import Manifest
from pipeline.sharding.samples import average_texture_suffix
from pipeline.sharding.shards import ShardConfig, plan_shards, write_shards
from pipeline.sharding.undistort import Undistorter
from tests.pipeline.sealed_manifests import read_manifest, write_manifest

CONFIG = ShardConfig(frames_per_shard=4)


def test_png_images_and_textures_are_stored_as_they_were_captured(dome: Capture, tmp_path: Path):
    manifest = write_shards(dome, ShardConfig(texture_codec="png"), str(tmp_path))
    for shard in manifest.shards:
        for sample in shard.samples:
            segment, _, frame = sample.frame_id.partition("/")
            offset, size, _ = sample.members["avgtex.png"]
            stored = storage.read_range(tmp_path / shard.name, offset, size)
            assert stored == dome.frame(segment, frame).average_texture_file()
            for camera in dome.cameras:
                captured = dome.frame(segment, frame).image_file(camera.camera_id)
                suffix = f"{camera.camera_id}.image.png"
                assert (captured is None) == (suffix not in sample.members)
                if captured is not None:
                    offset, size, _ = sample.members[suffix]
                    assert storage.read_range(tmp_path / shard.name, offset, size) == captured


@pytest.mark.parametrize("texture_codec", ["planar", "webp", "png"])
def test_average_textures_are_lossless_under_every_codec(dome: Capture, tmp_path: Path, texture_codec: LosslessCodec):
    manifest = write_shards(dome, ShardConfig(texture_codec=texture_codec), str(tmp_path))
    assert manifest.texture_codec == texture_codec
    suffix = average_texture_suffix(texture_codec)
    shard = manifest.shards[0]
    for sample in shard.samples:
        segment, _, frame = sample.frame_id.partition("/")
        captured = dome.frame(segment, frame).average_texture_file()
        assert captured is not None
        stored = storage.read_range(tmp_path / shard.name, *sample.members[suffix][:2])
        np.testing.assert_array_equal(decode_image(stored, suffix), decode_any_image(captured, "captured"))
        texture, _ = read_mesh_and_texture(str(tmp_path / shard.name), sample)
        batch = ShardSet.open(tmp_path).frames([sample.frame_id], manifest.train_camera_ids[:1])
        np.testing.assert_array_equal(batch.average_texture[0].numpy(), texture)


def test_a_lossy_or_unknown_texture_codec_is_refused(dome: Capture, shards_folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="texture_codec"):
        ShardConfig.model_validate({"texture_codec": "jpeg"})
    document = read_manifest(shards_folder)
    document["config"]["texture_codec"] = "jpeg"
    write_manifest(tmp_path, document)
    with pytest.raises(ShardSetError, match=r"texture_codec is 'jpeg', no lossless image codec"):
        Manifest.load(str(tmp_path))


@pytest.mark.parametrize("codec", ["webp", "jpeg"])
def test_images_and_textures_are_resized_with_their_cameras(dome: Capture, tmp_path: Path, codec: str):
    config = ShardConfig(image_size_hw=(24, 12), texture_size=16, codec=codec, frames_per_shard=100)
    manifest = write_shards(dome, config, str(tmp_path))
    assert manifest.image_size_hw == (24, 12)
    for record, camera in zip(manifest.cameras, dome.cameras, strict=True):
        scale = np.diag([12 / 36, 24 / 48, 1])
        np.testing.assert_allclose(record.intrinsics, scale @ camera.intrinsics, rtol=1e-12)
    extension = {"webp": "webp", "jpeg": "jpg"}[codec]
    shard = manifest.shards[0]
    for suffix, (offset, size, _) in shard.samples[0].members.items():
        body = storage.read_range(tmp_path / shard.name, offset, size)
        if suffix.endswith(f".image.{extension}"):
            assert Image.open(io.BytesIO(body)).size == (12, 24)
        if suffix == "avgtex.plz":
            assert decode_image(body, suffix).shape == (16, 16, 3)


def test_a_missing_average_texture_is_unwrapped_from_the_training_cameras(own_dome_folder: Path, tmp_path: Path):
    """Where the capture has the texture as well, both agree: the median texel is off by 6 (measured).

    The unwrapped one has the cameras' noise and colours in it.
    """
    folder = own_dome_folder / "unwrapped_uv_1024" / "SEN_a_good_morrow" / "average"
    original = np.asarray(Image.open(folder / "000001.png").convert("RGB")).astype(int)
    (folder / "000001.png").unlink()
    manifest = write_shards(open_capture(own_dome_folder), ShardConfig(), str(tmp_path / "out"))
    for shard in manifest.shards:
        for sample in shard.samples:
            offset, size, _ = sample.members["frame.json"]
            facts = json.loads(storage.read_range(tmp_path / "out" / shard.name, offset, size))
            made = sample.frame_id == "SEN_a_good_morrow/000001"
            assert facts["average_texture"] == ("unwrapped" if made else "capture")
            if made:
                assert 0.4 < facts["texture_seen_fraction"] <= 1
                offset, size, _ = sample.members["avgtex.plz"]
                body = storage.read_range(tmp_path / "out" / shard.name, offset, size)
                stored = decode_image(body, "avgtex.plz").astype(int)
                assert np.median(np.abs(stored - original)) < 12


def test_view_textures_are_stored_on_request(own_dome_folder: Path, tmp_path: Path):
    folder = own_dome_folder / "unwrapped_uv_1024" / "EXP_smile" / "400002"
    folder.mkdir()
    Image.new("RGB", (32, 32), (9, 8, 7)).save(folder / "000001.png")
    manifest = write_shards(open_capture(own_dome_folder), ShardConfig(store_view_textures=True), str(tmp_path / "o"))
    with_texture = {
        (sample.frame_id, suffix)
        for shard in manifest.shards
        for sample in shard.samples
        for suffix in sample.members
        if ".tex." in suffix
    }
    assert with_texture == {("EXP_smile/000001", "400002.tex.png")}


def bent(folder: Path) -> Capture:
    """The capture with a lens before one of its cameras."""
    capture = open_capture(folder)
    camera = replace(capture.cameras[1], distortion=np.array([0.3, 0, 0, 0, 0]))
    capture.cameras = (capture.cameras[0], camera, *capture.cameras[2:])
    return capture


def test_images_of_a_lens_are_undistorted(dome_folder: Path, manifest: Manifest, tmp_path: Path):
    capture = bent(dome_folder)
    undistorted = write_shards(capture, CONFIG, str(tmp_path))
    shard = undistorted.shards[0]
    sample = next(sample for sample in shard.samples if "400002" not in sample.missing_views)
    segment, _, stem = sample.frame_id.partition("/")
    for camera in capture.cameras[:2]:
        body = capture.frame(segment, stem).image_file(camera.camera_id)
        offset, size, _ = sample.members[f"{camera.camera_id}.image.png"]
        stored = np.asarray(Image.open(io.BytesIO(storage.read_range(tmp_path / shard.name, offset, size))))
        captured = np.asarray(Image.open(io.BytesIO(body)))
        np.testing.assert_array_equal(stored, Undistorter(camera).apply(captured))
        assert (stored != captured).any() == bool(camera.distortion.any())
    assert undistorted.cameras == manifest.cameras


def test_distortion_is_refused_on_request(dome_folder: Path):
    with pytest.raises(CaptureError, match=r"400002 has distortion .* undistort"):
        plan_shards(bent(dome_folder), ShardConfig(distortion="refuse"))


def test_mixed_image_sizes_ask_for_one(dome_folder: Path):
    capture = open_capture(dome_folder)
    capture.cameras = (capture.cameras[0].resized((10, 10)), *capture.cameras[1:])
    with pytest.raises(ConfigError, match="image_size_hw"):
        plan_shards(capture, CONFIG)
