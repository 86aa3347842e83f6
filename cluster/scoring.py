"""What one evaluation task computes: frames scored under an avatar, against the cameras and the tracked mesh.

Nothing is fitted on what is scored. Latents are the posterior mean, the prior's start or a fit to a driving signal;
the frontal camera, which two driving signals see, is never scored. All methods are compared on the same pixels: those
that the *tracked* mesh covers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from lipflow.checkpoint import load_avatar
from lipflow.config import FitConfig, RenderConfig
from lipflow.fitting import fit
from lipflow.metrics import geometry_rmse_mm, masked_mse, masked_ssim, psnr, solve_gain_bias
from lipflow.model.avatar import Avatar
from lipflow.render.renderer import Renderer
from lipflow.types import FrameBatch, colour_planes
from pipeline import storage
from pipeline.loading.loader import ShardSet
from pipeline.sharding.splits import spread

MEAN_FACE = "mean face"
ENCODER = "encoder"

PICTURE_SAMPLES = 3
"""Samples along each axis of a pixel in the pictures that are shown."""

_ZOOM = (PICTURE_SAMPLES, PICTURE_SAMPLES, 1.0)

ColorTable = Mapping[str, tuple[list[float], list[float]]]
"""camera id -> (gain, bias) by channel, solved on the calibration segment."""


@dataclass(frozen=True)
class FrameScore:
    """One frame under one kind of latent, on one set of cameras.

    Attributes:
        frame_id: ``"SEGMENT/FRAME"``.
        latent: where z comes from: ``mean face``, ``encoder``, or a driving signal.
        iterations: fit iterations; 0: the start.
        cameras: ``train`` or ``held-out``.
        calibrated: whether held-out cameras' gain and bias were solved on the calibration segment.
        image_mse: mean over views of the masked mean squared error, 0..255 squared.
        psnr_db: of ``image_mse``.
        ssim: mean over views.
        geometry_rmse_mm: vertices against the tracked mesh.
    """

    frame_id: str
    latent: str
    iterations: int
    cameras: str
    calibrated: bool
    image_mse: float
    psnr_db: float
    ssim: float
    geometry_rmse_mm: float


@dataclass(frozen=True)
class Picture:
    """A photo and its reconstruction, both ``(H, W, 3)`` uint8; outside the head the reconstruction is black."""

    frame_id: str
    camera_id: str
    latent: str
    photo: np.ndarray
    reconstruction: np.ndarray


@dataclass(frozen=True)
class TaskResult:
    """What one task brings back.

    Attributes:
        scores: one for each frame, latent and camera set.
        latents: (latent, frame id) -> z as a list.
        pictures: of the frames that were asked for.
        trace: mean over frames of L_obs at every iteration; empty if nothing was fitted.
        seconds: spent in fitting.
    """

    scores: list[FrameScore]
    latents: dict[tuple[str, str], list[float]]
    pictures: list[Picture]
    trace: list[float]
    seconds: float = 0.0


@lru_cache(maxsize=2)
def _open(avatar_uri: str, shards_uri: str, render: RenderConfig) -> tuple[Avatar, Renderer, ShardSet]:
    """Avatar, renderer and shard set, kept by a worker between its tasks."""
    with TemporaryDirectory() as folder:
        local = Path(folder, "avatar")
        storage.download_dir(avatar_uri, local)
        avatar = load_avatar(local).eval()
    shards = ShardSet.open(shards_uri)
    return avatar, Renderer(shards.topology, render.backend, filter=render.filter, antialias=render.antialias), shards


def calibrate_colors(avatar_uri: str, shards_uri: str, render: RenderConfig, frame_ids: Sequence[str]) -> dict:
    """Gain and bias of every held-out camera, by least squares over the frames of the calibration segment.

    The frames are of a training segment and their latents come from the encoder, so nothing that is scored enters.
    """
    avatar, renderer, shards = _open(avatar_uri, shards_uri, render)
    camera_ids = list(shards.test_camera_ids)
    if not camera_ids:
        return {}
    predicted, targets, weights = [], [], []
    with torch.no_grad():
        for frame_id in frame_ids:
            batch = shards.frames([frame_id], camera_ids)
            z = avatar.encode(batch.vertices, batch.average_texture).mean
            decoded = avatar.decode(z, batch.cameras.view_vectors())
            out = renderer.render(decoded.vertices, decoded.textures, batch.cameras, _image_size(batch))
            seen = out.mask & _tracked_mask(renderer, batch) & batch.view_present[..., None, None]
            predicted.append(out.image[0])
            targets.append(colour_planes(batch.images[0]))
            weights.append(seen[0].float())
    # Side by side: one least-squares problem for each camera over all frames.
    gain, bias = solve_gain_bias(torch.cat(predicted, -1), torch.cat(targets, -1), torch.cat(weights, -1))
    return {
        camera_id: (gain[i].tolist(), bias[i].tolist())
        for i, camera_id in enumerate(camera_ids)
        if torch.cat(weights, -1)[i].sum() > 0
    }


def score_reconstructions(
    avatar_uri: str,
    shards_uri: str,
    render: RenderConfig,
    frame_ids: Sequence[str],
    camera_ids: Sequence[str],
    colors: ColorTable,
    picture_frames: Sequence[str],
) -> TaskResult:
    """The encoder's reconstructions and the mean face, on the training cameras ``camera_ids`` and the held-out ones."""
    avatar, renderer, shards = _open(avatar_uri, shards_uri, render)
    result = TaskResult([], {}, [], [])
    with torch.no_grad():
        for frame_id in frame_ids:
            train = shards.frames([frame_id], list(camera_ids))
            z = avatar.encode(train.vertices, train.average_texture).mean
            result.latents[(ENCODER, frame_id)] = z[0].tolist()
            _score(result, avatar, renderer, train, z, ENCODER, 0, cameras="train")
            _score(result, avatar, renderer, train, None, MEAN_FACE, 0, cameras="train")
            if frame_id in picture_frames:
                result.pictures.append(_picture(avatar, renderer, shards, frame_id, z, ENCODER))
            if not shards.test_camera_ids:
                continue
            held_out = shards.frames([frame_id], list(shards.test_camera_ids))
            _score(result, avatar, renderer, held_out, z, ENCODER, 0, cameras="held-out")
            table = _color_tensors(colors, list(shards.test_camera_ids))
            _score(result, avatar, renderer, held_out, z, ENCODER, 0, cameras="held-out", solved=table)
    return result


