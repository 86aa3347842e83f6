"""The driving encoders: what is absent has no influence, what is there has; limits, dropout, fusion, own signals."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lipflow.checkpoint import load_avatar, save_avatar
from lipflow.config import AvatarConfig, FitConfig, LossConfig
from lipflow.errors import ConfigError, LipflowError
from lipflow.fitting import fit
from lipflow.losses import training_loss
from lipflow.model import drivers
from lipflow.model.avatar import Avatar
from lipflow.model.drivers import signal as register_module
from lipflow.model.drivers.hiding import hide_at_random
from lipflow.model.drivers.masked_set import MaskedSetEncoder
from lipflow.model.gaussian import DiagonalGaussian, product_of_gaussians
from lipflow.types import DrivingSignals, map_tensors

SIGNALS = ("hmc", "frontal", "keypoints")


def same(first, second) -> bool:
    return torch.equal(first.mean, second.mean) and torch.equal(first.log_std, second.log_std)


def copied(driving: DrivingSignals) -> DrivingSignals:
    return map_tensors(driving, torch.Tensor.clone)


def without(driving: DrivingSignals, signal: str, frame: int, part: int) -> DrivingSignals:
    """One view or landmark, or the only image, marked absent."""
    driving = copied(driving)
    if signal == "hmc":
        driving.hmc_present[frame, part] = False
    elif signal == "frontal":
        driving.frontal_present[frame] = False
    else:
        driving.keypoints[frame, part, 2] = 0
    return driving


def refilled(driving: DrivingSignals, signal: str, frame: int, part: int) -> DrivingSignals:
    """Something else in the same place; for landmarks not even a number."""
    driving = copied(driving)
    if signal == "hmc":
        driving.hmc_images[frame, part] = 255 - driving.hmc_images[frame, part]
    elif signal == "frontal":
        driving.frontal_images[frame] = 255 - driving.frontal_images[frame]
    else:
        driving.keypoints[frame, part, :2] = torch.nan if driving.keypoints[frame, part, 2] == 0 else 30.0
    return driving


def gradients(avatar: Avatar, signal: str, driving: DrivingSignals) -> dict[str, torch.Tensor]:
    """Of a sum over the prior's numbers, by the driver's parameters."""
    avatar.zero_grad()
    prior = avatar.prior(signal, driving, torch.Generator().manual_seed(1))
    (prior.mean.square().sum() + (prior.log_std - 0.3).square().sum()).backward()
    return {name: p.grad.clone() for name, p in avatar.drivers[signal].named_parameters()}


@pytest.mark.parametrize("signal", SIGNALS)
def test_an_absent_part_has_no_influence_at_all_and_a_present_one_has(make_avatar, batch, signal):
    """Bit for bit, on the prior and on every gradient."""
    avatar = make_avatar(driver_subset_dropout=0.5)
    seen, absent = batch.driving, without(batch.driving, signal, 0, 1)
    assert same(avatar.prior(signal, absent), avatar.prior(signal, refilled(absent, signal, 0, 1)))
    before, after = (gradients(avatar, signal, it) for it in (absent, refilled(absent, signal, 0, 1)))
    assert all(torch.equal(before[name], after[name]) and before[name].isfinite().all() for name in before)
    assert not same(avatar.prior(signal, seen), avatar.prior(signal, refilled(seen, signal, 0, 1)))


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_frame_without_the_signal_has_the_standard_prior(make_avatar, batch, signal):
    driving = batch.driving
    driving.hmc_present[0] = False
    driving.frontal_present[0] = False
    driving.keypoints[0, :, 2] = 0
    avatar = make_avatar()
    prior = avatar.prior(signal, driving)
    assert not prior.mean[0].any()
    assert not prior.log_std[0].any()
    assert prior.mean[1].any()
    assert all(gradient.isfinite().all() for gradient in gradients(avatar, signal, driving).values())


@pytest.mark.parametrize("signal", SIGNALS)
def test_every_parameter_of_a_driver_gets_a_gradient_with_parts_missing(make_avatar, batch, signal):
    avatar = make_avatar(driver_subset_dropout=0.5)
    for name, gradient in gradients(avatar, signal, without(batch.driving, signal, 0, 1)).items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


def headset_of(context, count: int):
    names = [f"headset-{index}" for index in range(count)]
    camera = context.headset_cameras[0]
    return dataclasses.replace(
        context, headset_cameras=tuple(dataclasses.replace(camera, camera_id=name) for name in names)
    )


def headset_driving(count: int, frames: int = 3) -> DrivingSignals:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 255, (frames, count, 1, 24, 32), generator=generator, dtype=torch.uint8)
    return DrivingSignals(hmc_images=images, hmc_present=torch.ones(frames, count, dtype=torch.bool))


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_a_headset_has_any_number_of_cameras_and_one_tower(context, make_avatar, count):
    avatar = Avatar(make_avatar(signals=("hmc",)).config, headset_of(context, count))
    driving = headset_driving(count)
    for hidden in range(count):
        driving.hmc_present[0, hidden] = False
        prior = avatar.prior("hmc", driving)
        assert prior.mean.isfinite().all()
        assert prior.mean[1:].any()
    towers = {p.shape for name, p in avatar.drivers["hmc"].named_parameters() if name.startswith("tower")}
    assert towers == {p.shape for n, p in make_avatar().drivers["hmc"].named_parameters() if n.startswith("tower")}


def test_a_headset_with_another_number_of_cameras_is_refused(make_avatar):
    with pytest.raises(LipflowError, match="views of 3 cameras, but this avatar's headset has 2"):
        make_avatar().prior("hmc", headset_driving(3))


def test_headset_cameras_are_told_apart_by_identity_and_not_by_place(context, make_avatar):
    """Cameras in another order, all that is theirs with them, give the same; images swapped between cameras do not."""
    avatar = Avatar(make_avatar(signals=("hmc",)).config, headset_of(context, 4))
    driver, driving, order = avatar.drivers["hmc"], headset_driving(4), [2, 0, 3, 1]
    driving.hmc_present[0, 1] = False
    avatar.measure_driving(driving)
    prior = avatar.prior("hmc", driving)
    moved = map_tensors(driving, lambda tensor: tensor[:, order])
    assert (avatar.prior("hmc", moved).mean - prior.mean).abs().max() > 0.02  # measured at least 0.13
    with torch.no_grad():
        for tensor in (driver.camera_embedding, driver.normalize.mean):
            tensor.copy_(tensor[order].clone())
        readout = driver.views.fc.weight.unflatten(1, (4, -1))
        readout.copy_(readout[:, order].clone())
    # Sums over the views in another order; measured worst case 9e-8 over ten seeds.
    torch.testing.assert_close(avatar.prior("hmc", moved).mean, prior.mean, atol=1e-5, rtol=0)


def test_seen_parts_do_not_attend_to_missing_ones(generator):
    """Of the N tokens that are read out, only the missing part's own changes with it; the seen ones change all."""
    torch.manual_seed(0)
    encoder, token = MaskedSetEncoder(4, 8, 5), torch.randn(2, 4, 8, generator=generator)
    seen = torch.tensor([[True, True, False, True], [False, True, True, True]])
    read = []
    encoder.fc.register_forward_hook(lambda _, inputs, output: read.append(inputs[0].unflatten(1, (4, 8))))
    encoder(token, seen)
    for part in (2, 1):
        other = token.clone()
        other[0, part, 0] += 1  # not all of it alike: the norm takes a common shift out
        encoder(other, seen)
    alone, both = ((changed != read[0]).any(-1).tolist() for changed in read[1:])
    assert alone == [[False, False, True, False], [False] * 4]
    assert both == [[True] * 4, [False] * 4]


