"""Settings of a training that do not go together."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cluster.training.recipe import TrainRecipe


def test_a_gpu_renderer_without_a_gpu_is_refused():
    with pytest.raises(ValidationError, match=r"set use_gpu=true, or render\.backend=auto"):
        TrainRecipe(render={"backend": "cuda"})
    assert TrainRecipe(render={"backend": "cuda"}, use_gpu=True).render.filter == "bilinear"


def test_methods_without_drivers_refuse_the_terms_that_need_one():
    for method in ("dam", "flow-gaussian"):
        TrainRecipe(avatar={"method": method})
        with pytest.raises(ValidationError, match=rf"avatar\.method is {method}.*loss\.reverse_weight"):
            TrainRecipe(avatar={"method": method}, loss={"reverse_weight": 0.1})
        with pytest.raises(ValidationError, match=rf"avatar\.method is {method}.*loss\.no_signal_weight"):
            TrainRecipe(avatar={"method": method}, loss={"no_signal_weight": 0.1})
    for method in ("conditional", "lipflow"):
        assert TrainRecipe(avatar={"method": method}, loss={"no_signal_weight": 0.1})
    with pytest.raises(ValidationError, match=r"loss\.latent_estimate"):
        TrainRecipe(avatar={"method": "dam"}, loss={"latent_estimate": "likelihood"})
    assert TrainRecipe(avatar={"method": "flow-gaussian"}, loss={"latent_estimate": "likelihood"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_drivers": ["hmc"]}, "give both"),
        ({"model": "models:/lipflow@champion"}, "give both"),
        ({"add_drivers": ["hmc", "hmc"], "model": "m"}, "names a signal twice"),
        ({"add_drivers": ["voice"], "model": "m"}, "add_drivers.0"),
        ({"add_drivers": ["hmc"], "model": "m", "loader": {"signals": ["keypoints"]}}, r"loader\.signals lacks hmc"),
        ({"add_drivers": ["hmc"], "model": "m", "loss": {"latent_weight": 0, "prior_weight": 0}}, "has no term"),
        ({"add_drivers": ["hmc"], "model": "m", "loss": {"no_signal_weight": 1}}, "the drivers alone are trained"),
        ({"workers": 3, "micro_batches": 2}, "some would have nothing to do"),
        ({"workers": 2, "min_workers": 3}, "lower min_workers"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"avatar": {"method": "dam-regressor"}}, "train one with avatar.method=dam, then give it drivers"),
        ({"avatar": {"method": "dam"}, "loss": {"reverse_weight": 1}}, "avatar.method is dam, whose prior"),
        (
            {
                "avatar": {"method": "dam-regressor"},
                "add_drivers": ["hmc"],
                "model": "m",
                "loss": {"reverse_weight": 1},
            },
            "avatar.method is dam-regressor, whose prior",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_the_remedy(changes, message):
    with pytest.raises(ValidationError, match=message):
        TrainRecipe.model_validate(changes)


def test_a_step_has_as_many_micro_batches_as_workers_unless_it_is_said():
    assert TrainRecipe(workers=3).pieces == 3
    assert TrainRecipe(workers=3, micro_batches=8).pieces == 8