def score_fits(
    avatar_uri: str,
    shards_uri: str,
    render: RenderConfig,
    frame_ids: Sequence[str],
    camera_ids: Sequence[str],
    signal: str,
    config: FitConfig,
    picture_frames: Sequence[str],
) -> TaskResult:
    """Latents fitted to one driving signal; the whole face is then compared with the training cameras ``camera_ids``.

    The start (0 iterations) is scored beside the fit.
    """
    avatar, renderer, shards = _open(avatar_uri, shards_uri, render)
    # One camera is enough to read the driving signals of all frames; the others are read frame by frame.
    driving = shards.frames(list(frame_ids), list(camera_ids[:1])).driving
    fitted = fit(avatar, renderer, driving, signal, config)
    trace = fitted.observed_trace.mean(1).tolist()
    result = TaskResult([], {}, [], trace, fitted.seconds)
    with torch.no_grad():
        for index, frame_id in enumerate(frame_ids):
            batch = shards.frames([frame_id], list(camera_ids))
            start, z = fitted.start[index : index + 1], fitted.z[index : index + 1]
            result.latents[(signal, frame_id)] = z[0].tolist()
            _score(result, avatar, renderer, batch, start, signal, 0, cameras="train")
            if config.iterations > 0:
                _score(result, avatar, renderer, batch, z, signal, config.iterations, cameras="train")
            if frame_id in picture_frames:
                result.pictures.append(_picture(avatar, renderer, shards, frame_id, z, signal))
    return result


def picture_camera(shards: ShardSet) -> str:
    """The scored training camera whose pictures are shown: the one that looks most like the frontal camera."""
    scored = scored_cameras(shards, None)
    by_id = {camera.camera_id: camera for camera in shards.cameras}
    if shards.frontal_camera_id is None:
        return scored[0]
    axis = by_id[shards.frontal_camera_id].cam_from_world[2, :3]
    return max(scored, key=lambda camera_id: float(by_id[camera_id].cam_from_world[2, :3] @ axis))


