"""The training losses: L_DAM of Multiface and L of LiP-Flow.

Reductions, stated once. All terms are dimensionless.

image
    Squared error of the rendered image in units of the texture std, mean over channels, then the mean over the
    batch's pixels weighted by the rendered weight mask; views that are not present have no weight. With an
    antialiasing renderer, silhouettes are blended over the photo's own pixels beside them.
geometry
    Squared vertex error in units of the vertex std, mean over frames, vertices and axes.
average_texture
    Squared difference, in units of the texture std, between the mean over a frame's decoded views (before colour
    correction) and its average texture, mean over frames, channels and the texels weighted by the weight mask.
latent
    ``dam``: KL(Q || N(0, I)). Otherwise a single-sample estimate of KL(Q || P(. | h)) with Q's analytic entropy,
    E_Q[log q] - log p(z | h), or its second part alone (``latent_estimate: likelihood``), mean over the frames that
    show the signal and over the present signals. All are divided by D: they are means over latent dimensions. A batch
    without any signal takes P = N(0, I) in y.
prior_image, prior_geometry
    As image and geometry, decoded from z = f^-1(y), y ~ P(. | h), over the frames that show the signal; mean over
    the signals drawn in this step.
reverse
    -log q(z | x) / D at the same z, mean over frames and drawn signals as they.

Diagnostics are no part of the loss
-----------------------------------
posterior_std
    Mean of Q's standard deviation over frames and dimensions.
prior_residual_rms_SIGNAL
    Root mean square, over the frames that show the signal and over dimensions, of (f(z) - mu_p) / sigma_p, z ~ Q: 1 for
    a calibrated prior, more for an over-confident one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lipflow.config import LossConfig
from lipflow.errors import LipflowError
from lipflow.model.avatar import Avatar
from lipflow.model.driving import signal_present
from lipflow.model.gaussian import DiagonalGaussian
from lipflow.render.outline import over_photo
from lipflow.render.renderer import Renderer
from lipflow.types import FrameBatch, colour_planes, map_tensors


class NonFiniteLossError(LipflowError):
    """A loss term is infinite or not a number; the message names the terms and the frames."""


class PosteriorCollapseError(LipflowError):
    """Q(z | x) has shrunk to points, so that latents between frames mean nothing any more."""


@dataclass
class LossTerms:
    """One step's loss.

    Attributes:
        total: the weighted sum, a scalar with gradients.
        terms: the terms before weighting, detached scalars; the names of the module's docstring, and
            ``latent_SIGNAL`` for each present signal.
        diagnostics: detached scalars; the names of the module's docstring.
    """

    total: Tensor
    terms: dict[str, Tensor]
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Driven:
    """One signal's prior, and the frames that show the signal."""

    prior: DiagonalGaussian
    present: Tensor


def training_loss(
    avatar: Avatar, renderer: Renderer, batch: FrameBatch, config: LossConfig, generator: torch.Generator
) -> LossTerms:
    """The loss of one batch; which terms there are depends on the avatar's method.

    Args:
        avatar: on the batch's device.
        renderer: of the avatar's topology, on the batch's device.
        batch: B frames with K views.
        config: weights.
        generator: of the latent samples, the drawn signals and the drivers' dropout.

    Raises:
        NonFiniteLossError: a term is not finite.
        PosteriorCollapseError: Q's mean standard deviation is below ``config.min_posterior_std``.
    """
    posterior = avatar.encode(batch.vertices, batch.average_texture)
    posterior_std = posterior.log_std.detach().exp().mean()
    if posterior_std < config.min_posterior_std:
        raise PosteriorCollapseError(
            f"the encoder's mean standard deviation is {posterior_std:.2g}, expected at least "
            f"{config.min_posterior_std:g} (min_posterior_std): raise latent_weight, or take latent_estimate kl"
        )
    z = posterior.sample(generator)
    driven = _drive(avatar, batch, generator)
    per_frame, diagnostics = _latent_terms(avatar, posterior, z, driven, config)
    diagnostics["posterior_std"] = posterior_std

    drawn: list[str] = []
    if (config.prior_weight > 0 or config.reverse_weight > 0) and driven:
        names = list(driven)
        order = torch.randperm(len(names), generator=generator, device=generator.device).tolist()
        drawn = [names[index] for index in order[: config.prior_signals_per_step]]
    latents, weights = [z], [torch.ones_like(z[:, 0])]
    for name in drawn:
        latents.append(avatar.latent_from_driven(driven[name].prior.sample(generator)))
        weights.append(driven[name].present.to(z.dtype))
    if config.reverse_weight > 0 and drawn:
        per_frame["reverse"] = _reverse_term(posterior, latents[1:], weights[1:])
    decoded = len(latents) if config.prior_weight > 0 else 1
    per_frame |= _reconstruction_terms(avatar, renderer, batch, latents[:decoded], weights[:decoded], config)

    factors = {
        "image": config.image_weight,
        "geometry": config.geometry_weight,
        "average_texture": config.average_texture_weight,
        "latent": config.latent_weight,
        "prior_image": config.prior_weight * config.image_weight,
        "prior_geometry": config.prior_weight * config.geometry_weight,
        "reverse": config.reverse_weight,
    }
    total = torch.stack([factors[name] * per_frame[name].sum() for name in factors if name in per_frame]).sum()
    if not torch.isfinite(total):
        raise NonFiniteLossError(_describe(per_frame, batch.frame_ids))
    return LossTerms(total, {name: values.detach().sum() for name, values in per_frame.items()}, diagnostics)


