"""What a fit compares: L_obs is what the driving signal shows, and nothing else.

hmc, frontal
    Photometric: squared error of the rendered image in units of the texture std, mean over channels, then over the
    frame's pixels weighted by the rendered weight mask. Headset views are compared in grey, under the gain and bias
    of each view that fit best, and under the Geman-McClure loss, because the headset's own housing hides parts of the
    face: an error counts as an outlier beyond ``headset_cutoff`` times the contrast (std) of the view. Gain and bias
    are held fixed in the gradient, which is exact where they are optimal. The frontal image is compared in its
    camera's learned colours, or under the best gain and bias of each channel where that camera was not trained.
    With ``antialias`` the outline is blended with the photo's own pixels beside it, by the share of each pixel that
    the face covers, and L_obs has gradients by where the outline lies.
keypoints
    Reprojection: distance of the landmark vertices from the keypoints, back-projected to mm at their depth, in
    units of ``keypoint_noise_mm``, under the Geman-McClure loss r^2 / (1 + r^2 / cutoff^2), mean over landmarks
    weighted by confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lipflow.config import FitConfig
from lipflow.errors import LipflowError
from lipflow.model.avatar import Avatar
from lipflow.model.color import solve_gain_bias
from lipflow.model.drivers import SeenViews, frontal_view, headset_views, landmark_residuals_mm, seen_keypoints
from lipflow.render.outline import over_photo
from lipflow.render.renderer import Renderer
from lipflow.types import DrivingSignals, colour_planes

_REWEIGHTINGS = 4

_LEAST_COVERAGE = 0.25
"""Smallest share of a pixel by which its colour is divided; where something is seen it is seldom below 1/2."""

GREY_OF_RGB = (0.299, 0.587, 0.114)
"""Luma weights (ITU-R BT.601): how a monochrome headset camera sees a colour texture."""


def observed_error(
    avatar: Avatar,
    renderer: Renderer,
    driving: DrivingSignals,
    signals: Sequence[str],
    z: Tensor,
    config: FitConfig,
) -> Tensor:
    """L_obs of each frame, ``(B,)``: the sum over ``signals``.

    Args:
        avatar: decodes ``z``.
        renderer: of its topology.
        driving: what B frames show.
        signals: one or more of ``hmc``, ``frontal``, ``keypoints``.
        z: ``(B, D)``.
        config: cutoffs and noise.

    Raises:
        LipflowError: ``driving`` lacks a signal, or nothing is known of what one shows.
    """
    unknown = [name for name in signals if name not in _OBSERVED]
    if unknown:
        raise LipflowError(
            f"no fit can be made to {unknown[0]}: what it shows of a face is unknown; fit to {', '.join(_OBSERVED)}"
        )
    return torch.stack([_OBSERVED[name](avatar, renderer, driving, z, config) for name in signals]).sum(0)


def _observe_headset(
    avatar: Avatar, renderer: Renderer, driving: DrivingSignals, z: Tensor, config: FitConfig
) -> Tensor:
    views = headset_views(driving)
    decoded = avatar.decode(z, views.cameras.view_vectors())
    luma = decoded.textures.new_tensor(GREY_OF_RGB)[:, None, None]
    grey = (decoded.textures * luma).sum(2, keepdim=True)
    return _photometric(avatar, renderer, decoded.vertices, grey, views, config, solve_color=True, robust=True)


def _observe_frontal(
    avatar: Avatar, renderer: Renderer, driving: DrivingSignals, z: Tensor, config: FitConfig
) -> Tensor:
    view = frontal_view(driving)
    decoded = avatar.decode(z, view.cameras.view_vectors())
    textures, camera_id = decoded.textures, avatar.context.frontal_camera_id
    trained = camera_id is not None and camera_id in avatar.color.trained_ids
    if camera_id is not None and trained:
        index = avatar.context.camera_ids.index(camera_id)
        textures = avatar.correct_color(textures, torch.full((len(z), 1), index, device=z.device))
    return _photometric(avatar, renderer, decoded.vertices, textures, view, config, solve_color=not trained)


def _observe_keypoints(
    avatar: Avatar, renderer: Renderer, driving: DrivingSignals, z: Tensor, config: FitConfig
) -> Tensor:
    landmarks = avatar.decode_vertices(z)[:, avatar.context.landmark_vertices]
    squared = (landmark_residuals_mm(landmarks, driving) / config.keypoint_noise_mm).square()
    robust = squared / (1 + squared / config.keypoint_cutoff**2)
    confidence = seen_keypoints(driving).keypoints[..., 2]
    return (confidence * robust).sum(-1) / confidence.sum(-1).clamp(min=1e-6)


_OBSERVED = {"hmc": _observe_headset, "frontal": _observe_frontal, "keypoints": _observe_keypoints}


def _photometric(
    avatar: Avatar,
    renderer: Renderer,
    vertices: Tensor,
    textures: Tensor,
    views: SeenViews,
    config: FitConfig,
    *,
    solve_color: bool,
    robust: bool = False,
) -> Tensor:
    """``(B,)`` error of the rendered views: squares, or ``robust`` beyond the headset's cutoff."""
    height, width = views.images.shape[-2:]
    rendered = renderer.render(vertices, textures, views.cameras, (height, width), antialias=config.antialias)
    weight = (rendered.weight * views.present[..., None, None]).detach()
    image, covered = rendered.image, rendered.coverage[:, :, None]
    target = colour_planes(views.images, image.dtype)
    # A blended pixel holds so much less of the face: its own colour is the quotient.
    image = image / covered.clamp(min=_LEAST_COVERAGE)
    limit = config.headset_cutoff**2 * _contrast(target, weight) if robust else None
    if solve_color:
        gain, bias = _best_colors(image.detach(), target, weight, limit)
        image = image * gain[..., None, None] + bias[..., None, None]
    if config.antialias:
        image = over_photo(replace(rendered, image=covered * image), target)
    squared = (image - target).square()
    if limit is not None:
        squared = squared / (1 + squared / limit)
    error = squared.mean(2) / avatar.texture_std**2
    return (weight * error).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1e-6)


def _contrast(target: Tensor, weight: Tensor) -> Tensor:
    """``(B, K, C, 1, 1)`` variance of views over the weighted pixels."""
    weight = weight[:, :, None]
    total = weight.sum((-2, -1), keepdim=True).clamp(min=1e-6)
    mean = (weight * target).sum((-2, -1), keepdim=True) / total
    return ((weight * (target - mean).square()).sum((-2, -1), keepdim=True) / total).clamp(min=1e-6)


def _best_colors(image: Tensor, target: Tensor, weight: Tensor, limit: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gain and bias ``(B, K, C)`` of least error; with a ``limit`` on squared errors, reweighted a few times.

    A negative gain would let a face be matched by its photographic negative.
    """
    trusted = weight
    for _ in range(1 if limit is None else _REWEIGHTINGS):
        gain, bias = solve_gain_bias(image, target, trusted)
        gain = gain.clamp(min=0)
        if limit is not None:
            squared = (image * gain[..., None, None] + bias[..., None, None] - target).square()
            trusted = weight * (1 + squared / limit).square().reciprocal().mean(2)
    return gain, bias
