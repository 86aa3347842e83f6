"""The space of a sweep: which settings of a training are searched, and over what.

A space maps dotted keys of :class:`cluster.training.loop.TrainRecipe` to dimensions. Everything about it is checked
before the first trial: unknown keys, values that a setting does not take, and settings on which trials may not
differ, because they would then be measured by different yardsticks.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator

from cluster.training.recipe import TrainRecipe
from lipflow.config import AvatarConfig, StrictConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MOST_COMBINATIONS = 128
"""Corners of a space that are built before the sweep starts; a larger space is checked at as many drawn ones."""

Value: TypeAlias = bool | int | float | str | list[Any] | None


class Uniform(StrictConfig):
    """A real number between ``low`` and ``high``; with ``log`` its logarithm is uniform.

    Written as ``{kind: uniform, low: 0, high: 1}`` or ``{kind: loguniform, low: 1.0e-4, high: 1.0e-2}``.
    """

    kind: Literal["uniform", "loguniform"]
    low: float
    high: float

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_bounds(self.low, self.high)
        if self.kind == "loguniform" and self.low <= 0:
            raise ValueError(
                f"low is {self.low:g}, and a loguniform dimension has no logarithm there: raise it above 0"
            )
        return self

    def corners(self) -> tuple[Value, ...]:
        """Values at which the space is tried before the sweep."""
        return (self.low, self.high)

    def inner(self) -> tuple[Value, ...]:
        """A value between: a setting of whole numbers takes whole corners, and nothing that is drawn between."""
        return (self.low + 0.382 * (self.high - self.low),)

    def distribution(self) -> BaseDistribution:
        """As Optuna draws it."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.kind == "loguniform")

    def coded(self, value: Value) -> Any:
        """The value as Optuna knows it."""
        return value

    def decoded(self, code: Any) -> Value:
        """The value of an Optuna parameter."""
        return code

    def holds(self, value: Value) -> bool:
        """Whether the value lies in the dimension."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= float(value) <= self.high  # type: ignore[arg-type]


class Int(StrictConfig):
    """An integer from ``low`` to ``high``, both included, in steps of ``step``; or of uniform logarithm.

    Written as ``{kind: int, low: 2, high: 8}``, ``{kind: int, low: 16, high: 256, log: true}``.
    """

    kind: Literal["int"]
    low: int
    high: int
    step: int = Field(1, ge=1)
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_bounds(self.low, self.high)
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}, which has no logarithm: raise it above 0, or leave out log")
        if self.log and self.step != 1:
            raise ValueError(f"step is {self.step} and log is true: a logarithmic dimension has no even steps")
        if (self.high - self.low) % self.step:
            raise ValueError(f"high is {self.high}, no number of steps of {self.step} above low {self.low}")
        return self

    def corners(self) -> tuple[Value, ...]:
        """Values at which the space is tried before the sweep."""
        return (self.low, self.high)

    def inner(self) -> tuple[Value, ...]:
        """A value between: a setting of multiples of 4 takes such corners, and not every number between."""
        return (self.low + self.step,)

    def distribution(self) -> BaseDistribution:
        """As Optuna draws it."""
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high, log=self.log, step=self.step)

    def coded(self, value: Value) -> Any:
        """The value as Optuna knows it."""
        return value

    def decoded(self, code: Any) -> Value:
        """The value of an Optuna parameter."""
        return int(code)

    def holds(self, value: Value) -> bool:
        """Whether the value lies in the dimension."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and self.low <= value <= self.high and (value - self.low) % self.step == 0  # type: ignore[operator]


