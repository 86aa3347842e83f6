"""The Ava-256 reader on a capture in the exact public layout."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lipflow.errors import CaptureError
from pipeline import storage, zip_index
from pipeline.capture import Capture, CaptureFrame, HeadsetSequence, require_pinhole
from pipeline.captures.ava256 import SEGMENTATION_CLASSES, Ava256Capture
from pipeline.captures.goliath import refuse_goliath
from pipeline.captures.headset_sequence import HEADSET_CAMERA_IDS
from pipeline.dome.scene import dome_scene, synthesise_frame
from pipeline.images.codecs import CodecError, decode_any_image
from tests.pipeline import ava256_layout as layout
from tests.pipeline.ava256_capture import CAMERA, CONFIG, DISTORTION, change_member, faults, first_frame


@pytest.fixture(scope="module")
def capture(ava256_folder: Path) -> Ava256Capture:
    return Ava256Capture(str(ava256_folder))


def pixels(body: bytes | None) -> np.ndarray:
    with Image.open(io.BytesIO(body or b"")) as image:
        return np.asarray(image.convert("RGB"))


def test_capture_and_its_parts_are_what_the_protocols_say(capture):
    assert isinstance(capture, Capture)
    assert isinstance(capture.frame(*first_frame(capture)), CaptureFrame)
    assert isinstance(capture.headset_sequence, HeadsetSequence)
    assert capture.layout == "ava256"


def test_every_file_reads_back(capture):
    scene = dome_scene(CONFIG)
    frames = layout.planned_frames(CONFIG)
    listed = {(segment, stem) for segment, stems in capture.segments.items() for stem in stems}
    assert listed == {(frame.segment, frame.stem) for frame in frames}
    missing = 0
    for planned in frames:
        made, read = (
            synthesise_frame(CONFIG, planned.segment, planned.index),
            capture.frame(planned.segment, planned.stem),
        )
        np.testing.assert_array_equal(read.vertices(), made.vertices)
        np.testing.assert_array_equal(read.world_from_head(), made.world_from_head)
        texture = layout.avif_bytes(made.average_texture[::-1])
        assert read.average_texture_file() == texture
        np.testing.assert_array_equal(decode_any_image(read.average_texture_file(), "texture"), pixels(texture))
        np.testing.assert_array_equal(read.keypoints_3d(), layout.keypoints_3d(CONFIG, planned))
        for number, camera in enumerate(scene.cameras):
            body, parts = read.image_file(camera.camera_id), read.segmentation_file(camera.camera_id)
            if made.missing[number]:
                assert body is None
                assert parts is None
                missing += 1
                continue
            image = decode_any_image(body, "image")
            np.testing.assert_array_equal(image, pixels(layout.avif_bytes(made.images[number])))
            # 4 grey levels: AVIF's way through YUV, measured 3 at worst on this capture
            assert np.abs(image.astype(int) - made.images[number]).max() <= 4
            np.testing.assert_array_equal(
                decode_any_image(parts, "parts", "L"), layout.segmentation(made.images[number])
            )
        assert read.view_texture_file("400001") is read.headset_file("left-eye") is read.keypoints() is None
    assert 0 < missing < 12, "the configuration loses some views and keeps some"


def test_cameras_are_those_of_the_dome_scaled_from_the_sensor(capture):
    made = dome_scene(CONFIG).cameras
    assert [camera.camera_id for camera in capture.cameras] == [camera.camera_id for camera in made]
    for read, camera in zip(capture.cameras, made, strict=True):
        np.testing.assert_allclose(read.intrinsics, camera.intrinsics, rtol=1e-12)
        np.testing.assert_array_equal(read.cam_from_world, camera.cam_from_world)
        np.testing.assert_array_equal(read.distortion, [*DISTORTION, 0.0])
        assert read.image_size_hw == (128, 83)
    with pytest.raises(CaptureError, match="camera 400001 has distortion"):
        require_pinhole(capture.cameras, "calibration")


def test_vertex_projects_to_the_sensors_pixel_over_the_scale(ava256_folder, capture):
    """By hand, as the public demo does: K_full [R|t] headpose v, over the factor by which images were reduced."""
    frame = capture.frame(*first_frame(capture))
    vertex = frame.vertices()[1234].astype(np.float64)
    for entry, camera in zip(
        json.loads((ava256_folder / "decoder/camera_calibration.json").read_text())["KRT"], capture.cameras, strict=True
    ):
        world = frame.world_from_head() @ np.append(vertex, 1.0)
        ours = camera.intrinsics @ (camera.cam_from_world @ np.append(world, 1.0))
        by_hand = np.append(world, 1.0) @ np.array(entry["T"])[:, :3] @ np.array(entry["K"])
        sensor_px = by_hand[:2] / by_hand[2]
        expected = sensor_px / [2668 / 83, 4096 / 128]
        np.testing.assert_allclose(ours[:2] / ours[2], expected, rtol=1e-12)


def test_one_odd_image_does_not_decide_the_cameras_size(own_ava256_folder):
    first = own_ava256_folder / f"decoder/image/cam{CAMERA}.zip"
    change_member(first, f"cam{CAMERA}/000120.avif", layout.avif_bytes(np.zeros((64, 41, 3), np.uint8)))
    assert Ava256Capture(str(own_ava256_folder)).cameras[0].image_size_hw == (128, 83)
    change_member(first, f"cam{CAMERA}/000120.avif", b"no image")
    assert Ava256Capture(str(own_ava256_folder)).cameras[0].image_size_hw == (128, 83)
    for number in (1, 2, 3):
        layout.write_zip(own_ava256_folder / f"decoder/image/cam40000{number}.zip", {"000120.avif": b"no image"})
    with pytest.raises(CodecError, match=r"cam400001\.zip!000120\.avif: not a readable image"):
        _ = Ava256Capture(str(own_ava256_folder)).cameras
    for number in (1, 2, 3):
        layout.write_zip(own_ava256_folder / f"decoder/image/cam40000{number}.zip", {})
    with pytest.raises(CaptureError, match="no image tells the cameras' resolution"):
        _ = Ava256Capture(str(own_ava256_folder)).cameras


def test_topology_and_statistics_are_read(ava256_folder, capture):
    face = dome_scene(CONFIG).face.topology
    np.testing.assert_array_equal(capture.topology.faces, face.faces)
    np.testing.assert_array_equal(capture.topology.uvs, face.uvs)
    np.testing.assert_array_equal(capture.topology.weight_mask, np.ones((1, 1)))
    assert capture.topology.landmarks == {}
    assert capture.texture_size == 32
    frames = [synthesise_frame(CONFIG, frame.segment, frame.index) for frame in layout.planned_frames(CONFIG)]
    statistics = capture.normalization()
    mean = np.mean([frame.average_texture for frame in frames], axis=0).transpose(2, 0, 1)
    np.testing.assert_array_equal(statistics.texture_mean, np.rint(mean))
    vertices = np.stack([frame.vertices for frame in frames]).astype(np.float64)
    np.testing.assert_array_equal(statistics.vertices_mean, vertices.mean(axis=0).astype(np.float32))
    assert statistics.vertices_std == pytest.approx(np.sqrt(vertices.var(axis=0).mean() + 1e-6), rel=1e-12)


def test_headset_capture_has_its_own_frames(capture):
    sequence = capture.headset_sequence
    planned = layout.planned_headset_frames(CONFIG)
    assert sequence.camera_ids == HEADSET_CAMERA_IDS
    assert sequence.segments == {planned[0].segment: tuple(frame.stem for frame in planned)}
    assert not set(sequence.segments[planned[0].segment]) & {
        stem for stems in capture.segments.values() for stem in stems
    }
    scene, seen = dome_scene(CONFIG), 0
    for frame in planned:
        made = synthesise_frame(CONFIG, frame.segment, frame.index)
        there = 0
        for number, camera in enumerate(scene.headset.cameras):
            camera_id = layout.HEADSET_ZIPS[camera.camera_id].removeprefix("cam-")
            body = sequence.image_file(frame.segment, frame.stem, camera_id)
            assert (body is None) == made.missing[len(scene.cameras) + number]
            assert (frame.stem in sequence.present(frame.segment, camera_id)) == (body is not None)
            if body is not None:  # AVIF of grey is lossless
                np.testing.assert_array_equal(decode_any_image(body, "headset", "L"), made.headset_images[number])
                there += 1
        assets = list(sequence.assets(frame.segment, frame.stem))
        assert len(assets) == there
        for asset in assets:
            asset.check()
        seen += there
    assert 0 < seen < 10
    with pytest.raises(CaptureError, match="no headset camera 'cyclops'; there are cyclop,"):
        sequence.image_file(planned[0].segment, planned[0].stem, "cyclops")
    with pytest.raises(CaptureError, match=r"000120 is not in frame_list\.csv"):
        sequence.image_file(planned[0].segment, "000120", "cyclop")


def test_listing_and_assets_name_exactly_what_is_there(capture):
    scene, expected = dome_scene(CONFIG), 0
    for planned in layout.planned_frames(CONFIG):
        made, listing = synthesise_frame(CONFIG, planned.segment, planned.index), capture.listing(planned.segment)
        for number, camera in enumerate(scene.cameras):
            assert (planned.stem in listing.images[camera.camera_id]) == (not made.missing[number])
        assert listing.vertices == listing.poses == listing.average_textures == set(capture.segments[planned.segment])
        sources = [asset.source for asset in capture.frame(planned.segment, planned.stem).assets()]
        assert len(sources) == len(set(sources)) == 4 + 2 * int((~made.missing[: len(scene.cameras)]).sum())
        expected += len(sources)
    assert expected > 20
    assert faults(capture) == {}
    assert [asset.source for asset in capture.shared_assets() if asset.source.endswith(".zip")].__len__() == 4 + 6 + 5


def test_addresses_of_members_name_archive_and_member(capture, ava256_folder):
    frame = capture.frame(*first_frame(capture))
    decoder = f"file://{ava256_folder}/decoder"
    assert frame.source_of("image", CAMERA) == f"{decoder}/image/cam{CAMERA}.zip!cam{CAMERA}/000120.avif"
    assert frame.source_of("vertices") == f"{decoder}/kinematic_tracking/registration_vertices.zip!000120.ply"
    assert frame.source_of("keypoints") == f"file://{ava256_folder} (no keypoints in this layout)"
    assert sorted(SEGMENTATION_CLASSES) == list(range(1, 11))


def test_each_zip_is_opened_once_for_two_captures_in_a_process(own_ava256_folder, monkeypatch):
    """And each member is one request."""
    zip_index._cache.clear()
    requests: list[str] = []
    read_range = storage.read_range

    def counted(uri, offset, length):
        requests.append(uri)
        return read_range(uri, offset, length)

    monkeypatch.setattr(storage, "read_range", counted)
    for already in (0, 1):
        capture = Ava256Capture(str(own_ava256_folder))
        for segment in capture.segments:
            capture.listing(segment)
        assert len(requests) == (2 if already else 6 + 2), "six directories once, and two probes for the images' size"
        requests.clear()
        frame = capture.frame(*first_frame(capture))
        bodies = [frame.vertices(), frame.world_from_head(), frame.average_texture_file()]
        bodies += [frame.image_file(camera.camera_id) for camera in capture.cameras]
        assert len(requests) == sum(body is not None for body in bodies)
        requests.clear()


def test_capture_on_s3_and_the_decoder_folder_alone_read_the_same(ava256_folder, capture, s3_server):
    uri = s3_server.uri("ava", "capture")
    storage.upload_dir(ava256_folder, uri)
    for other in (Ava256Capture(uri), Ava256Capture(str(ava256_folder / "decoder"))):
        assert other.segments == capture.segments
        assert other.headset_sequence.segments == capture.headset_sequence.segments
        frame, same = other.frame(*first_frame(other)), capture.frame(*first_frame(capture))
        np.testing.assert_array_equal(frame.vertices(), same.vertices())
        for camera in other.cameras:
            assert frame.image_file(camera.camera_id) == same.image_file(camera.camera_id)


def test_members_without_their_folder_and_frames_without_zeros_are_read(own_ava256_folder, capture):
    images = own_ava256_folder / f"decoder/image/cam{CAMERA}.zip"
    layout.write_zip(images, {name.partition("/")[2]: body for name, body in layout.read_zip(images).items()})
    meshes = own_ava256_folder / "decoder/kinematic_tracking/registration_vertices.zip"
    layout.write_zip(meshes, {f"registration_vertices/{name}": body for name, body in layout.read_zip(meshes).items()})
    frame_list = own_ava256_folder / "decoder/frame_list.csv"
    frame_list.write_text(frame_list.read_text().replace(",000", ","))
    moved = Ava256Capture(str(own_ava256_folder))
    assert moved.segments == capture.segments
    for segment in moved.segments:
        assert moved.listing(segment) == capture.listing(segment)
    frame, same = moved.frame(*first_frame(moved)), capture.frame(*first_frame(capture))
    assert frame.image_file(CAMERA) == same.image_file(CAMERA)
    np.testing.assert_array_equal(frame.vertices(), same.vertices())


@pytest.mark.parametrize("place", ["capture", "capture/decoder", "."])
def test_topology_is_found_in_the_capture_or_once_beside_all(own_ava256_folder, capture, place):
    (own_ava256_folder / "face_topology.obj").rename(own_ava256_folder.parent / "kept.obj")
    with pytest.raises(CaptureError, match=r"no topology: put assets/face_topology\.obj of https://github\.com"):
        _ = Ava256Capture(str(own_ava256_folder)).topology
    (own_ava256_folder.parent / "kept.obj").rename(own_ava256_folder.parent / place / "face_topology.obj")
    np.testing.assert_array_equal(Ava256Capture(str(own_ava256_folder)).topology.faces, capture.topology.faces)


def test_layouts_are_told_apart(own_ava256_folder, tmp_path):
    assert Ava256Capture.is_at(str(own_ava256_folder))
    assert Ava256Capture.is_at(str(own_ava256_folder / "decoder"))
    assert not Ava256Capture.is_at(str(tmp_path))
    (own_ava256_folder / "decoder/frame_list.csv").rename(own_ava256_folder / "decoder/frame_splits_list.csv")
    assert not Ava256Capture.is_at(str(own_ava256_folder / "decoder"))
    with pytest.raises(CaptureError, match=r"Goliath, which is not read: .* frame_segments_list\.csv"):
        refuse_goliath(str(own_ava256_folder / "decoder"))
    with pytest.raises(CaptureError, match="a capture of Goliath"):
        Ava256Capture(str(own_ava256_folder / "decoder"))
    refuse_goliath(str(own_ava256_folder))


def test_capture_travels_to_another_process_without_its_indices(capture):
    capture.listing(first_frame(capture)[0])
    body = pickle.dumps(capture)
    assert len(body) < 2 * 2**20
    assert pickle.loads(body).frame(*first_frame(capture)).image_file(CAMERA) == capture.frame(
        *first_frame(capture)
    ).image_file(CAMERA)
