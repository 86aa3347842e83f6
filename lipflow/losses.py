"""The training losses: L_DAM of Multiface, L of LiP-Flow, and that of a driver which is added to a trained avatar.

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
    without any signal takes P = N(0, I) in y, and so does ``flow-gaussian`` always. ``dam-regressor``: the squared
    error of the regressed z to Q's mean in units of Q's standard deviations, which counts what the decoder tells apart,
    with the same means.
latent_none
    The same estimate with P = N(0, I) in y whatever the frames show, divided by D, mean over frames: what a driven
    prior learns of faces without any signal. It has a weight of its own and is no part of ``latent``.
prior_image, prior_geometry
    As image and geometry, decoded from z = f^-1(y), y ~ P(. | h), or from the regressed z, over the frames that show
    the signal; mean over the signals drawn in this step.
reverse
    -log q(z | x) / D at the same z, mean over frames and drawn signals as they.

A driver that is added to a trained avatar has no image, geometry, average_texture and latent_none terms: they do not
depend on it.

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
from lipflow.model.drivers import given_signals
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
    """One signal's prior, and the frames that show the signal.

    A regressor's answer is the prior's mean, and there is no more of it.
    """

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
    driven = _drive(avatar, batch, avatar.signals, generator)
    terms, diagnostics = _latent_terms(avatar, posterior, z, driven, config)
    if config.no_signal_weight > 0 and avatar.config.has_driven_prior:
        terms["latent_none"] = _no_signal_term(avatar, posterior, z, config)
    latents, weights = _prior_latents(avatar, driven, config, generator)
    if config.reverse_weight > 0 and latents:
        terms["reverse"] = _reverse_term(posterior, latents, weights)
    if config.prior_weight == 0:
        latents, weights = [], []
    (own, *prior), textures = _compare(avatar, renderer, batch, [z, *latents], [torch.ones_like(z[:, 0]), *weights])
    terms |= own | _prior_terms(prior)
    if config.average_texture_weight > 0:
        mask = _weight_mask(renderer, batch.average_texture.shape[-1])
        terms["average_texture"] = _average_texture_term(
            textures[: len(z)], batch.average_texture, mask, avatar.texture_std
        )
    return _weighted(terms, diagnostics | {"posterior_std": posterior_std}, batch, config)


def driver_loss(
    avatar: Avatar,
    renderer: Renderer,
    batch: FrameBatch,
    config: LossConfig,
    generator: torch.Generator,
    signals: Sequence[str],
) -> LossTerms:
    """The loss of drivers that are added to a trained avatar, all the rest of which is frozen.

    The latent, prior and reverse terms of :func:`training_loss`, over these signals alone: what does not depend on
    their drivers is not computed.

    Args:
        avatar: of any method with drivers.
        renderer: of the avatar's topology.
        batch: B frames with K views.
        config: weights.
        generator: of the latent samples, the drawn signals and the drivers' dropout.
        signals: those whose drivers are trained.

    Raises:
        NonFiniteLossError: a term is not finite.
        LipflowError: the batch has none of these signals.
    """
    with torch.no_grad():
        posterior = avatar.encode(batch.vertices, batch.average_texture)
        z = posterior.sample(generator)
    driven = _drive(avatar, batch, signals, generator)
    if not driven:
        raise LipflowError(f"the batch has none of the signals {list(signals)}: add them to loader.signals")
    terms, diagnostics = _latent_terms(avatar, posterior, z, driven, config)
    latents, weights = _prior_latents(avatar, driven, config, generator)
    if config.reverse_weight > 0:
        terms["reverse"] = _reverse_term(posterior, latents, weights)
    if config.prior_weight > 0:
        terms |= _prior_terms(_compare(avatar, renderer, batch, latents, weights)[0])
    diagnostics["posterior_std"] = posterior.log_std.exp().mean()
    return _weighted(terms, diagnostics, batch, config)


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
    (terms,), _ = _compare(avatar, renderer, batch, [z], [torch.ones_like(z[:, 0])])
    image, geometry = terms["image"].sum(), terms["geometry"].sum()
    total = config.image_weight * image + config.geometry_weight * geometry
    return LossTerms(total, {"image": image.detach(), "geometry": geometry.detach()})


def _weighted(
    per_frame: dict[str, Tensor], diagnostics: dict[str, Tensor], batch: FrameBatch, config: LossConfig
) -> LossTerms:
    """The weighted sum over terms and frames; NonFiniteLossError if it is not finite."""
    factors = {
        "image": config.image_weight,
        "geometry": config.geometry_weight,
        "average_texture": config.average_texture_weight,
        "latent": config.latent_weight,
        "latent_none": config.no_signal_weight,
        "prior_image": config.prior_weight * config.image_weight,
        "prior_geometry": config.prior_weight * config.geometry_weight,
        "reverse": config.reverse_weight,
    }
    total = torch.stack([factors[name] * per_frame[name].sum() for name in factors if name in per_frame]).sum()
    if not torch.isfinite(total):
        raise NonFiniteLossError(_describe(per_frame, batch.frame_ids))
    return LossTerms(total, {name: values.detach().sum() for name, values in per_frame.items()}, diagnostics)


def _drive(avatar: Avatar, batch: FrameBatch, signals: Sequence[str], generator: torch.Generator) -> dict[str, _Driven]:
    def prior(signal: str) -> DiagonalGaussian:
        if avatar.config.method != "dam-regressor":
            return avatar.prior(signal, batch.driving, generator)
        answer = avatar.regress(signal, batch.driving, generator)
        return DiagonalGaussian(answer, torch.zeros_like(answer))

    return {
        signal: _Driven(prior(signal), avatar.presence(signal, batch.driving))
        for signal in signals
        if signal in given_signals(batch.driving)
    }


def _prior_latents(
    avatar: Avatar, driven: dict[str, _Driven], config: LossConfig, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """z ``(B, D)`` of the signals drawn in this step, and each frame's weight ``(B,)``; none if no term wants them."""
    if not driven or (config.prior_weight == 0 and config.reverse_weight == 0):
        return [], []
    names = list(driven)
    order = torch.randperm(len(names), generator=generator, device=generator.device).tolist()
    latents, weights = [], []
    for name in (names[index] for index in order[: config.prior_signals_per_step]):
        prior = driven[name].prior
        regressed = avatar.config.method == "dam-regressor"
        latents.append(prior.mean if regressed else avatar.latent_from_driven(prior.sample(generator), prior))
        weights.append(driven[name].present.to(prior.mean.dtype))
    return latents, weights