def scored_cameras(shards: ShardSet, count: int | None) -> list[str]:
    """At most ``count`` training cameras, evenly spread, without the frontal one; None: all of them."""
    return spread([camera for camera in shards.train_camera_ids if camera != shards.frontal_camera_id], count)


def _decode(avatar: Avatar, batch: FrameBatch, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """Vertices and textures of ``z``, or of the mean face if it is None; before colour correction."""
    if z is None:
        frames, views = batch.camera_index.shape
        textures = avatar.texture_mean.expand(frames, views, -1, -1, -1)
        return avatar.vertices_mean.expand(frames, -1, -1), textures
    decoded = avatar.decode(z, batch.cameras.view_vectors())
    return decoded.vertices, decoded.textures


def _score(
    result: TaskResult,
    avatar: Avatar,
    renderer: Renderer,
    batch: FrameBatch,
    z: Tensor | None,
    latent: str,
    iterations: int,
    *,
    cameras: str,
    solved: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Append the score of the batch's only frame; ``solved`` replaces the avatar's colour correction."""
    vertices, textures = _decode(avatar, batch, z)
    if solved is None:
        textures = avatar.correct_color(textures, batch.camera_index)
    else:
        textures = textures * solved[0][None, ..., None, None] + solved[1][None, ..., None, None]
    image = renderer.render(vertices, textures, batch.cameras, _image_size(batch)).image.clamp(0, 255)
    mask = _tracked_mask(renderer, batch)
    present = batch.view_present[0] & mask[0].flatten(1).any(1)
    predicted, target, mask = image[0, present], colour_planes(batch.images[0, present]), mask[0, present]
    error = masked_mse(predicted, target, mask).mean()
    result.scores.append(
        FrameScore(
            frame_id=batch.frame_ids[0],
            latent=latent,
            iterations=iterations,
            cameras=cameras,
            calibrated=solved is not None,
            image_mse=error.item(),
            psnr_db=psnr(error).item(),
            ssim=masked_ssim(predicted, target, mask).mean().item(),
            geometry_rmse_mm=geometry_rmse_mm(vertices, batch.vertices).item(),
        )
    )


def _picture(avatar: Avatar, renderer: Renderer, shards: ShardSet, frame_id: str, z: Tensor, latent: str) -> Picture:
    camera_id = picture_camera(shards)
    batch = shards.frames([frame_id], [camera_id])
    vertices, textures = _decode(avatar, batch, z)
    textures = avatar.correct_color(textures, batch.camera_index)
    # For the eye, unlike what is scored: antialiased, as the photo is.
    height, width = _image_size(batch)
    fine = replace(batch.cameras, intrinsics=batch.cameras.intrinsics * batch.vertices.new_tensor(_ZOOM)[:, None])
    size = (height * PICTURE_SAMPLES, width * PICTURE_SAMPLES)
    image = avg_pool2d(renderer.render(vertices, textures, fine, size).image[0], PICTURE_SAMPLES)
    return Picture(
        frame_id=frame_id,
        camera_id=camera_id,
        latent=latent,
        photo=batch.images[0, 0].permute(1, 2, 0).numpy(),
        reconstruction=image[0].permute(1, 2, 0).clamp(0, 255).round().to(torch.uint8).numpy(),
    )


def _tracked_mask(renderer: Renderer, batch: FrameBatch) -> Tensor:
    """``(B, K, H, W)`` bool: pixels that the tracked mesh covers."""
    texture = batch.vertices.new_zeros(len(batch.frame_ids), 1, 1, 1, 1)
    return renderer.render(batch.vertices, texture, batch.cameras, _image_size(batch)).mask


def _color_tensors(colors: ColorTable, camera_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Gain and bias ``(K, 3)``; a camera without calibration views keeps gain 1 and bias 0."""
    neutral = ([1.0] * 3, [0.0] * 3)
    pairs = [colors.get(camera_id, neutral) for camera_id in camera_ids]
    return torch.tensor([gain for gain, _ in pairs]), torch.tensor([bias for _, bias in pairs])


def _image_size(batch: FrameBatch) -> tuple[int, int]:
    height, width = batch.images.shape[-2:]
    return height, width
