"""What one evaluation task computes: frames scored under an avatar, against the cameras and the tracked mesh.

Nothing is fitted on what is scored. Latents are the posterior mean, the prior's start or a fit to a driving signal;
the frontal camera, which two driving signals see, is never scored. All methods are compared on the same pixels, those
that the *tracked* mesh covers whole, and on its regions, with several samples a pixel
(:mod:`cluster.scores.area_sampling`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cluster.scores.area_sampling import render_area
from cluster.scores.scene import Scene, open_scene
from cluster.scores.sheet import ENCODER, MEAN_FACE, FrameScore
from lipflow.config import FitConfig, RenderConfig
from lipflow.fitting import fit
from lipflow.metrics import frame_jitter_mm, geometry_rmse_mm, masked_mse, masked_ssim_map, solve_gain_bias, texture_mse
from lipflow.regions import REGIONS, pixel_regions, region_means
from lipflow.types import FrameBatch, colour_planes
from pipeline.loading.loader import ShardSet
from pipeline.sharding.splits import spread

ColorTable = Mapping[str, tuple[list[float], list[float]]]
"""camera id -> (gain, bias) by channel, solved on the calibration segments."""

LatentKey = tuple[str, int, str]
"""(latent, fit iterations, frame id)."""


@dataclass
class TaskResult:
    """What one task brings back.

    Attributes:
        scores: one for each frame, latent and camera set.
        latents: z as a list.
        trace: mean over frames of L_obs at every iteration; empty if nothing was fitted.
        seconds: spent in fitting.
    """

    scores: list[FrameScore] = field(default_factory=list)
    latents: dict[LatentKey, list[float]] = field(default_factory=dict)
    trace: list[float] = field(default_factory=list)
    seconds: float = 0.0


def calibrate_colors(avatar_uri: str, shards_uri: str, render: RenderConfig, frame_ids: Sequence[str]) -> dict:
    """Gain and bias of every held-out camera, by least squares over calibration frames.

    The frames are of training segments and their latents come from the encoder, so nothing that is scored enters.
    """
    scene = open_scene(avatar_uri, shards_uri, render)
    camera_ids = list(scene.shards.test_camera_ids)
    if not camera_ids:
        return {}
    predicted, targets, weights = [], [], []
    with torch.no_grad():
        for frame_id in frame_ids:
            batch = scene.shards.frames([frame_id], camera_ids, signals=())
            z = scene.avatar.encode(batch.vertices, batch.average_texture).mean
            decoded = scene.avatar.decode(z, batch.cameras.view_vectors())
            size = image_size(batch)
            out = render_area(scene.renderer, decoded.vertices, decoded.textures, batch.cameras, size)
            tracked = tracked_triangles(scene, batch)
            seen = (out.triangle_id >= 0) & (tracked >= 0) & batch.view_present[0, :, None, None]
            predicted.append(out.image)
            targets.append(colour_planes(batch.images[0]))
            weights.append(seen.float())
    # Side by side: one least-squares problem for each camera over all frames.
    weight = torch.cat(weights, -1)
    gain, bias = solve_gain_bias(torch.cat(predicted, -1), torch.cat(targets, -1), weight)
    return {
        camera_id: (gain[i].tolist(), bias[i].tolist()) for i, camera_id in enumerate(camera_ids) if weight[i].sum() > 0
    }


def score_reconstructions(
    avatar_uri: str,
    shards_uri: str,
    render: RenderConfig,
    frame_ids: Sequence[str],
    train_cameras: Sequence[str],
    held_out_cameras: Sequence[str],
    colors: ColorTable,
) -> TaskResult:
    """The encoder's reconstructions and the mean face, on training cameras and on held-out ones."""
    scene = open_scene(avatar_uri, shards_uri, render)
    avatar, result = scene.avatar, TaskResult()
    with torch.no_grad():
        for frame_id in frame_ids:
            train = scene.shards.frames([frame_id], list(train_cameras), signals=())
            target = _Target(scene, train, "train")
            z = avatar.encode(train.vertices, train.average_texture).mean
            result.latents[ENCODER, 0, frame_id] = z[0].tolist()
            result.scores += target.scores(z, ENCODER)
            result.scores += target.scores(None, MEAN_FACE)
            if held_out_cameras:
                held_out = scene.shards.frames([frame_id], list(held_out_cameras), signals=())
                solved = _color_tensors(colors, held_out_cameras)
                result.scores += _Target(scene, held_out, "held-out").scores(z, ENCODER, solved=solved)
    return result


