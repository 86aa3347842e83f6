"""What a driving signal declares of itself, and the register of all that are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lipflow.errors import ConfigError, LipflowError
from lipflow.types import DRIVING_SIGNALS, DrivingSignals

if TYPE_CHECKING:
    # Both look up the register: they must be importable before it.
    from lipflow.config import AvatarConfig
    from lipflow.model.context import AvatarContext
    from lipflow.model.gaussian import DiagonalGaussian

_T = TypeVar("_T")


class Driver(nn.Module, ABC):
    """The driving encoder of one signal."""

    @abstractmethod
    def forward(self, driving: DrivingSignals, generator: torch.Generator | None) -> DiagonalGaussian:
        """P(y | h), ``(B, D)``.

        Args:
            driving: of B frames, with the signal. Rows of frames in which it is absent may be anything finite.
            generator: given in training only: parts of the signal are hidden at random by it.
        """

    def measure(self, driving: DrivingSignals) -> None:
        """Take the statistics of training frames; see :meth:`lipflow.model.avatar.Avatar.measure_driving`."""


class Signal(ABC):
    """One kind of driving signal.

    Attributes:
        name: by which configs and callers ask for it.
        field: of :class:`lipflow.types.DrivingSignals`, without which the signal is not given at all.
    """

    name: ClassVar[str]
    field: ClassVar[str]

    @abstractmethod
    def offered(self, context: AvatarContext) -> bool:
        """Whether a capture can show it."""

    @abstractmethod
    def present(self, driving: DrivingSignals) -> Tensor:
        """``(B,)`` bool: the frames in which it shows anything; LipflowError if it is not given."""

    @abstractmethod
    def driver(self, config: AvatarConfig, context: AvatarContext) -> Driver:
        """A fresh encoder."""

    def given(self, driving: DrivingSignals) -> bool:
        """Whether ``driving`` has the signal, in any of its frames or none."""
        return getattr(driving, self.field) is not None

    def visible(self, driving: DrivingSignals, config: AvatarConfig, context: AvatarContext) -> DrivingSignals:
        """``driving`` with those parts of the signal marked absent that the avatar must not see.

        Raises:
            ConfigError: ``config`` names parts that the capture lacks.
        """
        del config, context
        return driving


_REGISTERED: dict[str, Signal] = {}


def register(signal: Signal) -> None:
    """Make a signal known under its name.

    Raises:
        LipflowError: the name is taken.
    """
    if signal.name in _REGISTERED:
        raise LipflowError(f"there is a driving signal {signal.name!r} already: give the new one another name")
    _REGISTERED[signal.name] = signal


def registered_signals() -> tuple[Signal, ...]:
    """All known signals: those of ``DRIVING_SIGNALS`` in its order, then the others by name."""
    names = [name for name in DRIVING_SIGNALS if name in _REGISTERED]
    names += sorted(set(_REGISTERED) - set(names))
    return tuple(_REGISTERED[name] for name in names)


def find_signal(name: str) -> Signal:
    """The signal of that name.

    Raises:
        LipflowError: there is none.
    """
    if name not in _REGISTERED:
        known = [signal.name for signal in registered_signals()]
        raise LipflowError(f"there is no driving signal {name!r}: choose from {', '.join(known)}")
    return _REGISTERED[name]


def given_signals(driving: DrivingSignals) -> tuple[str, ...]:
    """The names of the signals that ``driving`` has."""
    return tuple(signal.name for signal in registered_signals() if signal.given(driving))


def required(part: _T | None, name: str) -> _T:
    """``part``, a field of ``DrivingSignals`` of that ``name``; LipflowError if it is None."""
    if part is None:
        raise LipflowError(f"the driving signals lack {name}: give them with it, or use another signal")
    return part


def chosen_parts(setting: str, chosen: Sequence[str], offered: Sequence[str]) -> list[bool]:
    """For each of the ``offered`` names whether it is ``chosen``.

    Raises:
        ConfigError: a chosen name is none of them; the message names the config's ``setting``.
    """
    strangers = [name for name in chosen if name not in offered]
    if strangers:
        raise ConfigError(
            f"{setting} lists {', '.join(strangers)}, which the capture lacks: "
            + (f"choose from {', '.join(offered)}" if offered else "it offers none, leave it out")
        )
    return [name in chosen for name in offered]
