"""The synthetic dome, and the Multiface reader that reads it back."""

import hashlib
import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from lipflow.errors import CaptureError, StorageError
from lipflow.render.camera import cam_from_head_tensor, look_at
from lipflow.render.renderer import Renderer
from lipflow.types import Camera, CameraTensors
from pipeline.capture import Capture, CaptureFrame
from pipeline.captures.krt import format_krt
from pipeline.captures.opening import open_capture
from pipeline.dome import writer as dome_module
from pipeline.dome.motion import head_motion, segment_names, segment_weights
from pipeline.dome.rig import krt_rig, upright_head
from pipeline.dome.scene import FrameShoot, dome_scene, synthesise_frame
from pipeline.dome.writer import (
    DomeConfig,
    finish_dome,
    pending_runs,
    plan_dome,
    write_dome,
    write_dome_run,
    write_dome_static,
)
from pipeline.driving.picture import PictureTaker

CONFIG = DomeConfig(
    cameras=7,
    image_size_hw=(96, 72),
    texture_size=48,
    segments=3,
    frames_per_segment=2,
    headset_image_size_hw=(24, 32),
    supersampling=1,
    noise_std=0.0,
    color_bias=0.0,
    seed=5,
)


@pytest.fixture(scope="module")
def dome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dome")
    write_dome(CONFIG, str(folder))
    return folder


@pytest.fixture(scope="module")
def capture(dome: Path) -> Capture:
    return open_capture(dome)


def picture(body: bytes | None) -> np.ndarray:
    assert body is not None
    return np.asarray(Image.open(io.BytesIO(body)))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_capture_follows_the_protocol(capture):
    assert isinstance(capture, Capture)
    segment = next(iter(capture.segments))
    assert isinstance(capture.frame(segment, "000000"), CaptureFrame)
    assert capture.segments == plan_dome(CONFIG).segments
    assert capture.texture_size == CONFIG.texture_size


def test_cameras_come_back_as_they_were(capture):
    scene = dome_scene(CONFIG)
    read_cameras, made_cameras = (*capture.cameras, *capture.headset_cameras), (*scene.cameras, *scene.headset.cameras)
    for read, made in zip(read_cameras, made_cameras, strict=True):
        assert read.camera_id == made.camera_id
        assert read.image_size_hw == made.image_size_hw
        np.testing.assert_allclose(read.intrinsics, made.intrinsics, rtol=1e-14)
        np.testing.assert_array_equal(read.cam_from_world, made.cam_from_world)
    assert capture.frontal_camera_id == scene.frontal_camera_id


def test_calibration_file_counts_integer_pixel_centres(dome, capture):
    first_row_of_k = (dome / "KRT").read_text().splitlines()[1].split()
    assert float(first_row_of_k[2]) == pytest.approx(capture.cameras[0].intrinsics[0, 2] - 0.5, abs=1e-12)


def assert_same_frame(capture: Capture, config: DomeConfig, segment: str, index: int) -> None:
    """What is read is what was synthesised, to the last bit."""
    made, read = synthesise_frame(config, segment, index), capture.frame(segment, f"{index:06d}")
    np.testing.assert_array_equal(read.vertices(), made.vertices)
    np.testing.assert_array_equal(read.world_from_head(), made.world_from_head)
    np.testing.assert_array_equal(read.keypoints(), made.keypoints)
    np.testing.assert_array_equal(picture(read.average_texture_file()), made.average_texture[::-1])
    for camera, image in zip(capture.cameras, made.images, strict=True):
        assert image.shape == (*config.image_size_hw, 3)
        np.testing.assert_array_equal(picture(read.image_file(camera.camera_id)), image)
        assert read.view_texture_file(camera.camera_id) is None
    for camera, image in zip(capture.headset_cameras, made.headset_images, strict=True):
        np.testing.assert_array_equal(picture(read.headset_file(camera.camera_id)), image)


@pytest.mark.parametrize("index", [0, 1])
def test_frames_come_back_as_they_were(capture, index):
    for segment in capture.segments:
        assert_same_frame(capture, CONFIG, segment, index)