def score_fits(
    avatar_uri: str,
    shards_uri: str,
    render: RenderConfig,
    frame_ids: Sequence[str],
    camera_ids: Sequence[str],
    signal: str,
    config: FitConfig,
    iterations: Sequence[int],
) -> TaskResult:
    """Latents fitted to one driving signal; the whole face is then compared with the training cameras ``camera_ids``.

    One fit gives the scores after all of ``iterations``, of which ``config.iterations`` is the highest.
    """
    scene = open_scene(avatar_uri, shards_uri, render)
    _compile_fit(avatar_uri, shards_uri, render, signal, config)
    # One camera is enough to read the driving signals of all frames; the others are read frame by frame.
    driving = scene.shards.frames(list(frame_ids), list(camera_ids[:1])).driving
    fitted = fit(scene.avatar, scene.renderer, driving, signal, config, record=iterations)
    result = TaskResult(trace=fitted.observed_trace.mean(1).tolist(), seconds=fitted.seconds)
    steps = fitted.iterations.tolist()
    seconds_per_step = fitted.seconds / max(1, sum(steps))
    with torch.no_grad():
        for index, frame_id in enumerate(frame_ids):
            batch = scene.shards.frames([frame_id], list(camera_ids), signals=())
            target = _Target(scene, batch, "train")
            for count in iterations:
                z = fitted.recorded[count][index : index + 1]
                result.latents[signal, count, frame_id] = z[0].tolist()
                seconds = min(count, steps[index]) * seconds_per_step
                result.scores += target.scores(z, signal, count, fit_seconds=seconds)
    return result


@lru_cache
def _compile_fit(avatar_uri: str, shards_uri: str, render: RenderConfig, signal: str, config: FitConfig) -> None:
    """One step on one frame, so that the time of fits is not that of compiling the renderer."""
    scene = open_scene(avatar_uri, shards_uri, render)
    driving = scene.shards.frames(scene.shards.frame_ids("train")[:1], scored_cameras(scene.shards, 1)).driving
    fit(scene.avatar, scene.renderer, driving, signal, config.model_copy(update={"iterations": 1}))


def measure_jitter(
    avatar_uri: str,
    shards_uri: str,
    render: RenderConfig,
    frame_ids: Sequence[str],
    codes: Mapping[tuple[str, int], Sequence[Sequence[float]]],
) -> dict[LatentKey, tuple[float, float]]:
    """Shaking in mm of the decoded and of the tracked mesh, in all but the first and last of consecutive frames.

    Args:
        avatar_uri: the avatar.
        shards_uri: the shard set.
        render: how images are drawn; the key to what the worker has open.
        frame_ids: at least 3, consecutive.
        codes: (latent, iterations) -> z of every frame.
    """
    scene = open_scene(avatar_uri, shards_uri, render)
    found: dict[LatentKey, tuple[float, float]] = {}
    with torch.no_grad():
        tracked = scene.shards.frames(list(frame_ids), [], signals=()).vertices
        target = frame_jitter_mm(tracked).tolist()
        for (latent, iterations), z in codes.items():
            ours = frame_jitter_mm(scene.avatar.decode_vertices(torch.tensor(z))).tolist()
            for frame_id, pair in zip(frame_ids[1:-1], zip(ours, target, strict=True), strict=True):
                found[latent, iterations, frame_id] = pair
    return found


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


def held_out_cameras(shards: ShardSet) -> list[str]:
    """The held-out cameras, without the frontal one."""
    return [camera for camera in shards.test_camera_ids if camera != shards.frontal_camera_id]


def tracked_triangles(scene: Scene, batch: FrameBatch) -> Tensor:
    """``(K, H, W)`` the triangle of one frame's tracked mesh in every pixel that it covers whole, -1 elsewhere."""
    texture = batch.vertices.new_zeros(1, 1, 1, 1, 1)
    return render_area(scene.renderer, batch.vertices, texture, batch.cameras, image_size(batch)).triangle_id


def image_size(batch: FrameBatch) -> tuple[int, int]:
    """(height, width) of its images in pixels."""
    height, width = batch.images.shape[-2:]
    return height, width