def test_keypoint_prior_does_not_depend_on_image_resolution(make_avatar, batch):
    avatar, driving = make_avatar(), batch.driving
    scale = torch.tensor([2.0, 2.0, 1.0])
    cameras = dataclasses.replace(
        driving.frontal_cameras, intrinsics=torch.diag(scale) @ driving.frontal_cameras.intrinsics
    )
    doubled = dataclasses.replace(driving, keypoints=driving.keypoints * scale, frontal_cameras=cameras)
    first, second = avatar.prior("keypoints", driving), avatar.prior("keypoints", doubled)
    torch.testing.assert_close(first.mean, second.mean, atol=1e-4, rtol=1e-4)


def test_a_missing_landmark_is_no_landmark_at_its_mean_place(make_avatar, batch):
    """What a zero in place of a missing landmark would say."""
    avatar, driving = make_avatar(), batch.driving
    mean = avatar.drivers["keypoints"].mean_landmarks
    driving.keypoints[..., :2] = drivers.keypoints.project_through_lens(mean, driving.frontal_cameras)[0]
    missing = avatar.prior("keypoints", without(driving, "keypoints", 0, 1))
    assert (missing.mean[0] - avatar.prior("keypoints", driving).mean[0]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{"driver_dropout": 0.5}, {"driver_dropout": 0.0, "driver_subset_dropout": 1.0}])
