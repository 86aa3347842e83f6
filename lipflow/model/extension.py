"""New drivers for a trained avatar: everything that it has stays as it is, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from lipflow.config import AvatarConfig
from lipflow.errors import ConfigError
from lipflow.model.avatar import Avatar
from lipflow.model.context import AvatarContext

_METHOD_WITH_DRIVERS = {"dam": "dam-regressor"}
"""What an avatar becomes by its first driver; other methods stay what they are."""

_DRIVER_FIELDS = ("headset_views", "keypoints", *(name for name in AvatarConfig.model_fields if name[:7] == "driver_"))
"""Of :class:`AvatarConfig`: what may be chosen for the first drivers of an avatar that has none."""


def config_with_drivers(
    avatar: Avatar, signals: Sequence[str], changes: Mapping[str, Any] | None = None
) -> AvatarConfig:
    """The configuration of a trained avatar with drivers for ``signals`` besides those it has.

    Args:
        avatar: trained.
        signals: of the new drivers.
        changes: fields of the drivers, for an avatar that has none yet.

    Raises:
        ConfigError: the avatar has one of these drivers, or a change would not leave it as it is.
    """
    there = [signal for signal in signals if signal in avatar.signals]
    if there:
        raise ConfigError(f"the avatar has a driver of {there[0]} already: add others, or train it with a new avatar")
    changes = dict(changes or {})
    free = () if avatar.signals else _DRIVER_FIELDS
    fixed = [name for name in changes if name not in free]
    if fixed:
        allowed = f"only {', '.join(free)} can be chosen" if free else "its drivers have theirs already"
        raise ConfigError(f"avatar.{fixed[0]} is that of the trained avatar, of whose settings {allowed}: leave it out")
    config = avatar.config
    changes |= {"method": _METHOD_WITH_DRIVERS.get(config.method, config.method)}
    changes |= {"signals": (*avatar.signals, *signals)}
    try:
        return AvatarConfig.model_validate(config.model_dump() | changes)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"the trained avatar cannot be given drivers of {list(signals)}: {reason}") from error


def with_drivers(avatar: Avatar, config: AvatarConfig, capture: AvatarContext) -> Avatar:
    """A trained avatar with new, untrained drivers, whose parameters are the only ones that ask for gradients.

    Args:
        avatar: trained.
        config: by :func:`config_with_drivers`.
        capture: what the shard set says of the capture: the new drivers' cameras and landmarks are from here, all
            else is the avatar's own.

    Raises:
        ConfigError: the capture is another one than the avatar's, or shows a signal of the avatar's otherwise.
    """
    extended = Avatar(config, _context_with_drivers(avatar, capture))
    new = [signal for signal in extended.signals if signal not in avatar.signals]
    extended.load_state_dict(extended.state_dict() | avatar.state_dict())
    extended.requires_grad_(False)
    for signal in new:
        extended.drivers[signal].requires_grad_(True)
    return extended


def _context_with_drivers(avatar: Avatar, capture: AvatarContext) -> AvatarContext:
    own = avatar.context
    own.require_same_capture(capture)
    size, found = own.normalization.texture_mean.shape[-1], capture.normalization.texture_mean.shape[-1]
    if size != found:
        raise ConfigError(f"the avatar has textures of {size}, the shard set of {found} texels: shard it at {size}")
    strangers = sorted(set(capture.train_camera_ids) - set(own.train_camera_ids))
    if strangers:
        raise ConfigError(
            f"the shard set has training cameras ({strangers}) that the avatar was not trained with: give a shard set "
            "with the same split of cameras"
        )
    changed = [signal for signal in avatar.signals if _constants(own, signal) != _constants(capture, signal)]
    if changed:
        raise ConfigError(
            f"the shard set shows {changed[0]} by other cameras or landmarks than those that the avatar's driver was "
            "trained with: give a shard set with the same driving signals"
        )
    return replace(
        own,
        topology=replace(own.topology, landmarks=capture.topology.landmarks),
        headset_cameras=capture.headset_cameras,
        frontal_camera_id=capture.frontal_camera_id,
        frontal_image_hw=capture.frontal_image_hw,
        keypoint_names=capture.keypoint_names,
    )


def _constants(context: AvatarContext, signal: str) -> tuple[Any, ...]:
    """What a driver relies on: equal for captures that show its signal in the same way."""
    if signal == "hmc":
        return tuple((camera.camera_id, tuple(camera.image_size_hw)) for camera in context.headset_cameras)
    if signal == "frontal":
        return context.frontal_camera_id, context.frontal_image_hw
    return context.frontal_camera_id, context.keypoint_names, tuple(context.landmark_vertices)
