"""The parts of the training loop that are pure functions: rates, seeds, parameter groups, the order of batches."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from ray.train import Checkpoint
from torch import nn

from cluster.train import ray_storage
from cluster.training.loop import (
    TrainRecipe,
    batches_from,
    checkpoint_folder,
    descend,
    learning_rate_factor,
    parameter_groups,
    seed_of,
)
from lipflow.losses import NonFiniteLossError
from pipeline import storage

RECIPE = TrainRecipe(steps=100, warmup_steps=10, learning_rate=1e-3, color_learning_rate_factor=7.0)


class FakeLoader:
    """Batches named by (epoch, number), five an epoch."""

    batches_per_epoch = 5

    def epoch(self, epoch: int, start_batch: int = 0):
        return iter([(epoch, number) for number in range(start_batch, self.batches_per_epoch)])


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


def test_seeds_depend_on_every_part_and_on_their_order_and_fit_torch():
    seeds = {seed_of(seed, step, rank) for seed in range(4) for step in range(50) for rank in range(4)}
    assert len(seeds) == 4 * 50 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3) != seed_of(3, 2, 1)
    torch.Generator().manual_seed(max(seeds))


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
    assert descend(parameter.square().sum(), optimizer, 1.0, 0, ["SEG/0"]) == pytest.approx(20**0.5)
    before = parameter.detach().clone()
    # Finite, as 0 is, and yet without a finite gradient.
    loss = (parameter * 0).sum().sqrt()
    assert loss.isfinite()
    with pytest.raises(NonFiniteLossError, match="gradient is not finite at step 7, frames SEG/1, SEG/2"):
        descend(loss, optimizer, 1.0, 7, ["SEG/1", "SEG/2"])
    assert torch.equal(parameter, before)
    assert optimizer.state[parameter]["step"] == 1


@pytest.mark.parametrize("step", [0, 1, 4, 5, 12])
def test_batches_from_a_step_are_those_that_come_after_skipping_it(step: int):
    everything = list(islice(batches_from(FakeLoader(), 0), 20))
    assert everything[:7] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1)]
    assert list(islice(batches_from(FakeLoader(), step), 20 - step)) == everything[step:]


def test_an_epoch_is_read_only_when_its_turn_comes():
    opened = []
    loader = SimpleNamespace(batches_per_epoch=2, epoch=lambda epoch, start_batch: opened.append(epoch) or iter("ab"))
    batches = batches_from(loader, 0)
    assert [next(batches), next(batches), opened] == ["a", "b", [0]]
    assert [next(batches), opened] == ["a", [0, 1]]


def test_fetched_checkpoints_have_a_folder_of_their_own(s3_server, tmp_path):
    """Two readers on one node, the first of which ends while the second goes on: they share nothing."""
    (tmp_path / "avatar").mkdir()
    (tmp_path / "avatar" / "weights").write_bytes(b"weights")
    storage.upload_dir(tmp_path, s3_server.uri("checkpoint"))
    filesystem, path = ray_storage(s3_server.uri("checkpoint"))
    remote = Checkpoint(path, filesystem)
    with checkpoint_folder(remote) as outer:
        with checkpoint_folder(remote) as inner:
            assert inner != outer
        assert not inner.exists()
        assert (outer / "avatar" / "weights").read_bytes() == b"weights"
    assert not outer.exists()
    with checkpoint_folder(Checkpoint.from_directory(tmp_path)) as folder:
        assert folder == tmp_path


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