@pytest.mark.parametrize("signal", ["hmc", "keypoints"])
def test_input_dropout_is_a_function_of_the_generator(make_avatar, batch, signal, changes):
    avatar, driving = make_avatar(**changes), batch.driving
    full = avatar.prior(signal, driving)
    dropped = avatar.prior(signal, driving, torch.Generator().manual_seed(0))
    assert not same(full, dropped)
    torch.manual_seed(3)
    assert same(dropped, avatar.prior(signal, driving, torch.Generator().manual_seed(0)))
    assert same(full, avatar.prior(signal, driving))
    assert dropped.mean.any(-1).all()


def hiding(parts: int, ranks: torch.Tensor | None = None, **dropout) -> torch.Tensor:
    """What is kept of 20,000 frames; the last 100 show their first part alone."""
    present = torch.ones(20_000, parts, dtype=torch.bool)
    present[-100:, 1:] = False
    config = AvatarConfig(**({"driver_dropout": 0.0, "driver_subset_dropout": 0.0} | dropout))
    kept = hide_at_random(present, config, torch.Generator().manual_seed(0), ranks)
    assert not (kept & ~present).any()
    assert kept.any(-1).all()
    assert kept[-100:, 0].all()
    return kept[:-100]


def test_parts_are_hidden_alone_with_the_set_probability():
    """Rates of 19,900 draws: 4 standard deviations are 0.013."""
    kept = hiding(6, driver_dropout=0.3).float()
    torch.testing.assert_close(kept.mean(0), torch.full((6,), 0.7), atol=0.013, rtol=0)


def test_a_frame_keeps_every_subset_of_its_views():
    kept = hiding(4, driver_subset_dropout=0.6)
    sizes = torch.bincount(kept.sum(1), minlength=5) / len(kept)
    torch.testing.assert_close(sizes, torch.tensor([0, 0.2, 0.2, 0.2, 0.4]), atol=0.013, rtol=0)
    assert len(kept.unique(dim=0)) == 2**4 - 1


def test_a_frame_keeps_one_patch_of_its_landmarks():
    """On a line: n neighbours in a row, never two islands."""
    place = torch.arange(7.0)[:, None]
    ranks = torch.cdist(place, place).argsort(dim=-1, stable=True).argsort(-1)
    kept = hiding(7, ranks, driver_subset_dropout=1.0)
    assert set(kept.sum(1).tolist()) == {1, 2, 3, 4, 5, 6}
    assert (kept.diff(dim=1, prepend=torch.zeros(len(kept), 1, dtype=torch.bool)).sum(1) <= 2).all()
    assert kept.any(0).all()


def test_log_std_of_a_prior_stays_in_its_range(make_avatar, batch):
    avatar = make_avatar()
    with torch.no_grad():
        avatar.drivers["hmc"].head.out.gain.fill_(1e6)
    log_std = avatar.prior("hmc", batch.driving).log_std
    assert log_std.min() >= -6
    assert log_std.max() <= 3


def test_measured_driving_images_have_zero_mean_and_unit_spread(make_avatar, batch):
    avatar = make_avatar(method="lipflow")
    driver = avatar.drivers["hmc"]
    driving = batch.driving
    driving.hmc_present[0, 0] = False
    avatar.measure_driving(driving)
    normalised = driver.normalize(driving.hmc_images)
    present = driving.hmc_present
    for camera in range(present.shape[1]):
        seen = normalised[present[:, camera], camera]
        torch.testing.assert_close(seen.mean(0), torch.zeros_like(seen[0]), atol=1e-4, rtol=0)
    assert normalised[present].square().mean().sqrt().item() == pytest.approx(1.0, abs=1e-3)
    # What an absent view holds has no say.
    before = driver.normalize.mean.clone()
    driving.hmc_images[0, 0] = 255 - driving.hmc_images[0, 0]
    avatar.measure_driving(driving)
    assert torch.equal(driver.normalize.mean, before)
    assert "drivers.hmc.normalize.mean" in avatar.state_dict()


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


def test_fused_prior_leaves_out_absent_signals_frame_by_frame(make_avatar, batch):
    avatar, driving = make_avatar(), batch.driving
    driving.frontal_present[0] = False
    fused, alone = avatar.fused_prior(("frontal", "keypoints"), driving), avatar.prior("keypoints", driving)
    torch.testing.assert_close(fused.mean[0], alone.mean[0])
    assert (fused.log_std[1] < alone.log_std[1]).all()