@pytest.mark.parametrize("image_size_hw", [(33, 47), (71, 35), (64, 64), (1, 9)])
def test_images_of_any_size_come_back_as_they_were(tmp_path, image_size_hw):
    config = DomeConfig(
        cameras=3,
        image_size_hw=image_size_hw,
        texture_size=23,
        segments=1,
        frames_per_segment=1,
        headset_image_size_hw=(11, 17),
        supersampling=3,
    )
    write_dome(config, str(tmp_path))
    capture = open_capture(tmp_path)
    scene = dome_scene(config)
    assert_same_frame(capture, config, next(iter(capture.segments)), 0)
    for read, made in zip(capture.cameras, scene.cameras, strict=True):
        assert read.image_size_hw == image_size_hw
        np.testing.assert_array_equal(read.cam_from_world, made.cam_from_world)
        # The calibration counts pixels from their centres; the principal point loses its last bit on the way.
        np.testing.assert_allclose(read.intrinsics, made.intrinsics, rtol=1e-14)


def test_each_picture_can_be_taken_alone_and_in_any_order():
    config = CONFIG.model_copy(update={"noise_std": 1.5})
    whole = synthesise_frame(config, "EXP_smile", 1)
    shoot = FrameShoot(config, "EXP_smile", 1)
    np.testing.assert_array_equal(shoot.headset_images(), whole.headset_images)
    for index in (4, 0, 6, 4):
        np.testing.assert_array_equal(shoot.image(index), whole.images[index])
    np.testing.assert_array_equal(shoot.average_texture(), whole.average_texture)
    noise = (whole.images[0].astype(float) - synthesise_frame(CONFIG, "EXP_smile", 1).images[0])[60:, 30:50]
    assert noise.std() == pytest.approx(1.5, rel=0.1)


def test_a_frame_takes_the_memory_of_a_picture_whatever_the_number_of_cameras(tmp_path):
    def peak_bytes(cameras: int) -> int:
        config = CONFIG.model_copy(
            update={"cameras": cameras, "image_size_hw": (384, 256), "frames_per_segment": 1, "segments": 1}
        )
        write_dome(config, str(tmp_path / f"{cameras}"))
        tracemalloc.start()
        try:
            write_dome_run(config, plan_dome(config).runs[0], str(tmp_path / f"{cameras}"))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # Measured: 7.4 MB both times. The pictures of 24 cameras are 38 MB.
    assert peak_bytes(24) < 1.1 * peak_bytes(3)


