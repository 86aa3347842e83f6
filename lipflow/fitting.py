"""Inference-time optimisation: the latent code that explains what a driving signal shows.

    z* = argmin_z  L_obs(D(z), o) - lambda / D log p(z | h),  started at f^-1(mean of P(y | h))

``dam`` has p = N(0, I) and starts at z = 0. Frames are optimised side by side and never influence each other. L_obs
is what the signal shows and nothing else:

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

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from lipflow.config import FitConfig
from lipflow.errors import LipflowError
from lipflow.model.avatar import Avatar
from lipflow.model.color import solve_gain_bias
from lipflow.model.driving import SeenViews, frontal_view, headset_views, landmark_residuals_mm, seen_keypoints
from lipflow.render.renderer import Renderer
from lipflow.types import DrivingSignals, colour_planes

_REWEIGHTINGS = 4

_BACKGROUND_PX = 2
"""How far from a pixel of the outline its background is looked for."""

_LEAST_COVERAGE = 0.25
"""Smallest share of a pixel by which its colour is divided; where something is seen it is seldom below 1/2."""

GREY_OF_RGB = (0.299, 0.587, 0.114)
"""Luma weights (ITU-R BT.601): how a monochrome headset camera sees a colour texture."""


@dataclass
class FitResult:
    """Latent codes of B frames.

    Attributes:
        z: ``(B, D)`` each frame's best iterate.
        start: ``(B, D)`` where its optimisation started.
        objective: ``(B,)`` at ``z``.
        trace: ``(iterations + 1, B)`` objective at the start and after every step.
        observed_trace: the same for L_obs alone.
        seconds: wall-clock time of the whole batch.
        recorded: number of iterations -> ``(B, D)`` the best iterate after so many, for those that were asked for.
    """

    z: Tensor
    start: Tensor
    objective: Tensor
    trace: Tensor
    observed_trace: Tensor
    seconds: float
    recorded: dict[int, Tensor] = field(default_factory=dict)


def fit(
    avatar: Avatar,
    renderer: Renderer,
    driving: DrivingSignals,
    signals: str | Sequence[str],
    config: FitConfig,
    start: Tensor | None = None,
    *,
    record: Sequence[int] = (),
) -> FitResult:
    """Fit the latent codes of B frames to one driving signal, or to several at once.

    The avatar is not changed. With several signals L_obs is their sum, and the prior the product of theirs.

    Args:
        avatar: trained.
        renderer: of its topology, on the same device.
        driving: the signals of B frames, on the same device.
        signals: ``hmc``, ``frontal``, ``keypoints``, or several of them.
        config: iterations, learning rate, weights.
        start: ``(B, D)`` start instead of f^-1(mean), for instance a regressor's answer.
        record: numbers of iterations after which the best iterate is kept in ``recorded``; each at most
            ``config.iterations``.

    Raises:
        LipflowError: a signal is missing, more iterations are to be recorded than there are, or the objective of a
            frame is not finite.
    """
    names = (signals,) if isinstance(signals, str) else tuple(signals)
    if not names:
        raise LipflowError("no signal to fit to: name at least one of hmc, frontal, keypoints")
    if record and not 0 <= min(record) <= max(record) <= config.iterations:
        raise LipflowError(f"record is {tuple(record)}, expected numbers of iterations from 0 to {config.iterations}")
    began = time.perf_counter()
    with torch.no_grad():
        prior = avatar.fused_prior(names, driving)
        start = avatar.start_from(names, driving) if start is None else start
    z = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=config.learning_rate)
    best, lowest = z.detach().clone(), torch.full_like(z[:, 0], torch.inf)
    trace, observed_trace, recorded = [], [], {}
    for iteration in range(config.iterations + 1):
        observed = torch.stack([_OBSERVED[name](avatar, renderer, driving, z, config) for name in names]).sum(0)
        objective = observed - config.prior_weight / z.shape[-1] * avatar.log_prior(z, prior)
        value = objective.detach()
        if not torch.isfinite(value).all():
            frames = (~torch.isfinite(value)).nonzero()[:, 0].tolist()
            raise LipflowError(
                f"the objective of frames {frames} of the batch is not finite at iteration {iteration}: "
                "lower the learning rate"
            )
        improved = value < lowest
        lowest = torch.where(improved, value, lowest)
        best = torch.where(improved[:, None], z.detach(), best)
        trace.append(value)
        observed_trace.append(observed.detach())
        if iteration in record:
            recorded[iteration] = best
        if iteration < config.iterations:
            # The sum keeps frames apart: each row of the gradient, and of Adam's state, belongs to one of them.
            (z.grad,) = torch.autograd.grad(objective.sum(), z)
            optimizer.step()
    if z.is_cuda:
        torch.cuda.synchronize(z.device)
    seconds = time.perf_counter() - began
    return FitResult(best, start, lowest, torch.stack(trace), torch.stack(observed_trace), seconds, recorded)


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
        image = covered * image + (1 - covered) * _background(target, rendered.mask)
    squared = (image - target).square()
    if limit is not None:
        squared = squared / (1 + squared / limit)
    error = squared.mean(2) / avatar.texture_std**2
    return (weight * error).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1e-6)


def _background(target: Tensor, mask: Tensor) -> Tensor:
    """``(B, K, C, H, W)`` what lies behind the outline: the mean of the photo's pixels just outside of the mask.

    Over black instead, the outline would be drawn to wherever the photo's own background is hidden.
    """
    outside = (~mask).to(target.dtype).flatten(0, 1)[:, None]
    total = avg_pool2d(outside * target.flatten(0, 1), 2 * _BACKGROUND_PX + 1, 1, _BACKGROUND_PX)
    share = avg_pool2d(outside, 2 * _BACKGROUND_PX + 1, 1, _BACKGROUND_PX)
    return (total / share.clamp(min=1e-6)).unflatten(0, mask.shape[:2])


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