def _latent_terms(
    avatar: Avatar, posterior: DiagonalGaussian, z: Tensor, driven: dict[str, _Driven], config: LossConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Frame by frame, such that the sum over frames is the term; and the diagnostics of the priors."""
    frames, dimensions = z.shape
    if avatar.config.method == "dam":
        return {"latent": posterior.kl_to_standard() / (dimensions * frames)}, {}
    if not driven:
        return {"latent": _no_signal_term(avatar, posterior, z, config)}, {}
    log_posterior = _log_posterior(posterior, config)
    terms, diagnostics = {}, {}
    for name, signal in driven.items():
        shown = signal.present.sum().clamp(min=1)
        if avatar.config.method == "dam-regressor":
            error = posterior.whiten(signal.prior.mean).square().mean(-1)
            terms[f"latent_{name}"] = torch.where(signal.present, error, 0.0) / shown
            continue
        y, log_det = avatar.driven_from_latent(z, signal.prior)
        divergence = (log_posterior - log_det - signal.prior.log_prob(y)) / dimensions
        terms[f"latent_{name}"] = torch.where(signal.present, divergence, 0.0) / shown
        square = signal.prior.whiten(y).detach().square().mean(-1)
        diagnostics[f"prior_residual_rms_{name}"] = (torch.where(signal.present, square, 0.0).sum() / shown).sqrt()
    latent = torch.stack(list(terms.values())).mean(0)
    return {"latent": latent} | {name: values.detach() for name, values in terms.items()}, diagnostics


def _no_signal_term(avatar: Avatar, posterior: DiagonalGaussian, z: Tensor, config: LossConfig) -> Tensor:
    divergence = _log_posterior(posterior, config) - avatar.log_prior(z, DiagonalGaussian.standard(z))
    return divergence / z.numel()


def _log_posterior(posterior: DiagonalGaussian, config: LossConfig) -> Tensor | float:
    """E_Q[log q], ``(B,)``; nothing where the likelihood alone is estimated."""
    return 0.0 if config.latent_estimate == "likelihood" else -posterior.entropy()


def _reverse_term(posterior: DiagonalGaussian, latents: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    terms = [
        torch.where(weight > 0, -posterior.log_prob(z) / z.shape[-1], 0.0) / weight.sum().clamp(min=1)
        for z, weight in zip(latents, weights, strict=True)
    ]
    return torch.stack(terms).mean(0)


def _compare(
    avatar: Avatar, renderer: Renderer, batch: FrameBatch, latents: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Decode and render all latents of the batch's frames at once, and compare each with the frames.

    Args:
        avatar: on the batch's device.
        renderer: of the avatar's topology.
        batch: B frames with K views.
        latents: L times ``(B, D)``.
        weights: of the frames, for each of them ``(B,)``.

    Returns:
        L times the terms ``image`` and ``geometry``, and the decoded textures ``(L B, K, 3, T, T)``.
    """
    rounds, frames = len(latents), len(batch.frame_ids)
    cameras = map_tensors(batch.cameras, lambda tensor: tensor.repeat(rounds, *[1] * (tensor.ndim - 1)))
    decoded = avatar.decode(torch.cat(list(latents)), cameras.view_vectors())
    textures = avatar.correct_color(decoded.textures, batch.camera_index.repeat(rounds, 1))
    height, width = batch.images.shape[-2:]
    rendered = renderer.render(decoded.vertices, textures, cameras, (height, width))
    image = rendered.image
    if renderer.antialias:
        image = over_photo(rendered, batch.images.repeat(rounds, 1, 1, 1, 1))
    parts = (tensor.split(frames) for tensor in (image, rendered.weight, decoded.vertices))
    terms = [
        {
            "image": _image_term(image, batch, mask * weight[:, None, None, None], avatar.texture_std),
            "geometry": _geometry_term(vertices, batch.vertices, weight, avatar.vertices_std),
        }
        for image, mask, vertices, weight in zip(*parts, weights, strict=True)
    ]
    return terms, decoded.textures


def _prior_terms(compared: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over the drawn signals, under names of their own; nothing if none was drawn."""
    if not compared:
        return {}
    return {f"prior_{name}": torch.stack([terms[name] for terms in compared]).mean(0) for name in compared[0]}


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
