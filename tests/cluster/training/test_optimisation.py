"""The optimiser: rates, groups of parameters, and a step that is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cluster.training.optimisation import descend, learning_rate_factor, parameter_groups, set_learning_rate
from cluster.training.recipe import TrainRecipe
from lipflow.losses import NonFiniteLossError

RECIPE = TrainRecipe(steps=100, warmup_steps=10, learning_rate=1e-3, color_learning_rate_factor=7.0)


def test_learning_rate_warms_up_linearly_and_decays_to_a_twentieth():
    factors = np.array([learning_rate_factor(step, RECIPE) for step in range(RECIPE.steps + 1)])
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10)
    assert factors[10] == 1.0
    assert (np.diff(factors[10:]) < 0).all()
    # The middle of the cosine, and its end.
    np.testing.assert_allclose(factors[55], 0.05 + 0.95 / 2)
    np.testing.assert_allclose(factors[100], 0.05)


def test_learning_rate_without_warm_up_starts_full_and_never_leaves_its_range():
    recipe = TrainRecipe(steps=3, warmup_steps=0)
    assert learning_rate_factor(0, recipe) == 1.0
    assert learning_rate_factor(10_000, recipe) == pytest.approx(0.05)
    shorter_than_warm_up = TrainRecipe(steps=3, warmup_steps=50)
    assert [learning_rate_factor(step, shorter_than_warm_up) for step in range(3)] == [0.02, 0.04, 0.06]


def test_parameter_groups_hold_every_parameter_once_and_colour_is_faster():
    avatar = nn.Module()
    avatar.color = nn.Linear(2, 3)
    avatar.coloring_of_hair = nn.Linear(2, 2)
    avatar.decoder = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    rest, color = parameter_groups(avatar, RECIPE)
    assert {id(p) for p in color["params"]} == {id(p) for p in avatar.color.parameters()}
    assert sorted(id(p) for p in [*rest["params"], *color["params"]]) == sorted(id(p) for p in avatar.parameters())
    assert rest["lr"] == rest["base_lr"] == 1e-3
    assert color["lr"] == color["base_lr"] == pytest.approx(7e-3)
    optimizer = torch.optim.Adam([rest, color])
    set_learning_rate(optimizer, 4, RECIPE)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 3.5e-3])


def test_frozen_parameters_are_in_no_group():
    avatar = nn.Module()
    avatar.color, avatar.decoder, avatar.driver = nn.Linear(2, 3), nn.Linear(4, 4), nn.Linear(4, 2)
    avatar.requires_grad_(False)
    avatar.driver.requires_grad_(True)
    (group,) = parameter_groups(avatar, RECIPE)
    assert {id(p) for p in group["params"]} == {id(p) for p in avatar.driver.parameters()}


def test_a_gradient_that_is_not_finite_stops_before_the_optimiser():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.Adam([parameter], 0.1)
    parameter.square().sum().backward()
    assert descend(optimizer, 1.0, 0, ["SEG/0"]) == pytest.approx(20**0.5)
    optimizer.zero_grad()
    before = parameter.detach().clone()
    # Finite, as 0 is, and yet without a finite gradient.
    loss = (parameter * 0).sum().sqrt()
    assert loss.isfinite()
    loss.backward()
    with pytest.raises(NonFiniteLossError, match="gradient is not finite at step 7, frames SEG/1, SEG/2"):
        descend(optimizer, 1.0, 7, ["SEG/1", "SEG/2"])
    assert torch.equal(parameter, before)
    assert optimizer.state[parameter]["step"] == 1
