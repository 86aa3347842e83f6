"""A tiny capture with everything in it: a bulged grid as face, four dome cameras, two headset cameras."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lipflow.config import AvatarConfig
from lipflow.model.avatar import Avatar
from lipflow.model.context import AvatarContext
from lipflow.render.renderer import Renderer
from lipflow.types import Camera, CameraTensors, DrivingSignals, FrameBatch, Normalization, Topology

CAMERA_IDS = ("cam-a", "cam-b", "cam-c", "cam-d")
TRAIN_CAMERA_IDS = ("cam-b", "cam-c", "cam-d")
KEYPOINTS = ("nose", "chin", "left", "right")


def grid_topology(side: int) -> Topology:
    """A ``side x side`` sheet of vertices that covers the whole texture; unequal weights."""
    index = np.arange(side * side).reshape(side, side)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
    faces = np.concatenate([np.stack(t, -1).reshape(-1, 3) for t in ((a, b, c), (a, c, d))]).astype(np.int64)
    v, u = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side), indexing="ij")
    mask = np.ones((16, 16), np.float32)
    mask[4:8, 4:12] = 3
    middle = side // 2
    landmarks = {
        "nose": int(index[middle, middle]),
        "chin": int(index[1, middle]),
        "left": int(index[middle, 1]),
        "right": int(index[middle, side - 2]),
    }
    return Topology(faces, np.stack([u, v], -1).reshape(-1, 2).astype(np.float32), faces, mask, landmarks, side * side)


def grid_mean_vertices(side: int) -> np.ndarray:
    """The sheet of 160 mm, bulged towards +z, where the cameras are; y grows upwards as v does."""
    v, u = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side), indexing="ij")
    z = 40 * np.cos(u * 1.2) * np.cos(v * 1.2)
    return np.stack([80 * u, 80 * v, z], -1).reshape(-1, 3).astype(np.float32)


def look_at_origin(azimuth: float, elevation: float, distance: float) -> np.ndarray:
    """``cam_from_head (3, 4)`` of a camera that looks at the origin, OpenCV axes, image y down."""
    direction = np.array(
        [math.sin(azimuth) * math.cos(elevation), math.sin(elevation), math.cos(azimuth) * math.cos(elevation)]
    )
    forward = -direction
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    return np.concatenate([rotation, (-rotation @ (distance * direction))[:, None]], 1)


def intrinsics(image_size_hw: tuple[int, int], focal_in_heights: float) -> np.ndarray:
    height, width = image_size_hw
    focal = focal_in_heights * height
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])


def make_context(side: int = 9, texture_size: int = 32, headset_hw: tuple[int, int] = (24, 32)) -> AvatarContext:
    generator = np.random.default_rng(3)
    statistics = Normalization(
        texture_mean=generator.uniform(80, 180, (3, texture_size, texture_size)).astype(np.float32),
        texture_std=40.0,
        vertices_mean=grid_mean_vertices(side),
        vertices_std=5.0,
    )
    headset = tuple(
        Camera(name, intrinsics(headset_hw, 0.8), look_at_origin(azimuth, -0.2, 150.0), headset_hw)
        for name, azimuth in (("left-mouth", 0.5), ("right-mouth", -0.5))
    )
    return AvatarContext(
        topology=grid_topology(side),
        normalization=statistics,
        camera_ids=CAMERA_IDS,
        train_camera_ids=TRAIN_CAMERA_IDS,
        headset_cameras=headset,
        frontal_camera_id="cam-b",
        frontal_image_hw=(32, 24),
        keypoint_names=KEYPOINTS,
    )


def dome_cameras(frames: int, views: int, image_hw: tuple[int, int]) -> CameraTensors:
    poses = [look_at_origin(0.35 * (view - (views - 1) / 2), 0.1 * (view % 2), 600.0) for view in range(views)]
    pose = torch.tensor(np.array(poses), dtype=torch.float32)
    matrix = torch.tensor(intrinsics(image_hw, 2.5), dtype=torch.float32)
    return CameraTensors(matrix.expand(frames, views, 3, 3).clone(), pose.expand(frames, views, 3, 4).clone())


def make_batch(
    context: AvatarContext, frames: int = 2, image_hw: tuple[int, int] = (32, 24), views: int = 3, seed: int = 0
) -> FrameBatch:
    """Random frames with all signals present."""
    generator = torch.Generator().manual_seed(seed)
    statistics = context.normalization
    size = statistics.texture_mean.shape[-1]
    mean = torch.from_numpy(statistics.vertices_mean)
    vertices = mean + statistics.vertices_std * torch.randn(frames, *mean.shape, generator=generator)
    headset_hw = context.headset_cameras[0].image_size_hw
    count = len(context.headset_cameras)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randint(60, 200, shape, generator=generator, dtype=torch.uint8)

    def stacked(arrays) -> torch.Tensor:
        tensor = torch.tensor(np.array(arrays), dtype=torch.float32)
        return tensor.expand(frames, *tensor.shape).clone()

    cameras = dome_cameras(frames, views, image_hw)
    frontal = CameraTensors(cameras.intrinsics[:, views // 2].clone(), cameras.cam_from_head[:, views // 2].clone())
    keypoints = torch.rand(frames, len(context.keypoint_names), 3, generator=generator) * 4 + 10
    keypoints[..., 2] = 0.9
    train = [context.camera_ids.index(camera_id) for camera_id in context.train_camera_ids]
    return FrameBatch(
        frame_ids=[f"SEG/{frame:06d}" for frame in range(frames)],
        vertices=vertices,
        average_texture=noise(frames, 3, size, size),
        images=noise(frames, views, 3, *image_hw),
        view_present=torch.ones(frames, views, dtype=torch.bool),
        camera_index=torch.tensor([train[view % len(train)] for view in range(views)]).expand(frames, views).clone(),
        cameras=cameras,
        driving=DrivingSignals(
            hmc_images=noise(frames, count, 1, *headset_hw),
            hmc_present=torch.ones(frames, count, dtype=torch.bool),
            hmc_cameras=CameraTensors(
                stacked([camera.intrinsics for camera in context.headset_cameras]),
                stacked([camera.cam_from_world for camera in context.headset_cameras]),
            ),
            frontal_images=noise(frames, 3, *(context.frontal_image_hw or image_hw)),
            frontal_present=torch.ones(frames, dtype=torch.bool),
            keypoints=keypoints,
            frontal_cameras=frontal,
        ),
    )


TINY = {
    "texture_size": 32,
    "latent_size": 6,
    "hidden_size": 12,
    "encoder_channels": (6, 5, 4),
    "decoder_channels": (6, 5, 4),
    "warp_channels": (4, 3),
    "driver_image_size": 16,
    "driver_channels": (5, 4),
    "driver_hidden_size": 12,
    "driver_landmark_size": 8,
    "driver_subset_dropout": 0.0,
    "flow_hidden_size": 8,
}


@pytest.fixture(scope="session")
def context() -> AvatarContext:
    return make_context()


@pytest.fixture
def batch(context: AvatarContext) -> FrameBatch:
    return make_batch(context)


@pytest.fixture(scope="session")
def batch_of(context: AvatarContext) -> Callable[..., FrameBatch]:
    """Builds batches: ``batch_of(frames=, views=, image_hw=, seed=)``."""

    def build(**sizes) -> FrameBatch:
        return make_batch(context, **sizes)

    return build


@pytest.fixture(scope="session")
def renderer(context: AvatarContext) -> Renderer:
    return Renderer(context.topology)


@pytest.fixture
def make_avatar(context: AvatarContext) -> Callable[..., Avatar]:
    """Builds a tiny avatar; keyword arguments change its config."""

    def build(**changes) -> Avatar:
        return Avatar(AvatarConfig(**(TINY | changes)), context)

    return build


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