class _Target:
    """What one frame's reconstructions on one set of cameras are compared with; made once for all of them."""

    def __init__(self, scene: Scene, batch: FrameBatch, cameras: str):
        triangles = tracked_triangles(scene, batch)
        self.scene, self.batch, self.cameras = scene, batch, cameras
        self.present = batch.view_present[0] & (triangles >= 0).flatten(1).any(1)
        self.images = colour_planes(batch.images[0, self.present])
        self.regions = pixel_regions(triangles[self.present], scene.face_labels)
        self.mask = self.regions >= 0

    def scores(
        self,
        z: Tensor | None,
        latent: str,
        iterations: int = 0,
        *,
        solved: tuple[Tensor, Tensor] | None = None,
        fit_seconds: float = 0.0,
    ) -> list[FrameScore]:
        """The score of ``z (1, D)``, or of the mean face; a second one with ``solved`` gain and bias ``(K, 3)``.

        An image is linear in its texture, so solved colours need no second rendering.
        """
        if not bool(self.present.any()):
            return []
        batch, avatar = self.batch, self.scene.avatar
        vertices, textures = self._decoded(z)
        textures = avatar.correct_color(textures, batch.camera_index)
        rendered = render_area(self.scene.renderer, vertices, textures, batch.cameras, image_size(batch))
        shared: dict[str, Any] = {
            "frame_id": batch.frame_ids[0],
            "latent": latent,
            "iterations": iterations,
            "cameras": self.cameras,
            "views": int(self.present.sum()),
            "fit_seconds": fit_seconds,
            **self._geometry(vertices),
        }
        if self.cameras == "train":
            mean = textures[0, self.present].mean(0)
            average = batch.average_texture[0].float()
            shared["texture_mse"] = texture_mse(mean, average, self.scene.renderer.weight_mask).item()
        found = [FrameScore(**shared, calibrated=False, **self._image(rendered.image))]
        if solved is not None:
            covered = rendered.coverage[:, None]
            image = rendered.image * solved[0][..., None, None] + covered * solved[1][..., None, None]
            found.append(FrameScore(**shared, calibrated=True, **self._image(image)))
        return found

    def _decoded(self, z: Tensor | None) -> tuple[Tensor, Tensor]:
        avatar, batch = self.scene.avatar, self.batch
        if z is None:
            views = batch.camera_index.shape[1]
            return avatar.vertices_mean[None], avatar.texture_mean.expand(1, views, -1, -1, -1)
        decoded = avatar.decode(z, batch.cameras.view_vectors())
        return decoded.vertices, decoded.textures

    def _image(self, image: Tensor) -> dict[str, Any]:
        predicted = image[self.present].clamp(0, 255)
        similarity = masked_ssim_map(predicted, self.images, self.mask)
        errors = (predicted - self.images).square().mean(-3)
        inside = (similarity * self.mask).sum((-2, -1)) / self.mask.sum((-2, -1))
        return {
            "image_mse": masked_mse(predicted, self.images, self.mask).mean().item(),
            "ssim": inside.mean().item(),
            **_by_region("image_mse", region_means(errors, self.regions)),
            **_by_region("ssim", region_means(similarity, self.regions)),
        }

    def _geometry(self, vertices: Tensor) -> dict[str, float | None]:
        squared = (vertices - self.batch.vertices).square().sum(-1)[0]
        by_region = region_means(squared, self.scene.vertex_labels).sqrt()
        return {
            "geometry_rmse_mm": geometry_rmse_mm(vertices, self.batch.vertices).item(),
            **_by_region("geometry_rmse_mm", by_region),
        }


def _by_region(metric: str, means: Tensor) -> dict[str, float | None]:
    known = means.isfinite().tolist()
    return {
        f"{metric}_{region}": value if finite else None
        for region, value, finite in zip(REGIONS, means.tolist(), known, strict=True)
    }


def _color_tensors(colors: ColorTable, camera_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Gain and bias ``(K, 3)``; a camera without calibration views keeps gain 1 and bias 0."""
    neutral = ([1.0] * 3, [0.0] * 3)
    pairs = [colors.get(camera_id, neutral) for camera_id in camera_ids]
    return torch.tensor([gain for gain, _ in pairs]), torch.tensor([bias for _, bias in pairs])
