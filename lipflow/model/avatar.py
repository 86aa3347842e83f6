"""The avatar: encoder, decoder, colour correction, drivers and flow of one captured person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lipflow.config import AvatarConfig
from lipflow.errors import ConfigError, LipflowError
from lipflow.model.color import ColorCorrection
from lipflow.model.context import AvatarContext
from lipflow.model.decoder import Decoder
from lipflow.model.drivers import Driver, find_signal, given_signals, registered_signals
from lipflow.model.encoder import Encoder
from lipflow.model.flow import IdentityFlow, LatentFlow
from lipflow.model.gaussian import DiagonalGaussian, product_of_gaussians
from lipflow.types import DrivingSignals


@dataclass
class Decoded:
    """B decoded frames.

    Attributes:
        vertices: ``(B, V, 3)`` mm, head frame.
        textures: ``(B, K, 3, T, T)`` in 0..255 (not clipped), before colour correction.
    """

    vertices: Tensor
    textures: Tensor


class Avatar(nn.Module):
    """One person's avatar and its drivers.

    Args:
        config: the architecture.
        context: the capture's constants.

    Raises:
        ConfigError: the context does not fit the config.
    """

    texture_mean: Tensor
    vertices_mean: Tensor

    def __init__(self, config: AvatarConfig, context: AvatarContext):
        super().__init__()
        self.config = config
        self.context = context
        self.signals = _resolve_signals(config, context)
        statistics = context.normalization
        size = statistics.texture_mean.shape[-1]
        if size != config.texture_size:
            raise ConfigError(
                f"texture_size is {config.texture_size}, but the capture's mean texture has {size}: "
                f"set texture_size to {size}, or shard the capture at {config.texture_size}"
            )
        self.texture_std = float(statistics.texture_std)
        self.vertices_std = float(statistics.vertices_std)
        if not (self.texture_std > 0 and self.vertices_std > 0):
            raise ConfigError(
                f"texture std {self.texture_std} and vertex std {self.vertices_std} must be positive: "
                "take the statistics of more than one frame"
            )
        # Not persistent: a checkpoint holds them once, in the context.
        self.register_buffer("texture_mean", torch.from_numpy(statistics.texture_mean).float(), persistent=False)
        self.register_buffer("vertices_mean", torch.from_numpy(statistics.vertices_mean).float(), persistent=False)
        num_vertices = context.topology.num_vertices
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.init_seed)
            self.encoder = Encoder(config, num_vertices)
            self.decoder = Decoder(config, num_vertices)
            pivot = self.texture_mean if config.color_correction == "deviation" else None
            self.color = ColorCorrection(context.camera_ids, context.train_camera_ids, self.texture_std, pivot)
            self.flow = (
                LatentFlow(
                    config.latent_size,
                    config.flow_steps,
                    config.flow_hidden_size,
                    config.flow_transform,
                    config.flow_bins,
                    conditional=config.flow_conditional,
                )
                if config.has_flow
                else IdentityFlow()
            )
            self.drivers = nn.ModuleDict({name: find_signal(name).driver(config, context) for name in self.signals})
        # What the config may not name is told now, not in the first step.
        self.visible(DrivingSignals())

    def encode(self, vertices: Tensor, average_texture: Tensor) -> DiagonalGaussian:
        """Q(z | x) of fully observed frames.

        Args:
            vertices: ``(B, V, 3)`` mm.
            average_texture: ``(B, 3, T, T)`` 0..255, uint8 or float, row 0 is v = 0.

        Returns:
            A Gaussian over z ``(B, D)``.

        Raises:
            LipflowError: the mesh or the texture has another size than the avatar's.
        """
        for name, tensor, mean in (
            ("vertices", vertices, self.vertices_mean),
            ("average_texture", average_texture, self.texture_mean),
        ):
            if tensor.shape[1:] != mean.shape:
                raise LipflowError(
                    f"{name} of shape {tuple(tensor.shape)} does not fit this avatar: expected "
                    f"{('B', *mean.shape)}; use a shard set of the same capture and texture size"
                )
        texture = (average_texture.float() - self.texture_mean) / self.texture_std
        return self.encoder((vertices - self.vertices_mean) / self.vertices_std, texture)

    def decode(self, z: Tensor, view_vectors: Tensor) -> Decoded:
        """D(z, v): mesh and one texture for each view.

        Args:
            z: ``(B, D)``.
            view_vectors: ``(B, K, 3)`` unit camera centres in the head frame.
        """
        vertices, textures = self.decoder(z, view_vectors)
        return Decoded(self._in_mm(vertices), textures.float() * self.texture_std + self.texture_mean)

    def decode_vertices(self, z: Tensor) -> Tensor:
        """The mesh of ``z (B, D)`` alone: ``(B, V, 3)`` mm."""
        return self._in_mm(self.decoder.vertices(z))

    def correct_color(self, textures: Tensor, camera_index: Tensor) -> Tensor:
        """Decoded textures ``(B, K, 3, T, T)`` as cameras ``(B, K)`` see them; untrained ones change nothing."""
        return self.color(textures, camera_index)

    @torch.no_grad()
    def measure_driving(self, driving: DrivingSignals, signals: Sequence[str] | None = None) -> None:
        """Normalise headset and frontal images by the statistics of these training frames.

        To be called once, before training and with the same frames on every worker; the statistics are saved with
        the weights.

        Args:
            driving: of the training frames.
            signals: those whose drivers are to be trained; None: all. The statistics of the others stay.
        """
        driving = self.visible(driving)
        for name in self.signals if signals is None else signals:
            if find_signal(name).given(driving):
                cast(Driver, self.drivers[name]).measure(driving)

    def visible(self, driving: DrivingSignals) -> DrivingSignals:
        """``driving`` without the headset views and landmarks that this avatar must not see.

        They are marked absent. Doing so twice changes nothing, so that every reader of driving signals may do it.

        Raises:
            ConfigError: the config names a view or a landmark that the capture lacks.
        """
        for signal in registered_signals():
            driving = signal.visible(driving, self.config, self.context)
        return driving

    def presence(self, signal: str, driving: DrivingSignals) -> Tensor:
        """``(B,)`` bool: the frames in which ``signal`` shows anything that this avatar may see.

        Raises:
            LipflowError: there is no such signal, or ``driving`` lacks it.
        """
        return find_signal(signal).present(self.visible(driving))

    def prior(self, signal: str, driving: DrivingSignals, generator: torch.Generator | None = None) -> DiagonalGaussian:
        """P(y | h) of one signal; N(0, I) in frames where it shows nothing, and always without driven prior.

        Args:
            signal: one of ``self.signals``; any driving signal without drivers.
            driving: with that signal.
            generator: given in training only: it hides views and landmarks at random.

        Raises:
            LipflowError: the avatar has no driver for the signal, or ``driving`` lacks it.
        """
        driving = self.visible(driving)
        present = self._shown(signal, driving)
        nothing = self.prior_without_signal(len(present))
        if not self.config.has_driven_prior:
            return nothing
        return self._driver(signal)(driving, generator).where(present, nothing)

    def regress(self, signal: str, driving: DrivingSignals, generator: torch.Generator | None = None) -> Tensor:
        """The z ``(B, D)`` that the driver of a ``dam-regressor`` answers; 0 in frames where the signal shows nothing.

        Arguments and errors are those of :meth:`prior`.
        """
        driving = self.visible(driving)
        present = self._shown(signal, driving)
        return torch.where(present[:, None], self._driver(signal)(driving, generator).mean, 0.0)

    def prior_without_signal(self, count: int) -> DiagonalGaussian:
        """What is known of ``count`` faces without any signal: N(0, I) in y, ``(count, D)``."""
        return DiagonalGaussian.standard(self.vertices_mean.new_zeros(count, self.config.latent_size))

    def fused_prior(self, signals: Sequence[str], driving: DrivingSignals) -> DiagonalGaussian:
        """The product over ``signals`` of P(y | h) without a frame's absent ones; N(0, I) if all are absent."""
        experts = [self.prior(signal, driving) for signal in signals]
        if not self.config.has_driven_prior:
            # It says nothing of any signal: it counts once, however many there are.
            return experts[0]
        return product_of_gaussians(experts, [self.presence(signal, driving) for signal in signals])

    def log_prior(self, z: Tensor, gaussian: DiagonalGaussian) -> Tensor:
        """``(B,)`` log p(z | h) = log N(f(z); mean, std) + log |det df/dz|, in nats."""
        y, log_det = self.driven_from_latent(z, gaussian)
        return gaussian.log_prob(y) + log_det

    def driven_from_latent(self, z: Tensor, prior: DiagonalGaussian) -> tuple[Tensor, Tensor]:
        """y = f(z), ``(B, D)``, and ``log |det df/dz| (B,)``; ``prior`` is that of y, for flows conditioned on it."""
        with torch.autocast(z.device.type, enabled=False):
            return self.flow(z, prior)

    def latent_from_driven(self, y: Tensor, prior: DiagonalGaussian) -> Tensor:
        """z = f^-1(y), ``(B, D)``; ``prior`` is that of y, for flows conditioned on it."""
        with torch.autocast(y.device.type, enabled=False):
            return self.flow.inverse(y, prior)

    def start(self, gaussian: DiagonalGaussian) -> Tensor:
        """Where the fit of a driven prior starts: z = f^-1(mean), ``(B, D)``."""
        return self.latent_from_driven(gaussian.mean, gaussian)

    def start_from(self, signals: Sequence[str], driving: DrivingSignals) -> Tensor:
        """What the signals say of z without any fit, ``(B, D)``.

        :meth:`start` of their :meth:`fused_prior`; for ``dam-regressor`` the mean of the answers of the signals that a
        frame shows, 0 if it shows none.
        """
        if self.config.method != "dam-regressor":
            return self.start(self.fused_prior(signals, driving))
        answers = torch.stack([self.regress(signal, driving) for signal in signals])
        shown = torch.stack([self.presence(signal, driving) for signal in signals]).sum(0)
        return answers.sum(0) / shown.clamp(min=1)[:, None]

    def _shown(self, signal: str, driving: DrivingSignals) -> Tensor:
        """``(B,)`` bool: the frames that show ``signal``; LipflowError if ``driving`` has no such signal."""
        if not find_signal(signal).given(driving):
            raise LipflowError(
                f"the input has no {signal} signal, it has {list(given_signals(driving))}: use one of them"
            )
        return self.presence(signal, driving)

    def _driver(self, signal: str) -> nn.Module:
        if signal not in self.signals:
            raise LipflowError(
                f"this avatar has no {signal} driver, it has {list(self.signals)}: train one with --add-driver, or use "
                "those"
            )
        return self.drivers[signal]

    def _in_mm(self, vertices: Tensor) -> Tensor:
        return vertices.float() * self.vertices_std + self.vertices_mean


def _resolve_signals(config: AvatarConfig, context: AvatarContext) -> tuple[str, ...]:
    if not config.has_drivers:
        return ()
    offered = context.offered_signals
    if config.signals is None:
        return offered
    lacking = [signal for signal in config.signals if signal not in offered]
    if lacking:
        raise ConfigError(f"signals lists {lacking}, but the capture offers only {list(offered)}: remove them")
    return config.signals
