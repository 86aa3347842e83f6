"""Limits on what drivers and fits may see: a few headset views, a few landmarks."""

import dataclasses

import pytest
import torch

from lipflow.checkpoint import load_avatar, save_avatar
from lipflow.config import AvatarConfig, FitConfig, LossConfig
from lipflow.errors import ConfigError
from lipflow.fitting import fit
from lipflow.losses import training_loss
from lipflow.model.avatar import Avatar
from lipflow.types import map_tensors
from tests.lipflow.driving_scenes import copied, refilled, same

LIMITS = {"hmc": {"headset_views": ("right-mouth",)}, "keypoints": {"keypoints": ("chin", "right")}}
"""Views 1 of 2, and landmarks 1 and 3 of 4; part 0 is hidden."""


@pytest.mark.parametrize("signal", ["hmc", "keypoints"])
@pytest.mark.parametrize("method", ["dam", "conditional", "lipflow"])
def test_neither_driver_nor_fit_sees_what_the_config_hides(make_avatar, renderer, batch, method, signal):
    """Bit for bit; the same without a limit differs."""
    limited, free = make_avatar(method=method, **LIMITS[signal]), make_avatar(method=method)
    seen = batch.driving
    other = refilled(refilled(seen, signal, 0, 0), signal, 1, 0)
    config = FitConfig(iterations=2)
    for avatar, equal in ((limited, True), (free, False)):
        first, second = (fit(avatar, renderer, it, signal, config) for it in (seen, other))
        assert torch.equal(first.z, second.z) is equal
        assert torch.equal(first.observed_trace, second.observed_trace) is equal
        if method != "dam":
            assert same(*(avatar.fused_prior([signal], it) for it in (seen, other))) is equal
            assert torch.equal(*(avatar.start_from([signal], it) for it in (seen, other))) is equal


def test_statistics_of_driving_images_leave_out_hidden_views(make_avatar, batch):
    avatar, free = make_avatar(**LIMITS["hmc"]), make_avatar()
    spreads = []
    darkened = copied(batch.driving)
    darkened.hmc_images[0, 0] = 0
    for driving in (batch.driving, darkened):
        for it in (avatar, free):
            it.measure_driving(driving)
            spreads.append(it.drivers["hmc"].normalize.spread.item())
    assert spreads[0] == spreads[2]
    assert spreads[1] != spreads[3]


def test_a_limit_marks_as_absent_changes_nothing_else_and_nothing_twice(make_avatar, batch):
    avatar, seen = make_avatar(**LIMITS["hmc"], **LIMITS["keypoints"]), copied(batch.driving)
    visible = avatar.visible(batch.driving)
    assert visible.hmc_present.tolist() == [[False, True]] * 2
    assert (visible.keypoints[..., 2] > 0).tolist() == [[False, True, False, True]] * 2
    assert torch.equal(visible.keypoints[..., :2], seen.keypoints[..., :2])
    assert visible.hmc_images is batch.driving.hmc_images
    assert torch.equal(batch.driving.hmc_present, seen.hmc_present)
    assert torch.equal(batch.driving.keypoints, seen.keypoints)
    again = avatar.visible(visible)
    assert torch.equal(again.hmc_present, visible.hmc_present)
    assert torch.equal(again.keypoints, visible.keypoints)
    assert make_avatar().visible(batch.driving) is batch.driving


def test_frames_that_show_only_what_is_hidden_are_frames_without_the_signal(make_avatar, renderer, batch, generator):
    avatar, driving = make_avatar(signals=("hmc", "keypoints"), **LIMITS["hmc"], **LIMITS["keypoints"]), batch.driving
    driving.hmc_present[0, 1] = False
    driving.keypoints[0, [1, 3], 2] = 0
    for signal in ("hmc", "keypoints"):
        prior = avatar.prior(signal, driving)
        assert not prior.mean[0].any()
        assert avatar.presence(signal, driving).tolist() == [False, True]
    assert not avatar.fused_prior(("hmc", "keypoints"), driving).mean[0].any()
    terms = training_loss(avatar, renderer, batch, LossConfig(), generator).terms
    alone = map_tensors(batch, lambda tensor: tensor[1:])
    assert terms["latent_hmc"].isfinite()
    assert alone.driving.hmc_present.all(1).tolist() == [True]


def test_limits_that_do_not_fit_are_refused_with_what_the_capture_offers(make_avatar, context):
    with pytest.raises(ConfigError, match=r"headset_views lists eyes, which .*: choose from left-mouth, right-mouth"):
        make_avatar(headset_views=("eyes", "left-mouth"))
    with pytest.raises(ConfigError, match=r"keypoints lists ear, .*: choose from nose, chin, left, right"):
        make_avatar(method="dam", keypoints=("ear",))
    bare = dataclasses.replace(context, headset_cameras=())
    with pytest.raises(ConfigError, match=r"headset_views lists left-mouth, .* it offers none, leave it out"):
        Avatar(make_avatar(headset_views=("left-mouth",)).config, bare)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"headset_views": ()}, "at least 1 item"),
        ({"keypoints": ("chin", "chin")}, "keypoints lists a name twice"),
        ({"signals": ("hmc", "hmc")}, "signals lists a name twice"),
        ({"signals": ("hmc",), "keypoints": ("chin",)}, "keypoints limits keypoints, which signals leaves out"),
        ({"signals": ("hcm",)}, "no driving signal 'hcm': choose from hmc, frontal, keypoints"),
    ],
)
def test_bad_driver_configs_are_refused_when_built(changes, message):
    with pytest.raises(ValueError, match=message):
        AvatarConfig(**changes)


def test_an_eyes_only_avatar_survives_its_checkpoint(make_avatar, batch, tmp_path):
    avatar = make_avatar(**LIMITS["hmc"])
    save_avatar(avatar, tmp_path / "avatar")
    loaded = load_avatar(tmp_path / "avatar")
    assert loaded.config.headset_views == ("right-mouth",)
    assert same(avatar.prior("hmc", batch.driving), loaded.prior("hmc", batch.driving))
