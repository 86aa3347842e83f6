"""What a training minimises, and what its checkpoints are compared by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lipflow.config import LossConfig
from lipflow.losses import LossTerms, driver_loss, reconstruction_loss, training_loss
from lipflow.model.avatar import Avatar
from lipflow.model.drivers import given_signals
from lipflow.render.renderer import Renderer
from lipflow.types import FrameBatch


class Objective(nn.Module):
    """The training loss as one module, so that DDP's hooks see every gradient.

    Args:
        avatar: with the drivers to be trained.
        renderer: of its topology.
        config: weights.
        add_drivers: signals of the drivers that alone are trained; empty: everything is.
        validation_loss: weights by which avatars are compared; None: ``config``.
        validation_signals: signals whose drivers are judged beside the encoder; None: all of the avatar's.
        bfloat16: train the networks in it. Flow, rendering, colours and losses stay float32, and so does what is
            validated, since it is used so.
    """

    def __init__(
        self,
        avatar: Avatar,
        renderer: Renderer,
        config: LossConfig,
        add_drivers: Sequence[str] = (),
        *,
        validation_loss: LossConfig | None = None,
        validation_signals: Sequence[str] | None = None,
        bfloat16: bool = False,
    ):
        super().__init__()
        self.avatar = avatar
        self._renderer = renderer
        self._config = config
        self._add_drivers = tuple(add_drivers)
        self._validation_loss = validation_loss or config
        self._validation_signals = avatar.signals if validation_signals is None else tuple(validation_signals)
        self._bfloat16 = bfloat16

    def forward(self, batch: FrameBatch, generator: torch.Generator) -> LossTerms:
        """Loss of one batch; see :func:`lipflow.losses.training_loss` and :func:`lipflow.losses.driver_loss`."""
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self._bfloat16):
            if self._add_drivers:
                return driver_loss(self.avatar, self._renderer, batch, self._config, generator, self._add_drivers)
            return training_loss(self.avatar, self._renderer, batch, self._config, generator)

    @torch.no_grad()
    def validate(self, batches: Iterable[FrameBatch], avatar: Avatar | None = None) -> tuple[float, int]:
        """Sum over frames of the mean reconstruction loss, and the number of frames.

        The latents are the posterior mean and, for each driving signal, what it says of z without any fit: the best
        avatar is one that is both accurate and drivable. With ``add_drivers`` it is theirs alone.

        Two values compare avatars only if both were judged by the same weights and over the same latents.

        Args:
            batches: of validation frames.
            avatar: that is validated in place of the trained one, such as the average of its weights.
        """
        avatar = avatar or self.avatar
        total, frames = 0.0, 0
        for batch in batches:
            latents = [] if self._add_drivers else [avatar.encode(batch.vertices, batch.average_texture).mean]
            latents += [
                avatar.start_from([signal], batch.driving)
                for signal in self._add_drivers or self._validation_signals
                if signal in given_signals(batch.driving)
            ]
            losses = [
                reconstruction_loss(avatar, self._renderer, z, batch, self._validation_loss).total.item()
                for z in latents
            ]
            total += sum(losses) / len(losses) * len(batch.frame_ids)
            frames += len(batch.frame_ids)
        return total, frames