def reconstruction_loss(
    avatar: Avatar, renderer: Renderer, z: Tensor, batch: FrameBatch, config: LossConfig
) -> LossTerms:
    """L_rec of given latents: the image and geometry terms, as in :func:`training_loss`.

    Args:
        avatar: on the batch's device.
        renderer: of the avatar's topology.
        z: ``(B, D)``.
        batch: the B frames that the latents should explain.
        config: weights.
    """
    terms = _reconstruction_terms(avatar, renderer, batch, [z], [torch.ones_like(z[:, 0])], config)
    image, geometry = terms["image"].sum(), terms["geometry"].sum()
    total = config.image_weight * image + config.geometry_weight * geometry
    return LossTerms(total, {"image": image.detach(), "geometry": geometry.detach()})


def _drive(avatar: Avatar, batch: FrameBatch, generator: torch.Generator) -> dict[str, _Driven]:
    return {
        signal: _Driven(avatar.prior(signal, batch.driving, generator), signal_present(signal, batch.driving))
        for signal in avatar.signals
        if signal in batch.driving.available()
    }


def _latent_terms(
    avatar: Avatar, posterior: DiagonalGaussian, z: Tensor, driven: dict[str, _Driven], config: LossConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Frame by frame, such that the sum over frames is the term; and the diagnostics of the priors."""
    frames, dimensions = z.shape
    if avatar.config.method == "dam":
        return {"latent": posterior.kl_to_standard() / (dimensions * frames)}, {}
    y, log_det = avatar.driven_from_latent(z)
    without_prior = -log_det if config.latent_estimate == "likelihood" else -posterior.entropy() - log_det
    if not driven:
        divergence = without_prior - DiagonalGaussian.standard(y).log_prob(y)
        return {"latent": divergence / (dimensions * frames)}, {}
    terms, diagnostics = {}, {}
    for name, signal in driven.items():
        divergence = (without_prior - signal.prior.log_prob(y)) / dimensions
        shown = signal.present.sum().clamp(min=1)
        terms[f"latent_{name}"] = torch.where(signal.present, divergence, 0.0) / shown
        square = signal.prior.whiten(y).detach().square().mean(-1)
        diagnostics[f"prior_residual_rms_{name}"] = (torch.where(signal.present, square, 0.0).sum() / shown).sqrt()
    latent = torch.stack(list(terms.values())).mean(0)
    return {"latent": latent} | {name: values.detach() for name, values in terms.items()}, diagnostics


def _reverse_term(posterior: DiagonalGaussian, latents: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    terms = [
        torch.where(weight > 0, -posterior.log_prob(z) / z.shape[-1], 0.0) / weight.sum().clamp(min=1)
        for z, weight in zip(latents, weights, strict=True)
    ]
    return torch.stack(terms).mean(0)


def _reconstruction_terms(
    avatar: Avatar,
    renderer: Renderer,
    batch: FrameBatch,
    latents: Sequence[Tensor],
    weights: Sequence[Tensor],
    config: LossConfig,
) -> dict[str, Tensor]:
    """Decode and render all latents of the batch's frames at once; the first are Q's samples, the others P's."""
    rounds = len(latents)
    cameras = map_tensors(batch.cameras, lambda tensor: tensor.repeat(rounds, *[1] * (tensor.ndim - 1)))
    decoded = avatar.decode(torch.cat(list(latents)), cameras.view_vectors())
    textures = avatar.correct_color(decoded.textures, batch.camera_index.repeat(rounds, 1))
    with torch.autocast(textures.device.type, enabled=False):
        height, width = batch.images.shape[-2:]
        rendered = renderer.render(decoded.vertices, textures, cameras, (height, width))
    image = rendered.image
    if renderer.antialias:
        image = over_photo(rendered, batch.images.repeat(rounds, 1, 1, 1, 1))
    frames = len(batch.frame_ids)

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(frames)

    images = [
        _image_term(image, batch, weight_mask * frame_weight[:, None, None, None], avatar.texture_std)
        for image, weight_mask, frame_weight in zip(split(image), split(rendered.weight), weights, strict=True)
    ]
    geometries = [
        _geometry_term(vertices, batch.vertices, frame_weight, avatar.vertices_std)
        for vertices, frame_weight in zip(split(decoded.vertices), weights, strict=True)
    ]
    terms = {"image": images[0], "geometry": geometries[0]}
    if config.average_texture_weight > 0:
        mask = _weight_mask(renderer, batch.average_texture.shape[-1])
        terms["average_texture"] = _average_texture_term(
            decoded.textures[:frames], batch.average_texture, mask, avatar.texture_std
        )
    if rounds > 1:
        terms["prior_image"] = torch.stack(images[1:]).mean(0)
        terms["prior_geometry"] = torch.stack(geometries[1:]).mean(0)
    return terms


def _image_term(image: Tensor, batch: FrameBatch, weight: Tensor, unit: float) -> Tensor:
    _require_same_shape("image", image, batch.images)
    weight = (weight * batch.view_present[..., None, None]).detach()
    error = ((image - colour_planes(batch.images, image.dtype)) / unit).square().mean(2)
    # where, not a product: what is not compared may be anything.
    weighted = torch.where(weight > 0, error * weight, 0.0).sum((1, 2, 3))
    return weighted / weight.sum().clamp(min=1e-6)


def _geometry_term(vertices: Tensor, target: Tensor, frame_weight: Tensor, unit: float) -> Tensor:
    _require_same_shape("vertices", vertices, target)
    error = ((vertices - target) / unit).square().mean((1, 2))
    return torch.where(frame_weight > 0, error, 0.0) / frame_weight.sum().clamp(min=1)


def _average_texture_term(textures: Tensor, target: Tensor, mask: Tensor, unit: float) -> Tensor:
    mean = textures.mean(1)
    _require_same_shape("average texture", mean, target)
    error = ((mean - target.to(mean.dtype)) / unit).square().mean(1)
    return (error * mask).sum((1, 2)) / (mask.sum().clamp(min=1e-6) * len(error))


def _weight_mask(renderer: Renderer, texture_size: int) -> Tensor:
    return F.adaptive_avg_pool2d(renderer.weight_mask[None, None].float(), texture_size)[0, 0]


def _require_same_shape(name: str, predicted: Tensor, target: Tensor) -> None:
    if predicted.shape != target.shape:
        raise ValueError(f"predicted {name} has shape {tuple(predicted.shape)}, its target {tuple(target.shape)}")


def _describe(per_frame: dict[str, Tensor], frame_ids: Sequence[str]) -> str:
    faults = []
    for name, values in per_frame.items():
        frames = [frame for frame, finite in zip(frame_ids, values.isfinite().tolist(), strict=True) if not finite]
        if frames:
            faults.append(f"{name} of frames {', '.join(frames)}")
    found = "; ".join(faults) or "the weighted sum only"
    return f"the loss is not finite: {found}; lower the learning rate or check these frames with `lipflow verify`"
