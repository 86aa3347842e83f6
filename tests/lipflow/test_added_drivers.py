"""Drivers that are added to a trained avatar: what they learn, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from lipflow.checkpoint import load_avatar, save_avatar
from lipflow.config import FitConfig, LossConfig
from lipflow.errors import ConfigError, LipflowError
from lipflow.fitting import fit
from lipflow.losses import NonFiniteLossError, driver_loss, training_loss
from lipflow.model.extension import config_with_drivers, with_drivers
from lipflow.model.gaussian import DiagonalGaussian
from lipflow.types import DRIVING_SIGNALS, DrivingSignals

ADDED = list(itertools.product(("dam", "conditional", "lipflow"), DRIVING_SIGNALS))


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def extend(make_avatar, context):
    """``extend(method, signals, trained)``: a trained avatar (its weights moved from where they began), and the same
    with new drivers for ``signals``."""

    def build(method: str, signals, trained=(), **changes):
        avatar = make_avatar(method=method, signals=None if method == "dam" else trained, **changes)
        generator = seeded(3)
        with torch.no_grad():
            for parameter in avatar.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return avatar, with_drivers(avatar, config_with_drivers(avatar, signals), context)

    return build


@pytest.mark.parametrize(("method", "signal"), ADDED)
def test_only_the_new_driver_gets_gradients_and_all_of_it_does(extend, renderer, batch, method, signal):
    _, avatar = extend(method, (signal,))
    driver_loss(avatar, renderer, batch, LossConfig(), seeded(), (signal,)).total.backward()
    for name, parameter in avatar.named_parameters():
        if name.startswith(f"drivers.{signal}."):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("method", ["dam", "lipflow"])
def test_training_leaves_every_other_tensor_bitwise_as_it_was(extend, renderer, batch, method):
    others = () if method == "dam" else ("frontal",)
    trained, avatar = extend(method, ("hmc",), others)
    avatar.measure_driving(batch.driving, ("hmc",))
    new = {name: value.clone() for name, value in avatar.state_dict().items() if name.startswith("drivers.hmc.")}
    optimizer = torch.optim.Adam([p for p in avatar.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    generator = seeded()
    for _ in range(3):
        optimizer.zero_grad()
        driver_loss(avatar, renderer, batch, LossConfig(), generator, ("hmc",)).total.backward()
        optimizer.step()
    after = avatar.state_dict()
    assert set(after) == set(trained.state_dict()) | set(new)
    for name, value in trained.state_dict().items():
        assert torch.equal(after[name], value), name
    changed = {name for name, value in new.items() if not torch.equal(after[name], value)}
    # The measured statistics are no parameters.
    assert changed == set(new) - {"drivers.hmc.normalize.mean", "drivers.hmc.normalize.spread"}


@pytest.mark.parametrize("method", ["conditional", "lipflow"])
def test_the_terms_are_those_of_training_all_together(extend, renderer, batch, method):
    """A single driver under the same samples and dropout."""
    _, avatar = extend(method, ("keypoints",))
    config = LossConfig(reverse_weight=0.2)
    alone = driver_loss(avatar, renderer, batch, config, seeded(), ("keypoints",))
    together = training_loss(avatar, renderer, batch, config, seeded())
    assert set(together.terms) - set(alone.terms) == {"image", "geometry"}
    for name, value in alone.terms.items():
        if name in ("prior_image", "prior_geometry"):
            # Decoded alone, and not beside the posterior's samples: equal where it was measured, but another BLAS may
            # sum batches of other sizes in another order.
            torch.testing.assert_close(value, together.terms[name], rtol=1e-5, atol=0)
        else:
            assert torch.equal(value, together.terms[name]), name
    assert {name: value.item() for name, value in alone.diagnostics.items()} == {
        name: value.item() for name, value in together.diagnostics.items()
    }
    terms = alone.terms
    expected = 0.01 * terms["latent"] + terms["prior_image"] + terms["prior_geometry"] + 0.2 * terms["reverse"]
    torch.testing.assert_close(alone.total.detach(), expected)


def test_regression_error_is_in_units_of_the_posteriors_spread(extend, renderer, batch):
    _, avatar = extend("dam", ("hmc", "keypoints"), driver_dropout=0.0, log_std_scale=1.0)
    batch.driving.keypoints[0, :, 2] = 0
    loss = driver_loss(avatar, renderer, batch, LossConfig(prior_weight=0), seeded(), ("hmc", "keypoints"))
    posterior = avatar.encode(batch.vertices, batch.average_texture)
    std = posterior.log_std.exp()
    assert std.max() / std.min() > 1.2  # so that the unit matters
    errors = {
        signal: (((avatar.drivers[signal](batch.driving, None).mean - posterior.mean) / std) ** 2).mean(-1).detach()
        for signal in ("hmc", "keypoints")
    }
    torch.testing.assert_close(loss.terms["latent_hmc"], errors["hmc"].mean())
    torch.testing.assert_close(loss.terms["latent_keypoints"], errors["keypoints"][1])
    mean = (errors["hmc"].mean() + errors["keypoints"][1]) / 2
    torch.testing.assert_close(loss.terms["latent"], mean)
    torch.testing.assert_close(loss.total.detach(), 0.01 * mean)
    assert set(loss.terms) == {"latent", "latent_hmc", "latent_keypoints"}


def test_a_regressor_is_compared_where_it_answers_and_not_at_samples(extend, renderer, batch):
    _, avatar = extend("dam", ("keypoints",), driver_dropout=0.0)
    terms = driver_loss(avatar, renderer, batch, LossConfig(), seeded(), ("keypoints",)).terms
    answer = avatar.regress("keypoints", batch.driving)
    geometry = ((avatar.decode_vertices(answer) - batch.vertices) / 5.0).square().mean().detach()
    torch.testing.assert_close(terms["prior_geometry"], geometry)


def test_switches_leave_terms_out(extend, renderer, batch):
    _, avatar = extend("lipflow", ("keypoints",))

    def terms(**weights) -> set[str]:
        return set(driver_loss(avatar, renderer, batch, LossConfig(**weights), seeded(), ("keypoints",)).terms)

    latent = {"latent", "latent_keypoints"}
    assert terms() == latent | {"prior_image", "prior_geometry"}
    assert terms(prior_weight=0) == latent
    assert terms(prior_weight=0, reverse_weight=1) == latent | {"reverse"}


def test_a_regressor_starts_at_its_answer_under_the_gaussian_prior(extend, renderer, batch):
    _, avatar = extend("dam", ("hmc", "keypoints"))
    driving = batch.driving
    answers = {signal: avatar.drivers[signal](driving, None).mean for signal in avatar.signals}
    assert torch.equal(avatar.start_from(("hmc",), driving), answers["hmc"])
    both = avatar.start_from(("hmc", "keypoints"), driving)
    torch.testing.assert_close(both, (answers["hmc"] + answers["keypoints"]) / 2)
    prior = avatar.fused_prior(("hmc", "keypoints"), driving)
    assert not prior.mean.any()
    assert not prior.log_std.any()

    nothing = fit(avatar, renderer, driving, "keypoints", FitConfig(iterations=0))
    assert torch.equal(nothing.z, answers["keypoints"])
    fitted = fit(avatar, renderer, driving, "keypoints", FitConfig(iterations=2, prior_weight=0.5))
    assert torch.equal(fitted.start, answers["keypoints"])
    gaussian = DiagonalGaussian.standard(fitted.z).log_prob(fitted.start)
    torch.testing.assert_close(fitted.trace[0] - fitted.observed_trace[0], -0.5 / 6 * gaussian)


def test_a_regressor_says_nothing_of_frames_that_show_nothing(extend, batch):
    _, avatar = extend("dam", ("hmc", "keypoints"))
    with torch.no_grad():
        # So that a driver has something to say of nothing, too.
        for driver in avatar.drivers.values():
            driver.head.out.bias.fill_(0.3)
    batch.driving.keypoints[0, :, 2] = 0
    assert not avatar.start_from(("keypoints",), batch.driving)[0].any()
    both = avatar.start_from(("hmc", "keypoints"), batch.driving)
    torch.testing.assert_close(both[0], avatar.regress("hmc", batch.driving)[0])
    batch.driving.hmc_present[0] = False
    assert not avatar.start_from(("hmc", "keypoints"), batch.driving)[0].any()


def test_several_signals_do_not_make_the_gaussian_prior_of_a_dam_narrower(make_avatar, batch):
    prior = make_avatar(method="dam").fused_prior(DRIVING_SIGNALS, batch.driving)
    assert not prior.mean.any()
    assert not prior.log_std.any()


def test_a_regressor_learns_the_latents_of_its_frames(extend, renderer, batch_of):
    """The squared error of 8 frames falls from 20.2 to 0.016 in 150 steps."""
    batch = batch_of(frames=8, views=1)
    _, avatar = extend("dam", ("keypoints",), driver_dropout=0.0, log_std_scale=1.0, driver_hidden_size=32)
    optimizer = torch.optim.Adam(avatar.drivers["keypoints"].parameters(), 1e-2)
    history = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = driver_loss(avatar, renderer, batch, LossConfig(prior_weight=0), seeded(), ("keypoints",))
        loss.total.backward()
        optimizer.step()
        history.append(loss.terms["latent"].item())
    assert history[-1] < history[0] / 100


def test_drivers_added_one_after_another_do_not_touch_each_other(extend, context, batch, tmp_path):
    _, first = extend("dam", ("keypoints",))
    save_avatar(first, tmp_path / "first")
    loaded = load_avatar(tmp_path / "first")
    assert loaded.config.method == "dam-regressor"
    second = with_drivers(loaded, config_with_drivers(loaded, ("hmc",)), context)
    assert second.signals == ("keypoints", "hmc")
    before = first.state_dict()
    assert all(torch.equal(second.state_dict()[name], value) for name, value in before.items())
    second.measure_driving(batch.driving, ("hmc",))
    assert torch.equal(*(avatar.start_from(("keypoints",), batch.driving) for avatar in (first, second)))


def test_statistics_are_measured_for_the_new_drivers_alone(extend, batch):
    _, avatar = extend("lipflow", ("frontal",), ("hmc",))
    before = {signal: avatar.drivers[signal].normalize.mean.clone() for signal in ("hmc", "frontal")}
    avatar.measure_driving(batch.driving, ("frontal",))
    assert torch.equal(avatar.drivers["hmc"].normalize.mean, before["hmc"])
    assert not torch.equal(avatar.drivers["frontal"].normalize.mean, before["frontal"])


def test_the_first_drivers_sizes_can_be_chosen_and_later_ones_follow(extend, make_avatar, context):
    dam = make_avatar(method="dam")
    config = config_with_drivers(dam, ("keypoints",), {"driver_hidden_size": 20})
    avatar = with_drivers(dam, config, context)
    assert avatar.drivers["keypoints"].landmarks.fc.weight.shape[0] == 20
    with pytest.raises(ConfigError, match=r"driver_hidden_size is that of the trained avatar.*leave it out"):
        config_with_drivers(avatar, ("hmc",), {"driver_hidden_size": 10})
    with pytest.raises(ConfigError, match=r"avatar\.latent_size is that of the trained avatar"):
        config_with_drivers(dam, ("hmc",), {"latent_size": 10})
    with pytest.raises(ConfigError, match="has a driver of keypoints already"):
        config_with_drivers(avatar, ("keypoints",))
    with pytest.raises(ConfigError, match="power of two"):
        config_with_drivers(dam, ("hmc",), {"driver_image_size": 20})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"camera_ids": ("cam-b", "cam-c", "cam-d")}, "other cameras"),
        ({"train_camera_ids": ("cam-a", "cam-b")}, r"training cameras \(\['cam-a'\]\)"),
        ({"frontal_camera_id": "cam-c"}, "shows keypoints by other cameras or landmarks"),
        ({"keypoint_names": ("nose",)}, "shows keypoints by other cameras or landmarks"),
        ({"headset_cameras": ()}, r"signals lists \['hmc'\]"),
    ],
)
def test_another_capture_is_refused(make_avatar, context, changes, message):
    avatar = make_avatar(signals=("keypoints",))
    other = dataclasses.replace(context, **changes)
    with pytest.raises(ConfigError, match=message):
        with_drivers(avatar, config_with_drivers(avatar, ("hmc",)), other)


def test_another_mesh_or_texture_is_refused(make_avatar, context):
    avatar = make_avatar(method="dam")
    config = config_with_drivers(avatar, ("hmc",))
    topology = dataclasses.replace(context.topology, faces=context.topology.faces[:, ::-1])
    with pytest.raises(ConfigError, match=r"81 vertices.*or other faces"):
        with_drivers(avatar, config, dataclasses.replace(context, topology=topology))
    statistics = dataclasses.replace(context.normalization, texture_mean=torch.zeros(3, 64, 64).numpy())
    with pytest.raises(ConfigError, match="shard it at 32"):
        with_drivers(avatar, config, dataclasses.replace(context, normalization=statistics))


def test_headset_cameras_that_came_later_are_the_shard_sets(make_avatar, context):
    bare = dataclasses.replace(context, headset_cameras=())
    avatar = make_avatar(method="dam")
    avatar.context = bare
    extended = with_drivers(avatar, config_with_drivers(avatar, ("hmc",)), context)
    assert extended.context.headset_cameras == context.headset_cameras
    assert extended.context.normalization is bare.normalization


def test_losses_that_cannot_be_are_refused(extend, renderer, batch):
    _, avatar = extend("lipflow", ("keypoints",))
    bare = dataclasses.replace(batch, driving=DrivingSignals())
    with pytest.raises(LipflowError, match=r"none of the signals \['keypoints'\]: add them to loader\.signals"):
        driver_loss(avatar, renderer, bare, LossConfig(), seeded(), ("keypoints",))
    batch.vertices[1, 0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="frames SEG/000001"):
        driver_loss(avatar, renderer, batch, LossConfig(), seeded(), ("keypoints",))