def test_topology_comes_back_as_it_was(capture):
    made, read = dome_scene(CONFIG).face.topology, capture.topology
    for name in ("faces", "uvs", "uv_faces"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
    np.testing.assert_allclose(read.weight_mask, made.weight_mask, atol=1 / 64 + 1e-6)
    assert read.landmarks == dict(made.landmarks)
    assert capture.keypoint_names == tuple(made.landmarks)


def test_rendered_mesh_covers_the_image_silhouette_in_every_camera(capture):
    renderer = Renderer(capture.topology)
    frame = capture.frame("EXP_smile", "000001")
    intrinsics = torch.tensor(np.stack([camera.intrinsics for camera in capture.cameras]))[None].float()
    poses = np.stack([camera.cam_from_world for camera in capture.cameras])
    views = CameraTensors(intrinsics, cam_from_head_tensor(poses, frame.world_from_head())[None])
    texture = torch.ones(1, 1, 3, 4, 4)
    mask = renderer.render(torch.from_numpy(frame.vertices())[None], texture, views, CONFIG.image_size_hw).mask[0]
    for camera, rendered in zip(capture.cameras, mask.numpy(), strict=True):
        seen = picture(frame.image_file(camera.camera_id)).max(axis=-1) > 4
        assert seen.mean() > 0.15
        # One sample a pixel, and both rasterise alike; measured: 1 in every camera.
        assert (seen & rendered).sum() / (seen | rendered).sum() >= 0.999


def test_pictures_agree_with_the_differentiable_renderer():
    scene = dome_scene(CONFIG)
    camera, supersampling, head = scene.cameras[2], 2, scene.world_from_head
    texture = np.random.default_rng(0).uniform(0, 255, (32, 32, 3)).astype(np.float32)
    mine = PictureTaker(scene.face.topology, supersampling).take(scene.face.neutral, texture, camera, head)
    fine = np.diag([supersampling, supersampling, 1.0]) @ camera.intrinsics
    views = CameraTensors(
        torch.tensor(fine).float()[None, None], cam_from_head_tensor(camera.cam_from_world, head)[None, None]
    )
    size = tuple(supersampling * edge for edge in camera.image_size_hw)
    colours = torch.from_numpy(texture).permute(2, 0, 1)[None, None]
    out = Renderer(scene.face.topology).render(torch.from_numpy(scene.face.neutral)[None], colours, views, size)
    expected = torch.nn.functional.avg_pool2d(out.image[0], supersampling)[0].permute(1, 2, 0).numpy()
    coverage = torch.nn.functional.avg_pool2d(out.mask.float()[0], supersampling)[0].numpy()
    # float32 poses in the renderer, float64 here: a few samples at edges change sides.
    differs = np.abs(mine[..., :3] - expected).max(axis=-1) > 0.5
    assert differs.mean() < 2e-3
    assert (np.abs(mine[..., 3] - coverage) > 1e-6).mean() < 2e-3


def test_bytes_are_a_function_of_the_config_whatever_the_order(dome, tmp_path):
    other = tmp_path / "other"
    dome_scene.cache_clear()
    runs = plan_dome(CONFIG).runs
    for run in reversed(runs):
        write_dome_run(CONFIG, run, str(other))
    write_dome_static(CONFIG, str(other))
    write_dome_run(CONFIG, runs[0], str(other))
    finish_dome(CONFIG, str(other))
    assert digests(other) == digests(dome)


def test_runs_cut_every_segment_into_successive_frames_of_bounded_work():
    plan = plan_dome(DomeConfig(segments=3, frames_per_segment=40))
    for segment, stems in plan.segments.items():
        cuts = [(run.start, run.stop) for run in plan.runs if run.segment == segment]
        assert [frame for start, stop in cuts for frame in range(start, stop)] == list(range(len(stems)))
        assert len(cuts) > 1
    large = {"image_size_hw": (2048, 1334), "frames_per_segment": 8, "segments": 1}
    assert [run.stop - run.start for run in plan_dome(DomeConfig(cameras=40, **large)).runs] == [2, 2, 2, 2]
    assert len(plan_dome(DomeConfig(cameras=160, **large)).runs) == 8


def test_what_was_interrupted_goes_on_from_the_last_whole_run(dome, tmp_path, monkeypatch):
    plan = plan_dome(CONFIG)
    assert pending_runs(plan, str(tmp_path)) == list(plan.runs)
    write_dome_static(CONFIG, str(tmp_path))
    write_dome_run(CONFIG, plan.runs[1], str(tmp_path))
    with monkeypatch.context() as patch:

        def end_of_disk(_shoot, _camera):
            raise OSError("no space left")

        patch.setattr(FrameShoot, "image", end_of_disk)
        with pytest.raises(OSError, match="no space left"):
            write_dome_run(CONFIG, plan.runs[2], str(tmp_path))
    assert pending_runs(plan, str(tmp_path)) == [plan.runs[0], plan.runs[2]]
    with pytest.raises(StorageError, match=f"{plan.runs[0].statistics_file}"):
        finish_dome(CONFIG, str(tmp_path))
    with pytest.raises(CaptureError, match=r"frame_list\.txt: the file is missing"):
        open_capture(tmp_path)
    for run in pending_runs(plan, str(tmp_path)):
        write_dome_run(CONFIG, run, str(tmp_path))
    finish_dome(CONFIG, str(tmp_path))
    assert digests(tmp_path) == digests(dome)


def test_another_seed_gives_another_capture():
    other = CONFIG.model_copy(update={"seed": 6})
    segment = plan_dome(CONFIG).segments
    name = next(iter(segment))
    first, second = synthesise_frame(CONFIG, name, 1), synthesise_frame(other, name, 1)
    assert np.abs(first.vertices - second.vertices).max() > 0.1
    assert np.abs(first.world_from_head - second.world_from_head).max() > 0.01


@pytest.mark.parametrize("frames_per_run", [1, 16])
def test_statistics_are_those_of_the_files(tmp_path, monkeypatch, frames_per_run):
    monkeypatch.setattr(dome_module, "_MOST_FRAMES_PER_RUN", frames_per_run)
    assert len(plan_dome(CONFIG).runs) == (6 if frames_per_run == 1 else 3)
    write_dome(CONFIG, str(tmp_path))
    capture = open_capture(tmp_path)
    frames = [capture.frame(segment, stem) for segment, stems in capture.segments.items() for stem in stems]
    vertices = np.stack([frame.vertices() for frame in frames]).astype(np.float64)
    textures = np.stack([picture(frame.average_texture_file())[::-1] for frame in frames]).astype(np.float64)
    found = capture.normalization()
    np.testing.assert_allclose(found.vertices_mean, vertices.mean(axis=0), atol=1e-4)
    assert found.vertices_std == pytest.approx(vertices.std(axis=0).__pow__(2).mean() ** 0.5, rel=1e-6)
    np.testing.assert_allclose(found.texture_mean, textures.mean(axis=0).transpose(2, 0, 1), atol=0.51)
    assert found.texture_std == pytest.approx(((textures - textures.mean(axis=0)) ** 2).mean() ** 0.5, rel=1e-6)


def test_lost_views_are_recorded_facts(tmp_path):
    config = CONFIG.model_copy(update={"missing_fraction": 0.4, "segments": 1})
    write_dome(config, str(tmp_path))
    capture = open_capture(tmp_path)
    (segment,) = capture.segments
    expected = [synthesise_frame(config, segment, index).missing for index in range(2)]
    assert 0 < np.mean(expected) < 1
    for stem, missing in zip(capture.segments[segment], expected, strict=True):
        frame = capture.frame(segment, stem)
        lost = [frame.image_file(camera.camera_id) is None for camera in capture.cameras]
        lost += [frame.headset_file(camera.camera_id) is None for camera in capture.headset_cameras]
        assert lost == missing.tolist()


def test_a_lost_view_changes_no_other_file(dome, tmp_path):
    write_dome(CONFIG.model_copy(update={"missing_fraction": 0.2}), str(tmp_path))
    whole, kept = digests(dome), digests(tmp_path)
    assert kept.items() < whole.items()
    assert {Path(name).parts[0] for name in whole.keys() - kept.keys()} == {"images", "driving"}


def test_cameras_differ_in_colour_and_the_first_is_the_anchor():
    scene = dome_scene(DomeConfig(cameras=40, image_size_hw=(16, 12), texture_size=16))
    assert scene.gains.shape == scene.biases.shape == (40, 3)
    np.testing.assert_array_equal(scene.gains[0], 1)
    np.testing.assert_array_equal(scene.biases[0], 0)
    assert np.abs(scene.gains[1:] - 1).max() <= 0.1
    assert scene.gains[1:].std() > 0.02
    assert len({camera.camera_id for camera in scene.cameras}) == 40


def test_rig_surrounds_the_face_at_about_a_metre():
    scene = dome_scene(DomeConfig(cameras=40, image_size_hw=(16, 12), texture_size=16))
    head = scene.world_from_head
    centres = [-(c.cam_from_world[:, :3].T @ c.cam_from_world[:, 3]) - head[:, 3] for c in scene.cameras]
    in_head = np.array(centres) @ head[:, :3]
    assert 900 < np.linalg.norm(in_head, axis=1).min() < np.linalg.norm(in_head, axis=1).max() < 1200
    azimuth = np.degrees(np.arctan2(in_head[:, 0], in_head[:, 2]))
    assert azimuth.min() < -60
    assert azimuth.max() > 60
    assert in_head[:, 1].min() < -250
    assert in_head[:, 1].max() > 400


def test_appearance_depends_on_view_and_expression():
    scene = dome_scene(CONFIG)
    face, head = scene.face, scene.world_from_head
    rest = np.zeros(len(face.names))
    centres = np.array([[0.0, 0.0, 1000.0], [700.0, 0.0, 700.0]])
    skin = scene.appearance.light(face.neutral, rest, head)
    front, side = (skin.view(centre) for centre in centres)
    assert np.abs(front - side).max() > 15
    puffed = rest.copy()
    puffed[[face.names.index("cheekPuffLeft"), face.names.index("cheekPuffRight")]] = 1
    flushed = scene.appearance.light(face.neutral, puffed, head).view(centres[0])
    green_over_red = (flushed[..., 1] - front[..., 1]) - (flushed[..., 0] - front[..., 0])
    assert green_over_red.min() < -8


def test_segments_use_all_shapes_and_sentences_are_mixtures():
    face = dome_scene(CONFIG).face
    names = segment_names(20)
    assert len(set(names)) == 20
    assert sum(name.startswith("EXP_") for name in names) == 12
    weights = {name: segment_weights(name, 30, face.names, face.deltas, 3) for name in names}
    assert all(((w >= 0) & (w <= 1)).all() for w in weights.values())
    expressed = np.max([w.max(axis=0) for name, w in weights.items() if name.startswith("EXP_")], axis=0)
    assert (expressed > 0.4).all()
    active = [(w > 0.1).sum(axis=1).max() for name, w in weights.items() if name.startswith("SEN_")]
    assert min(active) >= 5
    steps = [np.abs(np.diff(w, axis=0)).max() for w in weights.values()]
    assert max(steps) < 0.7


def test_heads_move_a_little_and_stay_rigid():
    poses = head_motion("SEN_x", 30, upright_head(np.array([0.0, 0.0, 1025.0])), 4.0, 5.0, seed=1)
    turns = poses[:, :, :3] @ np.diag([1.0, -1.0, -1.0])
    angle = np.degrees(np.arccos(np.clip((np.trace(turns, axis1=1, axis2=2) - 1) / 2, -1, 1)))
    assert 1.0 < angle.max() < 7.0
    assert np.abs(poses[:, :, 3] - [0, 0, 1025]).max() <= 5.0
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turns.shape), atol=1e-12)


