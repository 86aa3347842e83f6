"""The words and conventions that every other module uses. They are stated here, once.

Units and frames
    Lengths are millimetres; image coordinates are pixels. Vertices live in the *head frame*: the rigid head
    motion is removed and kept as ``world_from_head``. Transforms are named ``to_from`` and are ``(3, 4)``
    matrices ``[R | t]``: ``x_to = R @ x_from + t``.

Cameras
    OpenCV axes (x right, y down, z forward): ``x_cam = R @ x_world + t``. Pixel centres lie at +0.5: the
    top-left pixel of an image covers ``[0, 1) x [0, 1)`` and its centre is ``(0.5, 0.5)``. Readers of formats
    with integer pixel centres add 0.5 to the principal point.

Textures
    ``(3, T, T)``, row 0 is v = 0. Image *files* have v = 1 in row 0; the readers and writers flip once.
    A texel ``(row i, column j)`` of a ``T x T`` texture has its centre at ``u = (j + 0.5) / T``,
    ``v = (i + 0.5) / T``.

View vector
    The camera centre in the head frame, normalised to unit length.

Capture words
    A *segment* is one expression or sentence, a *frame* one instant seen by all cameras, a *view* one pair
    (frame, camera).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

DRIVING_SIGNALS = ("hmc", "frontal", "keypoints")


@dataclass(frozen=True)
class Camera:
    """One calibrated pinhole camera of a capture.

    Attributes:
        camera_id: the capture's own name of the camera, such as ``"400029"``.
        intrinsics: K, ``(3, 3)`` float64, pixels of an image of ``image_size_hw``, pixel centres at +0.5.
        cam_from_world: ``(3, 4)`` float64, millimetres. For a headset camera: ``cam_from_head``.
        image_size_hw: (height, width) in pixels.
        distortion: ``(5,)`` Brown-Conrady coefficients k1, k2, p1, p2, k3.
    """

    camera_id: str
    intrinsics: np.ndarray
    cam_from_world: np.ndarray
    image_size_hw: tuple[int, int]
    distortion: np.ndarray = field(default_factory=lambda: np.zeros(5))

    def resized(self, image_size_hw: tuple[int, int]) -> Camera:
        """The same camera for images resized to ``image_size_hw``; K is rescaled per axis."""
        scale_y = image_size_hw[0] / self.image_size_hw[0]
        scale_x = image_size_hw[1] / self.image_size_hw[1]
        scale = np.diag([scale_x, scale_y, 1.0])
        return replace(self, intrinsics=scale @ self.intrinsics, image_size_hw=(image_size_hw[0], image_size_hw[1]))


@dataclass(frozen=True)
class Topology:
    """What all meshes of a capture share.

    Attributes:
        faces: ``(F, 3)`` int64 vertex indices, counter-clockwise seen from outside.
        uvs: ``(U, 2)`` float32 in [0, 1]; v grows upwards on the file's image.
        uv_faces: ``(F, 3)`` int64 indices into ``uvs``.
        weight_mask: ``(T, T)`` float32 loss weight in texture space (row 0 is v = 0), 1 on plain skin and more
            on eyes and mouth, 0 where nothing should be compared.
        landmarks: name to vertex index, e.g. ``"nose_tip"``.
        num_vertices: V, which may exceed ``faces.max() + 1``.
    """

    faces: np.ndarray
    uvs: np.ndarray
    uv_faces: np.ndarray
    weight_mask: np.ndarray
    landmarks: Mapping[str, int]
    num_vertices: int


@dataclass(frozen=True)
class Normalization:
    """Statistics of a capture's training segments and cameras; what the networks see is normalised by them.

    Attributes:
        texture_mean: ``(3, T, T)`` float32, 0..255.
        texture_std: one scalar for all texels and channels, 0..255.
        vertices_mean: ``(V, 3)`` float32, mm.
        vertices_std: one scalar for all vertices and axes, mm.
    """

    texture_mean: np.ndarray
    texture_std: float
    vertices_mean: np.ndarray
    vertices_std: float


@dataclass
class CameraTensors:
    """A batch of cameras that look at a head; the leading dimensions ``...`` are free.

    Attributes:
        intrinsics: ``(..., 3, 3)`` K in pixels.
        cam_from_head: ``(..., 3, 4)``, millimetres.
        distortion: ``(..., 5)`` Brown-Conrady coefficients k1, k2, p1, p2, k3; None for pinhole cameras.
    """

    intrinsics: Tensor
    cam_from_head: Tensor
    distortion: Tensor | None = None

    def view_vectors(self) -> Tensor:
        """``(..., 3)`` camera centres in the head frame, normalised."""
        rotation, translation = self.cam_from_head[..., :3], self.cam_from_head[..., 3]
        # Not in bfloat16, whose steps are as wide as the angles between cameras.
        with torch.autocast(rotation.device.type, enabled=False):
            centre = -(rotation.transpose(-1, -2) @ translation[..., None])[..., 0]
        return torch.nn.functional.normalize(centre, dim=-1)


@dataclass
class DrivingSignals:
    """The impoverished inputs h of B frames; a signal that the capture lacks is None.

    A missing view or landmark is a normal thing: it is flagged, and its pixels are zero.

    Attributes:
        hmc_images: ``(B, C, 1, h, w)`` uint8 headset views, monochrome.
        hmc_present: ``(B, C)`` bool.
        hmc_cameras: K ``(B, C, 3, 3)`` and cam_from_head ``(B, C, 3, 4)``.
        frontal_images: ``(B, 3, H, W)`` uint8, the image of the declared frontal camera; memory as that of
            :attr:`FrameBatch.images`.
        frontal_present: ``(B,)`` bool.
        keypoints: ``(B, L, 3)`` float32: x_px, y_px in the frontal camera, confidence in 0..1 (0: not seen).
        frontal_cameras: ``(B, 3, 3)`` and ``(B, 3, 4)``; shared by ``frontal`` and ``keypoints``.
    """

    hmc_images: Tensor | None = None
    hmc_present: Tensor | None = None
    hmc_cameras: CameraTensors | None = None
    frontal_images: Tensor | None = None
    frontal_present: Tensor | None = None
    keypoints: Tensor | None = None
    frontal_cameras: CameraTensors | None = None

    def available(self) -> tuple[str, ...]:
        """The names of the signals that are here, in the order of ``DRIVING_SIGNALS``."""
        tensors = (self.hmc_images, self.frontal_images, self.keypoints)
        return tuple(name for name, tensor in zip(DRIVING_SIGNALS, tensors, strict=True) if tensor is not None)


@dataclass
class FrameBatch:
    """B frames with K views each; the encoder runs once a frame, the decoder once a view.

    Attributes:
        frame_ids: B strings ``"SEGMENT/FRAME"``.
        vertices: ``(B, V, 3)`` float32, mm, head frame.
        average_texture: ``(B, 3, T, T)`` uint8, row 0 is v = 0.
        images: ``(B, K, 3, H, W)`` uint8 RGB. A view that is not present is zero. Memory is as the codec decodes: a
            view of ``(B, K, H, W, 3)``, as channels-last tensors are, unless the set is stored planar; so ``reshape``
            it, never ``view``. Copies to a device keep the layout; :func:`colour_planes` makes it that of renders.
        view_present: ``(B, K)`` bool; False for padding and for views that the capture lacks.
        camera_index: ``(B, K)`` int64 into the shard set's camera list.
        cameras: K and cam_from_head of every view, ``(B, K, 3, 3)`` and ``(B, K, 3, 4)``.
        driving: the impoverished inputs of the same frames.
    """

    frame_ids: list[str]
    vertices: Tensor
    average_texture: Tensor
    images: Tensor
    view_present: Tensor
    camera_index: Tensor
    cameras: CameraTensors
    driving: DrivingSignals

    def to(self, device: torch.device | str) -> FrameBatch:
        """The same batch with every tensor on ``device``."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


def colour_planes(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images ``(..., C, H, W)`` as numbers to compute with, contiguous as renders are.

    Sums over them are then bitwise the same however a shard set stores its images.
    """
    return images.to(dtype, memory_format=torch.contiguous_format).contiguous()


def map_tensors(batch, function):
    """A copy of a (nested) dataclass in which ``function`` was applied to every tensor."""
    changes = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = function(value)
        elif isinstance(value, CameraTensors | DrivingSignals):
            changes[item.name] = map_tensors(value, function)
    return replace(batch, **changes)
