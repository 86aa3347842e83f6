"""The driving encoders: what is absent has no influence, what is there has; dropout, statistics."""

import dataclasses

import numpy as np
import pytest
import torch

from lipflow.config import AvatarConfig
from lipflow.errors import LipflowError
from lipflow.model.avatar import Avatar
from lipflow.model.drivers.hiding import hide_at_random
from lipflow.model.drivers.masked_set import MaskedSetEncoder
from lipflow.render.camera import project_through_lens
from lipflow.types import DrivingSignals, map_tensors
from tests.lipflow.driving_scenes import SIGNALS, refilled, same, without


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
    driving.keypoints[..., :2] = project_through_lens(mean, driving.frontal_cameras)[0]
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


def test_patches_of_landmarks_are_near_on_the_mean_face(make_avatar):
    driver = make_avatar().drivers["keypoints"]
    mean = driver.mean_landmarks.numpy()
    for anchor, ranks in enumerate(driver.nearest_first.numpy()):
        distance = np.linalg.norm(mean - mean[anchor], axis=1)
        assert ranks[anchor] == 0
        assert (np.diff(distance[np.argsort(ranks)]) >= -1e-4).all()
