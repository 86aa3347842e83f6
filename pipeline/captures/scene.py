"""What a synthetic dome sees: its config, the scene that all frames share, and one frame as a pure function.

Simplifications: average textures carry no camera colour and do not consider occlusion; there is no background.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, PositiveInt

from lipflow.config import StrictConfig
from lipflow.render.camera import compose
from lipflow.types import Camera
from pipeline.captures.appearance import Appearance, LitSkin
from pipeline.captures.face import FaceAsset, procedural_face
from pipeline.captures.headset import headset_cameras, headset_exposure, headset_gains
from pipeline.captures.landmarks import noisy_keypoints, project_landmarks
from pipeline.captures.motion import head_motion, segment_generator, segment_weights
from pipeline.captures.picture import take_pictures
from pipeline.captures.realface import load_realface
from pipeline.captures.rig import arc_rig, krt_rig

_TEXELS_AT_ONCE = 4_000_000


class DomeConfig(StrictConfig):
    """What to synthesise.

    Attributes:
        cameras: number of dome cameras; ignored with ``krt``.
        image_size_hw: (height, width) of the dome's images, pixels.
        texture_size: edge length of the average textures, texels.
        segments: number of segments, about three expressions for two sentences.
        frames_per_segment: frames in each.
        seed: of everything random.
        missing_fraction: share of the dome's and the headset's views that are not written.
        supersampling: rendered pixels a stored pixel, along each axis.
        noise_std: sensor noise, grey levels.
        color_gain: how far a camera's channel gains stray from 1.
        color_bias: how far a camera's channel biases stray from 0, grey levels.
        head_rotation_deg: amplitude of the head's turns.
        head_translation_mm: amplitude of the head's shifts.
        headset_image_size_hw: (height, width) of the headset's images, pixels.
        headset_noise_std: sensor noise of the headset, grey levels.
        keypoint_noise_px: noise of the keypoints, pixels of ``image_size_hw``.
        face: folder of a real face asset; None for the procedural head.
        krt: KRT file whose rig is used; None for a generated arc.
    """

    cameras: int = Field(40, ge=1)
    image_size_hw: tuple[PositiveInt, PositiveInt] = (128, 96)
    texture_size: int = Field(128, ge=16)
    segments: int = Field(10, ge=1)
    frames_per_segment: int = Field(12, ge=1)
    seed: int = Field(0, ge=0)
    missing_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    supersampling: int = Field(2, ge=1, le=4)
    noise_std: float = Field(1.0, ge=0.0)
    color_gain: float = Field(0.08, ge=0.0, lt=0.5)
    color_bias: float = Field(3.0, ge=0.0)
    head_rotation_deg: float = Field(4.0, ge=0.0)
    head_translation_mm: float = Field(5.0, ge=0.0)
    headset_image_size_hw: tuple[PositiveInt, PositiveInt] = (48, 64)
    headset_noise_std: float = Field(2.0, ge=0.0)
    keypoint_noise_px: float = Field(0.3, ge=0.0)
    face: str | None = None
    krt: str | None = None


@dataclass(frozen=True)
class DomeScene:
    """What all frames of a dome share; see :func:`dome_scene`.

    Attributes:
        face: the face asset.
        cameras: the dome's cameras.
        headset: head-fixed cameras.
        world_from_head: ``(3, 4)`` mean head pose.
        gains: ``(K, 3)`` colour gains of the dome's cameras; camera 0 is the anchor with gain 1.
        biases: ``(K, 3)`` colour biases, grey levels; camera 0 has 0.
        frontal_camera_id: the camera nearest to the normal of the neutral face.
        appearance: the skin.
    """

    face: FaceAsset
    cameras: tuple[Camera, ...]
    headset: tuple[Camera, ...]
    world_from_head: np.ndarray
    gains: np.ndarray
    biases: np.ndarray
    frontal_camera_id: str
    appearance: Appearance


@dataclass(frozen=True)
class DomeFrame:
    """One synthesised frame, before it is encoded.

    Attributes:
        vertices: ``(V, 3)`` float32 mm.
        world_from_head: ``(3, 4)``.
        images: ``(K, H, W, 3)`` uint8.
        headset_images: ``(C, h, w)`` uint8.
        average_texture: ``(T, T, 3)`` uint8 in memory orientation.
        keypoints: ``(L, 3)`` float32.
        missing: ``(K + C,)`` bool, views that the capture loses.
    """

    vertices: np.ndarray
    world_from_head: np.ndarray
    images: np.ndarray
    headset_images: np.ndarray
    average_texture: np.ndarray
    keypoints: np.ndarray
    missing: np.ndarray


@lru_cache(maxsize=2)
def dome_scene(config: DomeConfig) -> DomeScene:
    """Face, rig and appearance of a dome; kept, so that a worker builds them once.

    Raises:
        CaptureError: the face or the KRT file cannot be used.
    """
    face = procedural_face(config.texture_size) if config.face is None else load_realface(config.face)
    if config.krt is None:
        cameras, world_from_head = arc_rig(config.cameras, config.image_size_hw, config.seed)
    else:
        cameras, world_from_head = krt_rig(Path(config.krt), config.image_size_hw)
    generator = np.random.default_rng([config.seed, 31])
    gains = 1.0 + config.color_gain * generator.uniform(-1.0, 1.0, (len(cameras), 3))
    biases = config.color_bias * generator.uniform(-1.0, 1.0, (len(cameras), 3))
    gains[0], biases[0] = 1.0, 0.0
    return DomeScene(
        face=face,
        cameras=cameras,
        headset=headset_cameras(face, config.headset_image_size_hw, config.seed),
        world_from_head=world_from_head,
        gains=gains.astype(np.float32),
        biases=biases.astype(np.float32),
        frontal_camera_id=_frontal_camera(face, cameras, world_from_head),
        appearance=Appearance(face, config.texture_size, world_from_head[:, :3]),
    )


def synthesise_frame(config: DomeConfig, segment: str, index: int) -> DomeFrame:
    """One frame of a planned segment; a pure function of its arguments."""
    scene = dome_scene(config)
    face, count = scene.face, config.frames_per_segment
    weights = segment_weights(segment, count, face.names, face.deltas, config.seed)[index]
    motion = (config.head_rotation_deg, config.head_translation_mm, config.seed)
    pose = head_motion(segment, count, scene.world_from_head, *motion)[index]
    generator = segment_generator(config.seed, segment, index)
    vertices = face.posed(weights)
    skin = scene.appearance.light(vertices, weights, pose)
    pictures = _pictures(scene, skin, vertices, scene.cameras, pose, config)
    average = skin.average()
    near = _pictures(scene, skin, vertices, scene.headset, np.eye(3, 4), config)
    colours = pictures[..., :3] * scene.gains[:, None, None] + pictures[..., 3:] * scene.biases[:, None, None]
    colours += config.noise_std * generator.standard_normal(colours.shape, dtype=np.float32)
    frontal = next(camera for camera in scene.cameras if camera.camera_id == scene.frontal_camera_id)
    pixels, visibility = project_landmarks(face.topology, vertices, frontal, pose)
    gains = headset_gains(len(scene.headset), config.seed)
    return DomeFrame(
        vertices=vertices,
        world_from_head=pose,
        images=np.clip(colours + 0.5, 0, 255).astype(np.uint8),
        headset_images=headset_exposure(near[..., :3], gains, config.headset_noise_std, generator),
        average_texture=(average + 0.5).clamp(0, 255).byte().numpy(),
        keypoints=noisy_keypoints(pixels, visibility, config.keypoint_noise_px, generator),
        missing=generator.random(len(scene.cameras) + len(scene.headset)) < config.missing_fraction,
    )


def _pictures(
    scene: DomeScene,
    skin: LitSkin,
    vertices: np.ndarray,
    cameras: tuple[Camera, ...],
    world_from_head: np.ndarray,
    config: DomeConfig,
) -> np.ndarray:
    """``(K, H, W, 4)`` float32 pictures; the cameras' textures are held a few at a time."""
    centres = torch.from_numpy(_centres_in_head(cameras, world_from_head)).float()
    chunk = max(1, _TEXELS_AT_ONCE // config.texture_size**2)
    pictures = []
    for start in range(0, len(cameras), chunk):
        some = slice(start, start + chunk)
        textures = skin.views(centres[some]).numpy()
        pictures.append(
            take_pictures(scene.face.topology, vertices, textures, cameras[some], world_from_head, config.supersampling)
        )
    return np.concatenate(pictures)


def _centres_in_head(cameras: tuple[Camera, ...], world_from_head: np.ndarray) -> np.ndarray:
    """``(K, 3)`` camera centres, mm."""
    poses = np.stack([compose(camera.cam_from_world, world_from_head) for camera in cameras])
    return -(poses[:, :, :3].transpose(0, 2, 1) @ poses[:, :, 3:])[..., 0]


def _frontal_camera(face: FaceAsset, cameras: tuple[Camera, ...], world_from_head: np.ndarray) -> str:
    spots = face.neutral[[face.topology.landmarks[name] for name in ("eye_left_outer", "eye_right_outer", "chin")]]
    left, right, chin = spots.astype(np.float64)
    normal = np.cross(right - left, chin - left)
    normal = normal / np.linalg.norm(normal)
    centres = _centres_in_head(cameras, world_from_head)
    views = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    return cameras[int(np.argmax(views @ normal))].camera_id
