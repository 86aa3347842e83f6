"""The search space: what it accepts is legal everywhere, what it refuses it names."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.recipe import load_recipe
from cluster.training.recipe import TrainRecipe
from cluster.tuning.recipe import TuneRecipe
from cluster.tuning.space import FIXED, Choice, Int, Uniform, base_point, default_space, known_keys, with_values
from lipflow.config import AvatarConfig, LossConfig
from lipflow.errors import ConfigError

REAL = {"kind": "loguniform", "low": 1e-4, "high": 1e-2}


def sweep(**space) -> TuneRecipe:
    return TuneRecipe(space={key.replace("__", "."): value for key, value in space.items()})


def test_an_unknown_key_is_refused_and_the_nearest_known_one_named():
    with pytest.raises(ValidationError, match=r"unknown key 'loss.latent_wieght'; did you mean 'loss.latent_weight'"):
        sweep(loss__latent_wieght=REAL)
    with pytest.raises(ValidationError, match=r"unknown key 'loss'"):
        sweep(loss={"kind": "choice", "values": [{}, None]})


@pytest.mark.parametrize("key", sorted(FIXED))
def test_settings_on_which_trials_may_not_differ_are_refused_with_a_reason(key: str):
    full = {"render": "render.antialias", "tracking": "tracking.uri"}.get(key, key)
    with pytest.raises(ValidationError, match=f"{full} may not be searched: "):
        TuneRecipe(space={full: {"kind": "choice", "values": [1, 2]}})


def test_every_fixed_key_exists():
    groups = {key.rpartition(".")[0] for key in known_keys()} | set(known_keys())
    assert set(FIXED) <= groups


@pytest.mark.parametrize(
    ("dimension", "said"),
    [
        ({"kind": "uniform", "low": 1.0, "high": 1.0}, "low must be below high"),
        ({"kind": "loguniform", "low": 0.0, "high": 1.0}, "no logarithm"),
        ({"kind": "loguniform", "low": -1.0, "high": 1.0}, "no logarithm"),
        ({"kind": "uniform", "low": -1.0, "high": 1.0}, r"holds -1.0, which train does not take: learning_rate"),
        ({"kind": "uniform", "low": 0.0, "high": math.inf}, "finite"),
        ({"kind": "int", "low": 1, "high": 4, "step": 2}, "no number of steps"),
        ({"kind": "choice", "values": [0.1]}, "at least 2"),
        ({"kind": "choice", "values": [0.1, 0.1]}, "lists one twice"),
        ({"kind": "choice", "values": [0.1, "fast"]}, r"holds 'fast', which train does not take: learning_rate"),
        ({"kind": "normal", "low": 0, "high": 1}, "uniform"),
    ],
)
def test_a_bad_dimension_is_refused_when_the_recipe_is_built(dimension: dict, said: str):
    with pytest.raises(ValidationError, match=said):
        TuneRecipe(space={"learning_rate": dimension})


@pytest.mark.parametrize(
    ("key", "dimension"),
    [
        ("avatar.latent_size", {"kind": "uniform", "low": 16, "high": 64}),
        ("avatar.driver_hidden_size", {"kind": "int", "low": 64, "high": 128}),
    ],
)
def test_a_dimension_whose_corners_alone_are_legal_is_refused(key: str, dimension: dict):
    with pytest.raises(ValidationError, match=f"space.{key} holds .*, which train does not take"):
        TuneRecipe(space={key: dimension})


def test_values_that_are_legal_alone_and_not_together_are_refused():
    space = {
        "avatar.method": {"kind": "choice", "values": ["lipflow", "conditional"]},
        "avatar.flow_conditional": {"kind": "choice", "values": [False, True]},
    }
    with pytest.raises(ValidationError, match=r"combination .*conditional.*flow_conditional"):
        TuneRecipe(space=space)


@pytest.mark.parametrize("method", ["dam", "flow-gaussian", "conditional", "lipflow"])
def test_the_default_space_fits_every_method(method: str):
    base = TrainRecipe(avatar=AvatarConfig(method=method))
    recipe = TuneRecipe(train=base)
    assert ("avatar.flow_steps" in recipe.searched) == base.avatar.has_flow
    assert ("loss.prior_weight" in recipe.searched) == base.avatar.has_drivers


reals = st.floats(1e-6, 1e3)
dimensions = st.one_of(
    st.builds(
        lambda low, more, kind: Uniform(kind=kind, low=low, high=low + more),
        reals,
        reals,
        st.sampled_from(["uniform", "loguniform"]),
    ),
    st.builds(
        lambda low, steps, step: Int(kind="int", low=low, high=low + steps * step, step=step),
        st.integers(-50, 50),
        st.integers(1, 20),
        st.integers(1, 5),
    ),
    st.lists(
        st.one_of(st.booleans(), st.text(max_size=5), st.lists(st.sampled_from(["hmc", "frontal"]), max_size=2)),
        min_size=2,
        max_size=5,
        unique_by=repr,
    ).map(lambda values: Choice(kind="choice", values=tuple(values))),
)


@settings(deadline=None, max_examples=40)
@given(dimension=dimensions, seed=st.integers(0, 2**31))
def test_what_optuna_draws_lies_in_the_dimension_and_survives_the_round_trip(dimension, seed: int):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    code = study.ask({"x": dimension.distribution()}).params["x"]
    value = dimension.decoded(code)
    assert dimension.holds(value)
    assert dimension.coded(value) == code


@settings(deadline=None)
@given(dimension=dimensions)
def test_corners_lie_in_their_dimension(dimension):
    assert all(dimension.holds(value) for value in (*dimension.corners(), *dimension.inner()))


def test_a_trial_differs_from_the_base_in_the_searched_settings_and_the_budget_alone():
    recipe = TuneRecipe(train=TrainRecipe(avatar=AvatarConfig(latent_size=64)), workers=1)
    values = {"learning_rate": 3e-3, "loss.latent_weight": 0.02, "avatar.flow_transform": "spline"}
    base, trial, best = recipe.trial({}).model_dump(), recipe.trial(values).model_dump(), recipe.best(values)
    for key, value in values.items():
        *groups, last = key.split(".")
        group = trial
        for name in groups:
            group = group[name]
        assert group[last] == value
    changed = {key for key in base if base[key] != trial[key]}
    assert changed == {"learning_rate", "loss", "avatar"}
    assert (trial["steps"], trial["checkpoint_every_steps"], trial["register_as"], trial["workers"]) == (
        900,
        100,
        None,
        1,
    )
    assert (best.steps, best.register_as, best.workers) == (2000, "lipflow", 2)
    assert best.avatar.latent_size == 64


def test_trial_0_is_the_base_recipe():
    recipe = TuneRecipe()
    point = base_point(recipe.train, recipe.searched)
    assert recipe.trial(point) == recipe.trial({})
    assert with_values(recipe.train, point) == recipe.train


def test_all_trials_are_judged_by_the_base_recipes_loss():
    """Otherwise the trial that weighs its errors least wins."""
    recipe = TuneRecipe(
        train=TrainRecipe(loss=LossConfig(image_weight=0.05)),
        space={"loss.image_weight": {"kind": "loguniform", "low": 1e-3, "high": 1.0}},
    )
    for weight in (1e-3, 0.3):
        trial = recipe.trial({"loss.image_weight": weight})
        assert trial.loss.image_weight == weight
        assert trial.validation_loss == LossConfig(image_weight=0.05)
    own = LossConfig(geometry_weight=3.0)
    given_own = TuneRecipe(train=TrainRecipe(validation_loss=own))
    assert given_own.trial({"loss.latent_weight": 0.1}).validation_loss == own


def test_methods_with_and_without_drivers_are_judged_by_what_they_share():
    def judged(*methods: str, **base) -> tuple[str, ...] | None:
        space = {"avatar.method": {"kind": "choice", "values": list(methods)}}
        return TuneRecipe(train=TrainRecipe(**base), space=space).trial({}).validation_signals

    assert judged("lipflow", "conditional") is None
    assert judged("lipflow", "conditional", validation_signals=("hmc",)) == ("hmc",)
    assert judged("dam", "flow-gaussian", avatar=AvatarConfig(method="dam")) is None
    assert judged("lipflow", "dam") == ()
    # The base recipe is a trial too.
    assert judged("dam", "flow-gaussian") == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grace_steps": 900}, "no trial could be stopped"),
        ({"trial_steps": 3000}, "no larger budget"),
        ({"trial_steps": 40, "grace_steps": 10}, "end in warm-up"),
        ({"train_best": False, "evaluate": {}}, "no avatar to evaluate"),
        ({"trials": 1}, "trials"),
        ({"space": {}}, "no dimensions"),
        ({"train": {"add_drivers": ["hmc"], "model": "m"}}, "sweep trains new avatars"),
    ],
)
def test_settings_that_make_no_sweep_are_refused(changes: dict, said: str):
    with pytest.raises(ValidationError, match=said):
        TuneRecipe(**changes)


def test_a_space_given_in_a_recipe_replaces_the_default_one_and_set_reaches_into_it(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("space:\n  loss.latent_weight: {kind: loguniform, low: 0.001, high: 0.1}\n")
    assert list(load_recipe(TuneRecipe, str(path)).searched) == ["loss.latent_weight"]
    nested = ["space.learning_rate={kind: uniform, low: 0.001, high: 0.002}", "space.avatar.residual=null"]
    assert list(load_recipe(TuneRecipe, None, nested).searched) == ["learning_rate"]
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        load_recipe(TuneRecipe, None, ["space.learning_rat={kind: uniform, low: 0.001, high: 0.002}"])
    # Whole spaces survive being written down and read again, which is how a sweep is compared with its earlier self.
    recipe = load_recipe(TuneRecipe, str(path))
    assert TuneRecipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_the_default_space_is_of_known_keys():
    assert set(default_space(AvatarConfig())) <= set(known_keys())
