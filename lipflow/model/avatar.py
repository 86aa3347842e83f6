"""The avatar: encoder, decoder, colour correction, drivers and flow of one captured person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipflow.config import AvatarConfig
from lipflow.errors import ConfigError, LipflowError
from lipflow.model.color import ColorCorrection
from lipflow.model.context import AvatarContext
from lipflow.model.decoder import Decoder
from lipflow.model.driving import FrontalDriver, HeadsetDriver, build_driver, signal_present
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
                )
                if config.method == "lipflow"
                else IdentityFlow()
            )
            self.drivers = nn.ModuleDict({signal: build_driver(signal, config, context) for signal in self.signals})

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
    def measure_driving(self, driving: DrivingSignals) -> None:
        """Normalise headset and frontal images by the statistics of these training frames.

        To be called once, before training and with the same frames on every worker; the statistics are saved with
        the weights.
        """
        for signal in self.signals:
            driver = self.drivers[signal]
            if isinstance(driver, HeadsetDriver | FrontalDriver) and signal in driving.available():
                driver.measure(driving)

    def prior(self, signal: str, driving: DrivingSignals, generator: torch.Generator | None = None) -> DiagonalGaussian:
        """P(y | h) of one signal; N(0, I) in frames where the signal shows nothing, and always for ``dam``.

        Args:
            signal: one of ``self.signals``; any driving signal for ``dam``.
            driving: with that signal.
            generator: given in training only: it hides views and landmarks at random.

        Raises:
            LipflowError: the avatar has no driver for the signal, or ``driving`` lacks it.
        """
        if signal not in driving.available():
            raise LipflowError(f"the input has no {signal} signal, it has {list(driving.available())}: use one of them")
        present = signal_present(signal, driving)
        nothing = DiagonalGaussian.standard(self.vertices_mean.new_zeros(len(present), self.config.latent_size))
        if self.config.method == "dam":
            return nothing
        if signal not in self.signals:
            raise LipflowError(
                f"this avatar has no {signal} driver, it has {list(self.signals)}: train one, or use those"
            )
        return self.drivers[signal](driving, generator).where(present, nothing)

    def fused_prior(self, signals: Sequence[str], driving: DrivingSignals) -> DiagonalGaussian:
        """The product over ``signals`` of P(y | h) without a frame's absent ones; N(0, I) if all are absent."""
        experts = [self.prior(signal, driving) for signal in signals]
        return product_of_gaussians(experts, [signal_present(signal, driving) for signal in signals])

    def log_prior(self, z: Tensor, gaussian: DiagonalGaussian) -> Tensor:
        """``(B,)`` log p(z | h) = log N(f(z); mean, std) + log |det df/dz|, in nats."""
        y, log_det = self.driven_from_latent(z, gaussian)
        return gaussian.log_prob(y) + log_det

    def driven_from_latent(self, z: Tensor, prior: DiagonalGaussian | None = None) -> tuple[Tensor, Tensor]:
        """y = f(z), ``(B, D)``, and ``log |det df/dz| (B,)``; ``prior`` is that of y, for flows conditioned on it."""
        del prior
        with torch.autocast(z.device.type, enabled=False):
            return self.flow(z)

    def latent_from_driven(self, y: Tensor, prior: DiagonalGaussian | None = None) -> Tensor:
        """z = f^-1(y), ``(B, D)``; ``prior`` is that of y, for flows conditioned on it."""
        del prior
        with torch.autocast(y.device.type, enabled=False):
            return self.flow.inverse(y)

    def start(self, gaussian: DiagonalGaussian) -> Tensor:
        """Where a fit starts, and what a regressor would answer: z = f^-1(mean), ``(B, D)``."""
        return self.latent_from_driven(gaussian.mean, gaussian)

    def start_from(self, signals: Sequence[str], driving: DrivingSignals) -> Tensor:
        """What the signals say of z without any fit, ``(B, D)``: :meth:`start` of their :meth:`fused_prior`."""
        return self.start(self.fused_prior(signals, driving))

    def _in_mm(self, vertices: Tensor) -> Tensor:
        return vertices.float() * self.vertices_std + self.vertices_mean


def _resolve_signals(config: AvatarConfig, context: AvatarContext) -> tuple[str, ...]:
    if config.method == "dam":
        return ()
    offered = context.offered_signals
    if config.signals is None:
        return offered
    lacking = [signal for signal in config.signals if signal not in offered]
    if lacking:
        raise ConfigError(f"signals lists {lacking}, but the capture offers only {list(offered)}: remove them")
    return config.signals