def test_several_signals_leave_the_prior_of_a_dam_standard(make_avatar, batch):
    """It is one prior, not an expert for each signal."""
    prior = make_avatar(method="dam").fused_prior(("hmc", "frontal", "keypoints"), batch.driving)
    assert not prior.mean.any()
    assert not prior.log_std.any()


@pytest.mark.parametrize("absent", [(), (0,), (0, 2)])
def test_product_of_gaussians_is_the_product_of_densities_on_a_grid(absent):
    """Mean and std of the normalised product, summed over 200,001 points in float64; measured worst case 5e-15."""
    means = torch.tensor([[-0.7, 0.4], [1.1, 0.2], [0.3, -2.0]], dtype=torch.float64)
    log_stds = torch.tensor([[-0.5, 1.2], [0.3, -1.5], [0.9, 0.0]], dtype=torch.float64)
    experts = [DiagonalGaussian(mean, log_std) for mean, log_std in zip(means, log_stds, strict=True)]
    present = [torch.tensor(index not in absent) for index in range(3)]
    product = product_of_gaussians(experts, present)
    grid = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    for axis in range(2):
        log_density = torch.zeros_like(grid)
        for mean, log_std, seen in zip(means[:, axis], log_stds[:, axis], present, strict=True):
            if seen:
                log_density += torch.distributions.Normal(mean, log_std.exp()).log_prob(grid)
        mass = torch.softmax(log_density, 0)
        mean = (mass * grid).sum()
        std = (mass * (grid - mean).square()).sum().sqrt()
        torch.testing.assert_close(product.mean[axis], mean, atol=1e-10, rtol=0)
        torch.testing.assert_close(product.log_std[axis].exp(), std, atol=1e-10, rtol=0)


@pytest.fixture
def own_signal(monkeypatch):
    """The room of drivers with one more file in it."""
    folder = Path(__file__).parent / "own_signal"
    monkeypatch.setattr(drivers, "__path__", [*drivers.__path__, str(folder)])
    monkeypatch.setattr(register_module, "_REGISTERED", dict(register_module._REGISTERED))
    drivers.import_signals()
    yield "lip-opening"
    del sys.modules["lipflow.model.drivers.lip_opening"]


def test_a_new_signal_is_one_file(own_signal, context, make_avatar, renderer, batch, generator, tmp_path):
    """Offered, configured, trained, fused and saved by its name alone."""
    assert context.offered_signals == (*SIGNALS, own_signal)
    assert make_avatar().signals == (*SIGNALS, own_signal)
    avatar = make_avatar(signals=("hmc", own_signal))
    loss = training_loss(avatar, renderer, batch, LossConfig(prior_signals_per_step=2), generator)
    loss.total.backward()
    assert loss.terms[f"latent_{own_signal}"].isfinite()
    assert all(p.grad.abs().max() > 0 for p in avatar.drivers[own_signal].parameters())
    driving = without(batch.driving, "keypoints", 0, 1)
    assert not avatar.prior(own_signal, driving).mean[0].any()
    fused = avatar.fused_prior(("hmc", own_signal), driving)
    assert same(map_rows(fused, 0), map_rows(avatar.fused_prior(("hmc",), driving), 0))
    assert not same(map_rows(fused, 1), map_rows(avatar.prior("hmc", driving), 1))
    save_avatar(avatar, tmp_path / "avatar")
    assert same(load_avatar(tmp_path / "avatar").prior(own_signal, driving), avatar.prior(own_signal, driving))


def map_rows(gaussian: DiagonalGaussian, row: int) -> DiagonalGaussian:
    return DiagonalGaussian(gaussian.mean[row], gaussian.log_std[row])


def test_a_name_is_registered_once(own_signal):
    with pytest.raises(LipflowError, match="'lip-opening' already"):
        drivers.register(drivers.find_signal(own_signal))


def test_without_its_file_a_signal_is_unknown(make_avatar, batch):
    with pytest.raises(LipflowError, match="no driving signal 'lip-opening': choose from hmc, frontal, keypoints"):
        make_avatar().prior("lip-opening", batch.driving)


def test_patches_of_landmarks_are_near_on_the_mean_face(make_avatar):
    driver = make_avatar().drivers["keypoints"]
    mean = driver.mean_landmarks.numpy()
    for anchor, ranks in enumerate(driver.nearest_first.numpy()):
        distance = np.linalg.norm(mean - mean[anchor], axis=1)
        assert ranks[anchor] == 0
        assert (np.diff(distance[np.argsort(ranks)]) >= -1e-4).all()
