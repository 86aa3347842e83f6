"""The settings of a sweep."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.evaluate import EvaluateRecipe
from cluster.training.recipe import TrainRecipe
from cluster.tuning.space import (
    Point,
    SearchDimension,
    Space,
    check_space,
    default_space,
    with_values,
)
from lipflow.config import StrictConfig

_WITHOUT_DRIVERS = ("dam", "flow-gaussian")


class TuneRecipe(StrictConfig):
    """All settings of a sweep.

    **What trials are compared by.** The validation loss is a weighted sum of reconstruction errors, averaged over the
    encoder's reconstruction and the drivers' answers. Where ``loss`` weights are searched, each trial's own weights
    would be its own yardstick, and the trial that weighs its errors least would win. So all trials are judged by one:
    ``train.validation_loss``, or else the base recipe's ``train.loss``, whatever weights they are trained with. And
    where ``avatar.method`` is searched over methods with and without drivers, they are judged by what they have in
    common, the encoder's reconstruction (``train.validation_signals`` is then empty).

    Attributes:
        train: the base recipe. Trial 0 trains it as it is; all others differ from it in the searched settings alone.
            ``train.steps`` is the budget of the best trial's final training, ``train.tracking`` keeps all runs.
        space: dotted key of ``train`` -> dimension; None: loss weights, sizes, learning rate and
            variant switches, as far as they matter to the base recipe's method.
        trials: how many, with trial 0.
        trial_steps: optimiser steps of a trial that is not stopped; warm-up and decay of its learning rate are those
            of a training of this length.
        grace_steps: no trial is stopped before; trials report their validation loss every so many steps.
        reduction_factor: of ASHA: after ``grace_steps * reduction_factor ** k`` steps a trial goes on if it is among
            the best ``1 / reduction_factor`` of those that got as far before it.
        metric: what is minimised.
        max_concurrent_trials: None: as many as the cluster's CPUs and GPUs take.
        workers: of a trial; None: ``train.workers``. Fewer see a smaller batch in each step than the final training.
        seed: of the search; each trial's proposal is a function of it, the trial's number and the results so far.
        train_best: train the best trial's recipe for ``train.steps`` at the end.
        evaluate: how the best avatar is evaluated; None: it is not. Its ``tracking`` is that of ``train``.
    """

    train: TrainRecipe = TrainRecipe()
    space: dict[str, SearchDimension] | None = None
    trials: int = Field(32, ge=2)
    trial_steps: int = Field(900, ge=2)
    grace_steps: int = Field(100, ge=1)
    reduction_factor: int = Field(3, ge=2)
    metric: Literal["val_loss"] = "val_loss"
    max_concurrent_trials: int | None = Field(None, ge=1)
    workers: int | None = Field(None, gt=0)
    seed: int = Field(0, ge=0)
    train_best: bool = True
    evaluate: EvaluateRecipe | None = None

    @field_validator("space", mode="before")
    @classmethod
    def _flattened(cls, space: Any) -> Any:
        """Groups may be nested, as in ``--set space.loss.latent_weight.high=0.1``; null takes a dimension out."""
        return _flat(space) if isinstance(space, dict) else space

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train.add_drivers:
            raise ValueError(
                f"train.add_drivers is {list(self.train.add_drivers)}: a sweep trains new avatars; leave it out"
            )
        if self.grace_steps >= self.trial_steps:
            raise ValueError(
                f"grace_steps is {self.grace_steps} and trial_steps {self.trial_steps}: no trial could be stopped "
                "early; lower grace_steps"
            )
        if self.trial_steps > self.train.steps:
            raise ValueError(
                f"trial_steps is {self.trial_steps} and train.steps {self.train.steps}: a trial has no larger budget "
                "than the final training; lower trial_steps"
            )
        if self.train.warmup_steps >= self.trial_steps:
            raise ValueError(
                f"train.warmup_steps is {self.train.warmup_steps} and trial_steps {self.trial_steps}: trials would "
                "end in warm-up; lower train.warmup_steps"
            )
        if self.evaluate is not None and not self.train_best:
            raise ValueError("evaluate is given and train_best is false: there is no avatar to evaluate; leave it out")
        check_space(self.judged_base, self.searched)
        return self

    @property
    def searched(self) -> Space:
        """The space: the given one, or the default."""
        return default_space(self.train.avatar) if self.space is None else self.space

    @property
    def judged_base(self) -> TrainRecipe:
        """The base recipe with the yardstick of all trials written down in it."""
        loss = self.train.validation_loss or self.train.loss
        methods: set[Any] = {self.train.avatar.method}
        if "avatar.method" in self.searched:
            methods |= set(self.searched["avatar.method"].corners())
        mixed = len({method in _WITHOUT_DRIVERS for method in methods}) == 2
        signals = () if mixed else self.train.validation_signals
        return self.train.model_copy(update={"validation_loss": loss, "validation_signals": signals})

    def trial(self, values: Point) -> TrainRecipe:
        """The training of a trial.

        Args:
            values: its searched settings; empty for trial 0.
        """
        return with_values(self.judged_base, values).model_copy(
            update={
                "steps": self.trial_steps,
                "checkpoint_every_steps": self.grace_steps,
                "workers": self.workers or self.train.workers,
                "register_as": None,
            }
        )

    def best(self, values: Point) -> TrainRecipe:
        """The final training of a trial's recipe: on the base recipe's budget."""
        return with_values(self.judged_base, values)


def _flat(space: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in space.items():
        if isinstance(value, dict) and not isinstance(value.get("kind"), str):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