def test_unknown_config_key_is_refused():
    with pytest.raises(ValidationError, match="cameraz"):
        DomeConfig(cameraz=3)


def test_rig_with_distortion_is_refused(tmp_path):
    block = "7\n9 0 1\n0 9 1\n0 0 1\n0.1 0 0 0 0\n1 0 0 0\n0 1 0 0\n0 0 1 900\n"
    (tmp_path / "KRT").write_text(block)
    with pytest.raises(CaptureError, match=r"camera 7 has distortion \[0\.1.*undistort"):
        krt_rig(tmp_path / "KRT", (64, 48))


def test_rig_without_its_file_is_refused(tmp_path):
    with pytest.raises(CaptureError, match="no such KRT file"):
        krt_rig(tmp_path / "KRT", (64, 48))


def test_rig_of_a_calibration_file_puts_the_head_where_the_axes_meet(tmp_path):
    target = np.array([30.0, -20.0, 1000.0])
    k = np.array([[7700.0, 0, 667], [0, 7700.0, 1024], [0, 0, 1]])
    cameras = [
        Camera(str(i), k, look_at(np.array(centre), target, (0.0, -1.0, 0.0)), (2048, 1334))
        for i, centre in enumerate([(0.0, 0.0, 0.0), (500.0, 10.0, 200.0), (-300.0, 400.0, 100.0)])
    ]
    (tmp_path / "KRT").write_text(format_krt(cameras))
    rig, world_from_head = krt_rig(tmp_path / "KRT", (128, 96))
    np.testing.assert_allclose(world_from_head[:, 3], target, atol=1e-6)
    scale = 128 / 2048
    np.testing.assert_allclose(rig[0].intrinsics[0], [7700 * scale, 0, 48], atol=1e-9)