class Choice(StrictConfig):
    """One of several values, of any kind that the setting takes: ``{kind: choice, values: [affine, spline]}``."""

    kind: Literal["choice"]
    values: tuple[Any, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        codes = [self.coded(value) for value in self.values]
        if len(set(codes)) != len(codes):
            raise ValueError(f"values lists one twice: {list(self.values)}")
        return self

    def corners(self) -> tuple[Value, ...]:
        """Values at which the space is tried before the sweep."""
        return self.values

    def inner(self) -> tuple[Value, ...]:
        """Nothing: all values are corners."""
        return ()

    def distribution(self) -> BaseDistribution:
        """As Optuna draws it."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([self.coded(value) for value in self.values])

    def coded(self, value: Value) -> Any:
        """The value as Optuna knows it: as JSON, since a choice may be a list."""
        return json.dumps(value)

    def decoded(self, code: Any) -> Value:
        """The value of an Optuna parameter."""
        return json.loads(code)

    def holds(self, value: Value) -> bool:
        """Whether the value is one of the choices."""
        return self.coded(value) in [self.coded(known) for known in self.values]


SearchDimension: TypeAlias = Annotated[Uniform | Int | Choice, Field(discriminator="kind")]
Space: TypeAlias = Mapping[str, Uniform | Int | Choice]
Point: TypeAlias = Mapping[str, Value]
"""Dotted key to value."""

_YARDSTICK = "trials are compared by their validation loss, which it is a part of"
_LUCK = "the best of several seeds is the luckiest, and luck does not carry over to the next training"
_RUNNING = "it says how or where a training runs, not what comes of it"
FIXED = {
    "validation_frames": _YARDSTICK,
    "validation_cameras": _YARDSTICK,
    "validation_loss": _YARDSTICK,
    "validation_signals": _YARDSTICK,
    "render": _YARDSTICK,
    "avatar.signals": _YARDSTICK,
    "avatar.headset_views": _YARDSTICK,
    "avatar.keypoints": _YARDSTICK,
    "avatar.texture_size": "it is the shard set's",
    "seed": _LUCK,
    "avatar.init_seed": _LUCK,
    "loader.seed": _LUCK,
    "steps": "every trial has the sweep's trial_steps, so that they are compared at equal budget",
    "add_drivers": "a sweep trains new avatars",
    "model": "a sweep trains new avatars",
    "checkpoint_every_steps": "trials report every grace_steps",
    "log_every_steps": _RUNNING,
    "workers": _RUNNING,
    "cpus_per_worker": _RUNNING,
    "use_gpu": _RUNNING,
    "max_failures": _RUNNING,
    "register_as": _RUNNING,
    "tracking": _RUNNING,
}
"""Settings on which trials may not differ, and why; a group stands for all that is in it."""


def default_space(avatar: AvatarConfig) -> dict[str, Uniform | Int | Choice]:
    """Loss weights, sizes, the learning rate and switches of the architecture, as far as they matter to the method."""
    space: dict[str, Uniform | Int | Choice] = {
        "learning_rate": Uniform(kind="loguniform", low=2e-4, high=1e-2),
        "loss.latent_weight": Uniform(kind="loguniform", low=1e-3, high=1e-1),
        "avatar.latent_size": Int(kind="int", low=16, high=256, log=True),
        "avatar.residual": Choice(kind="choice", values=(False, True)),
        "avatar.upsample": Choice(kind="choice", values=("transposed", "bilinear")),
    }
    if avatar.has_drivers:
        space["loss.prior_weight"] = Uniform(kind="uniform", low=0.0, high=2.0)
    if avatar.has_flow:
        space["avatar.flow_steps"] = Int(kind="int", low=2, high=8)
        space["avatar.flow_transform"] = Choice(kind="choice", values=("affine", "spline"))
    if avatar.method == "lipflow":
        # The same decoder, drivers and losses: with a flow behind the prior, and without one.
        space["avatar.method"] = Choice(kind="choice", values=("lipflow", "conditional"))
    return space


def known_keys(config_class: type[BaseModel] = TrainRecipe, prefix: str = "") -> list[str]:
    """Dotted keys of all settings, groups left out."""
    keys = []
    for name, field in config_class.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def with_values(base: TrainRecipe, values: Point) -> TrainRecipe:
    """The recipe with some settings changed.

    Raises:
        ValidationError: it does not take these values.
    """
    settings = base.model_dump(mode="json")
    for key, value in values.items():
        *groups, last = key.split(".")
        group = settings
        for name in groups:
            group = group[name]
        group[last] = value
    return TrainRecipe.model_validate(settings)


def base_point(base: TrainRecipe, space: Space) -> dict[str, Value]:
    """Where the recipe itself stands in the space; it may lie outside."""
    settings = base.model_dump(mode="json")
    point = {}
    for key in space:
        value: Any = settings
        for name in key.split("."):
            value = value[name]
        point[key] = value
    return point


def check_space(base: TrainRecipe, space: Space) -> None:
    """Refuse a space that no sweep can search.

    Raises:
        ValueError: an unknown or fixed key, or values that the recipe does not take, alone or together.
    """
    if not space:
        raise ValueError("space has no dimensions: give some, or leave it out for the default ones")
    known = known_keys()
    for key in space:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            raise ValueError(f"space has the unknown key {key!r}; {hint}")
        reason = next((why for name, why in FIXED.items() if key == name or key.startswith(f"{name}.")), None)
        if reason is not None:
            raise ValueError(f"space.{key} may not be searched: {reason}; leave it out")
    for key, dimension in space.items():
        for value in (*dimension.corners(), *dimension.inner()):
            try:
                with_values(base, {key: value})
            except ValidationError as error:
                raise ValueError(f"space.{key} holds {value!r}, which train does not take: {_reason(error)}") from error
    for point in _combinations(space):
        try:
            with_values(base, point)
        except ValidationError as error:
            raise ValueError(
                f"space holds a combination that train does not take, {_described(point)}: {_reason(error)}; take one"
                " of these values out"
            ) from error


def _combinations(space: Space) -> Iterator[dict[str, Value]]:
    """All corners of the space, or as many drawn ones where there are more."""
    corners = [dimension.corners() for dimension in space.values()]
    if math.prod(len(values) for values in corners) <= MOST_COMBINATIONS:
        for values in itertools.product(*corners):
            yield dict(zip(space, values, strict=True))
        return
    generator = np.random.default_rng(0)
    for _ in range(MOST_COMBINATIONS):
        yield {key: values[generator.integers(len(values))] for key, values in zip(space, corners, strict=True)}


def _check_bounds(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"low is {low:g} and high is {high:g}: low must be below high")


def _reason(error: ValidationError) -> str:
    item = error.errors()[0]
    where = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _described(point: Point) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in point.items())
