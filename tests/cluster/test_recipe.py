"""Recipes are typed, strict, and say what is wrong with them."""

import pytest
from pydantic import Field, model_validator

from cluster.recipe import dump_recipe, load_recipe
from lipflow.config import StrictConfig
from lipflow.errors import LipflowError


class Inner(StrictConfig):
    width: int = Field(8, gt=0)


class Outer(StrictConfig):
    steps: int = 10
    inner: Inner = Inner()
    names: tuple[str, ...] = ()


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 20\ninner: {width: 16}\n")
    config = load_recipe(Outer, str(recipe), ["inner.width=32", "names=[a, b]"])
    assert config == Outer(steps=20, inner=Inner(width=32), names=("a", "b"))


class Job(StrictConfig):
    inner: Outer = Outer(steps=99, inner=Inner(width=77))


def test_one_changed_key_of_a_group_leaves_the_others_as_the_job_wants_them():
    assert load_recipe(Job, None, ["inner.names=[x]"]) == Job(
        inner=Outer(steps=99, inner=Inner(width=77), names=("x",))
    )


def test_written_recipe_reads_back_equal(tmp_path):
    config = Outer(steps=3, inner=Inner(width=5), names=("x",))
    dump_recipe(config, tmp_path / "recipe.yaml")
    assert load_recipe(Outer, str(tmp_path / "recipe.yaml")) == config


class Pair(StrictConfig):
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _check(self):
        if self.low > self.high:
            raise ValueError("low is above high: lower it")
        return self


class Pairs(StrictConfig):
    first: Pair = Pair()


def test_settings_that_do_not_go_together_are_told_without_all_the_others():
    with pytest.raises(LipflowError) as alone:
        load_recipe(Pair, None, ["low=2"])
    assert str(alone.value) == "recipe the defaults: low is above high: lower it"
    with pytest.raises(LipflowError) as inside:
        load_recipe(Pairs, None, ["first.low=2"])
    assert str(inside.value) == "recipe the defaults: first: low is above high: lower it"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("stepz: 1", [], r"unknown key 'stepz'; did you mean 'steps'"),
        ("inner: {wdth: 1}", [], r"unknown key 'inner.wdth'; did you mean 'width'"),
        ("inner: {zzz: 1}", [], r"unknown key 'inner.zzz'; known keys: width"),
        ("inner: {width: -1}", [], r"inner.width: .*greater than 0.*found -1"),
        ("- 1", [], r"expected a mapping"),
        ("steps: [", [], r"not valid YAML"),
        ("", ["steps"], r"expected key=value"),
        ("", ["steps.more=1", "steps.more.x=1"], r"'more' is not a group"),
    ],
)
def test_a_bad_recipe_is_one_line_that_names_the_key(tmp_path, text, overrides, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(LipflowError, match=message) as caught:
        load_recipe(Outer, str(recipe), overrides)
    assert "\n" not in str(caught.value)
