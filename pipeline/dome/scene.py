"""What a synthetic dome sees: its config, the scene that all frames share, and one frame as a pure function.

A frame is made of parts (:class:`FrameShoot`), each a pure function of the config alone and computed when it is asked
for, so that a frame of any number of cameras takes the memory of one picture.

Simplifications: average textures carry no camera colour and do not consider occlusion; there is no background.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import Field, PositiveInt

from lipflow.config import StrictConfig
from lipflow.render.camera import compose
from lipflow.types import Camera
from pipeline.dome.appearance import Appearance
from pipeline.dome.face import FaceAsset, procedural_face
from pipeline.dome.motion import head_motion, segment_generator, segment_weights
from pipeline.dome.realface import load_realface
from pipeline.dome.rig import arc_rig, krt_rig
from pipeline.driving.headset import HeadsetRig, headset_exposure, headset_rig
from pipeline.driving.landmarks import frontal_camera_id, noisy_keypoints, project_landmarks
from pipeline.driving.picture import PictureTaker, expose

# Streams of random numbers of one frame; 0 is left out, because trailing zeros do not change a seed.
_IMAGE_NOISE, _HEADSET_NOISE, _KEYPOINT_NOISE, _LOSSES = 1, 2, 3, 4


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
        headset: head-fixed cameras and their housing.
        world_from_head: ``(3, 4)`` mean head pose.
        gains: ``(K, 3)`` colour gains of the dome's cameras; camera 0 is the anchor with gain 1.
        biases: ``(K, 3)`` colour biases, grey levels; camera 0 has 0.
        frontal_camera_id: the camera nearest to the normal of the neutral face.
        appearance: the skin.
    """

    face: FaceAsset
    cameras: tuple[Camera, ...]
    headset: HeadsetRig
    world_from_head: np.ndarray
    gains: np.ndarray
    biases: np.ndarray
    frontal_camera_id: str
    appearance: Appearance


@dataclass(frozen=True)
class DomeFrame:
    """One synthesised frame with all its pictures, before they are encoded.

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
    spots = {name: face.neutral[vertex] for name, vertex in face.topology.landmarks.items()}
    return DomeScene(
        face=face,
        cameras=cameras,
        headset=headset_rig(spots, config.headset_image_size_hw, config.seed),
        world_from_head=world_from_head,
        gains=gains.astype(np.float32),
        biases=biases.astype(np.float32),
        frontal_camera_id=frontal_camera_id(cameras, face.topology.landmarks, face.neutral, world_from_head),
        appearance=Appearance(face, config.texture_size, world_from_head[:, :3]),
    )


class FrameShoot:
    """One frame of a planned segment, part by part, in any order.

    Attributes:
        vertices: ``(V, 3)`` float32 mm.
        world_from_head: ``(3, 4)``.
        missing: ``(K + C,)`` bool, views that the capture loses: the dome's, then the headset's.
    """

    def __init__(self, config: DomeConfig, segment: str, index: int):
        self._config, self._stream, self._scene = config, (config.seed, segment, index), dome_scene(config)
        weights, poses = _performance(config, segment)
        self.world_from_head = poses[index]
        self.vertices = self._scene.face.posed(weights[index])
        views = len(self._scene.cameras) + len(self._scene.headset.cameras)
        self.missing = self._generator(_LOSSES).random(views) < config.missing_fraction
        self._skin = self._scene.appearance.light(self.vertices, weights[index], self.world_from_head)
        self._dome_taker = PictureTaker(self._scene.face.topology, config.supersampling)
        self._headset_taker = PictureTaker(self._scene.face.topology, config.supersampling)

    def image(self, camera_index: int) -> np.ndarray:
        """The picture ``(H, W, 3)`` uint8 of one of the dome's cameras, in the rig's order."""
        scene = self._scene
        picture = self._picture(self._dome_taker, scene.cameras[camera_index], self.world_from_head)
        gain, bias = scene.gains[camera_index], scene.biases[camera_index]
        return expose(picture, gain, bias, self._config.noise_std, self._generator(_IMAGE_NOISE, camera_index))

    def headset_images(self) -> np.ndarray:
        """The pictures ``(C, h, w)`` uint8 of the headset's cameras."""
        rig = self._scene.headset
        near = [self._picture(self._headset_taker, camera, np.eye(3, 4))[..., :3] for camera in rig.cameras]
        noise = self._config.headset_noise_std
        return headset_exposure(np.stack(near), rig, noise, self._generator(_HEADSET_NOISE))

    def average_texture(self) -> np.ndarray:
        """The texture ``(T, T, 3)`` uint8 averaged over the dome's cameras, in memory orientation."""
        centres = np.stack([_centre_in_head(camera, self.world_from_head) for camera in self._scene.cameras])
        return np.clip(self._skin.average(centres) + 0.5, 0, 255).astype(np.uint8)

    def keypoints(self) -> np.ndarray:
        """Keypoints ``(L, 3)`` float32 in the frontal camera."""
        scene = self._scene
        frontal = next(camera for camera in scene.cameras if camera.camera_id == scene.frontal_camera_id)
        pixels, visibility = project_landmarks(scene.face.topology, self.vertices, frontal, self.world_from_head)
        return noisy_keypoints(pixels, visibility, self._config.keypoint_noise_px, self._generator(_KEYPOINT_NOISE))

    def _picture(self, taker: PictureTaker, camera: Camera, world_from_head: np.ndarray) -> np.ndarray:
        texture = self._skin.view(_centre_in_head(camera, world_from_head))
        return taker.take(self.vertices, texture, camera, world_from_head)

    def _generator(self, *stream: int) -> np.random.Generator:
        return segment_generator(*self._stream, *stream)


def synthesise_frame(config: DomeConfig, segment: str, index: int) -> DomeFrame:
    """One whole frame of a planned segment, with all its pictures in memory; a pure function of its arguments."""
    shoot = FrameShoot(config, segment, index)
    return DomeFrame(
        vertices=shoot.vertices,
        world_from_head=shoot.world_from_head,
        images=np.stack([shoot.image(camera) for camera in range(len(dome_scene(config).cameras))]),
        headset_images=shoot.headset_images(),
        average_texture=shoot.average_texture(),
        keypoints=shoot.keypoints(),
        missing=shoot.missing,
    )


@lru_cache(maxsize=2)
def _performance(config: DomeConfig, segment: str) -> tuple[np.ndarray, np.ndarray]:
    """Shape weights ``(F, E)`` and head poses ``(F, 3, 4)`` of a segment; kept, so that its frames share them."""
    scene, count = dome_scene(config), config.frames_per_segment
    weights = segment_weights(segment, count, scene.face.names, scene.face.deltas, config.seed)
    motion = (config.head_rotation_deg, config.head_translation_mm, config.seed)
    return weights, head_motion(segment, count, scene.world_from_head, *motion)


def _centre_in_head(camera: Camera, world_from_head: np.ndarray) -> np.ndarray:
    """``(3,)`` camera centre in the head frame, mm."""
    cam_from_head = compose(camera.cam_from_world, world_from_head)
    return -cam_from_head[:, :3].T @ cam_from_head[:, 3]
