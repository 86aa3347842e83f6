"""The networks: variants, gradients, colour, drivers, warp."""

import dataclasses
import itertools

import pytest
import torch
from pydantic import ValidationError

from lipflow.config import AvatarConfig, LossConfig
from lipflow.errors import ConfigError, LipflowError
from lipflow.losses import training_loss
from lipflow.model.avatar import Avatar
from lipflow.model.blocks import NormConv, NormConvTransposed, NormLinear, UpConv
from lipflow.model.color import ColorCorrection, solve_gain_bias
from lipflow.model.decoder import Decoder
from lipflow.model.encoder import Encoder
from lipflow.types import DrivingSignals

SWITCHES = [
    {"spatial_bias": bias, "warp_field": warp, "residual": residual, "upsample": upsample, "method": method}
    for bias, warp, residual, upsample, method in itertools.product(
        (True, False), (True, False), (True, False), ("transposed", "bilinear"), ("dam", "conditional", "lipflow")
    )
]
SWITCHES += [
    {"upsample": "nearest", "method": "dam"},
    {"flow_transform": "spline", "flow_bins": 4},
    {"warp_field": True, "warp_kind": "offset", "method": "dam"},
    {"warp_field": True, "warp_kind": "offset", "color_correction": "deviation", "residual": True},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_every_parameter_of_every_variant_gets_a_finite_gradient(make_avatar, renderer, batch, generator, switches):
    avatar = make_avatar(**switches)
    config = LossConfig(prior_signals_per_step=3)
    training_loss(avatar, renderer, batch, config, generator).total.backward()
    for name, parameter in avatar.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("texture_size", [32, 64, 128])
def test_any_power_of_two_texture_decodes_to_its_size(context, texture_size):
    mean = torch.zeros(3, texture_size, texture_size).numpy()
    statistics = dataclasses.replace(context.normalization, texture_mean=mean)
    context = dataclasses.replace(context, normalization=statistics)
    avatar = Avatar(AvatarConfig.small(texture_size=texture_size, warp_field=True), context)
    assert avatar.decode(torch.zeros(2, 32), torch.zeros(2, 3, 3)).textures.shape == (
        2,
        3,
        3,
        texture_size,
        texture_size,
    )


def test_full_size_has_the_layers_of_the_public_model():
    """Eight halvings of 16, 16, 32, 32, 64, 64, 128, 128 channels to 2048 features; eight doublings back."""
    with torch.device("meta"):
        encoder, decoder = Encoder(AvatarConfig(), 7306), Decoder(AvatarConfig(), 7306)
    assert [conv.weight.shape[0] for conv in encoder.tower.convs] == [16, 16, 32, 32, 64, 64, 128, 128]
    assert encoder.tower.outputs == 2048
    assert encoder.mesh_fc.weight.shape == (256, 21918)
    assert [tuple(stage.bias.shape) for stage in decoder.tower.stages] == [
        (128, 8, 8), (64, 16, 16), (64, 32, 32), (32, 64, 64), (32, 128, 128), (16, 256, 256), (16, 512, 512),
        (3, 1024, 1024),
    ]  # fmt: skip
    assert decoder.texture_fc.weight.shape == (2048, 264)


def test_same_seed_gives_the_same_avatar_whatever_the_global_seed(make_avatar):
    torch.manual_seed(1)
    first = make_avatar().state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = make_avatar().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = make_avatar(init_seed=1).state_dict()
    assert not torch.equal(first["encoder.head.weight"], other["encoder.head.weight"])


def test_weight_normalisation_ignores_the_weights_scale():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for layer, value in ((NormConv(3, 4, 3), x), (NormConvTransposed(3, 4), x), (NormLinear(8, 5), x)):
        before = layer(value)
        with torch.no_grad():
            layer.weight.mul_(7.3)
        torch.testing.assert_close(layer(value), before, atol=1e-5, rtol=1e-5)


def test_weight_normalised_linear_is_the_public_formula():
    """w = g * v / |v| with one norm a layer; here |v| = 5."""
    layer = NormLinear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        layer.gain.copy_(torch.tensor([10.0, 5.0]))
        layer.bias.copy_(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(layer(torch.ones(2)), torch.tensor([7.0, 6.0]))


def test_transposed_convolution_starts_without_checkerboard():
    out = NormConvTransposed(2, 3)(torch.ones(1, 2, 6, 6))[0, :, 2:-2, 2:-2]
    torch.testing.assert_close(out, out[:, :1, :1].expand_as(out))


def test_bilinear_upsampling_is_not_nearest():
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    layer = UpConv(1, 1, 8, upsample="bilinear", spatial_bias=False)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.weight[0, 0, 1, 1] = 1
        layer.conv.gain.fill_(1)
    torch.testing.assert_close(layer(ramp)[0, 0, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))


def test_spatial_bias_is_one_parameter_a_texel():
    assert UpConv(2, 3, 8, upsample="bilinear", spatial_bias=True).bias.shape == (3, 8, 8)
    assert UpConv(2, 3, 8, upsample="bilinear", spatial_bias=False).bias.shape == (3, 1, 1)


def test_mesh_does_not_depend_on_the_view_and_texture_does(make_avatar, generator):
    avatar = make_avatar()
    z = torch.randn(2, 6, generator=generator)
    views = torch.nn.functional.normalize(torch.randn(2, 2, 3, generator=generator), dim=-1)
    decoded = avatar.decode(z, views)
    torch.testing.assert_close(decoded.vertices, avatar.decode(z, -views).vertices)
    torch.testing.assert_close(decoded.vertices, avatar.decode_vertices(z))
    assert (decoded.textures[:, 0] - decoded.textures[:, 1]).abs().max() > 1e-3


def test_folding_views_into_the_batch_changes_nothing(make_avatar, generator):
    avatar = make_avatar(warp_field=True)
    z = torch.randn(2, 6, generator=generator)
    views = torch.nn.functional.normalize(torch.randn(2, 3, 3, generator=generator), dim=-1)
    together = avatar.decode(z, views).textures
    alone = torch.cat([avatar.decode(z, views[:, k : k + 1]).textures for k in range(3)], 1)
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=0)  # 0..255; measured 3e-5


def test_encoder_and_decoder_work_in_normalised_space(make_avatar, context):
    """The mean texture and mesh are zero to the encoder, and what zero decodes to."""
    avatar = make_avatar()
    seen = {}
    avatar.encoder.register_forward_hook(lambda _, inputs, output: seen.update(inputs=inputs))
    avatar.encode(avatar.vertices_mean[None] + 5.0, avatar.texture_mean[None] - 40.0)
    torch.testing.assert_close(seen["inputs"][0], torch.ones_like(seen["inputs"][0]))
    torch.testing.assert_close(seen["inputs"][1], -torch.ones_like(seen["inputs"][1]))
    with torch.no_grad():
        avatar.decoder.mesh_fc.gain.zero_()
        avatar.decoder.tower.stages[-1].conv.gain.zero_()
    decoded = avatar.decode(torch.zeros(1, 6), torch.zeros(1, 1, 3))
    torch.testing.assert_close(decoded.vertices[0], avatar.vertices_mean)
    torch.testing.assert_close(decoded.textures[0, 0], avatar.texture_mean)


def test_colour_anchor_and_untrained_cameras_pass_colours_unchanged(make_avatar):
    """cam-b is the first trained camera, hence the anchor; cam-a is held out."""
    avatar = make_avatar()
    assert avatar.color.gain.shape == (2, 3)
    with torch.no_grad():
        avatar.color.gain.fill_(2.0)
        avatar.color.bias.fill_(0.5)
    textures = torch.full((1, 4, 3, 2, 2), 10.0)
    corrected = avatar.correct_color(textures, torch.tensor([[0, 1, 2, 3]]))
    # 2 * 10 + 0.5 * texture std of 40
    torch.testing.assert_close(corrected[0, :, 0, 0, 0], torch.tensor([10.0, 10.0, 40.0, 40.0]))


def test_colour_of_a_single_camera_has_no_parameters():
    color = ColorCorrection(["a"], ["a"], 1.0)
    assert sum(parameter.numel() for parameter in color.parameters()) == 0
    assert torch.equal(color(torch.ones(1, 1, 3, 2, 2), torch.zeros(1, 1, dtype=torch.long)), torch.ones(1, 1, 3, 2, 2))


def test_solve_gain_bias_recovers_known_colours_under_weights(generator):
    predicted = 255 * torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    gain = torch.tensor([[0.5, 1.0, 2.0], [1.5, 0.8, 1.1]], dtype=torch.float64)
    bias = torch.tensor([[3.0, -4.0, 0.0], [10.0, 5.0, -20.0]], dtype=torch.float64)
    target = gain[..., None, None] * predicted + bias[..., None, None]
    weight = torch.rand(2, 8, 8, generator=generator, dtype=torch.float64)
    weight[:, :2] = 0
    target[:, :, :2] = 999
    found = solve_gain_bias(predicted, target, weight)
    torch.testing.assert_close(found[0], gain)
    torch.testing.assert_close(found[1], bias)


def test_solve_gain_bias_without_contrast_or_weight_only_shifts():
    flat = solve_gain_bias(torch.full((1, 4, 4), 5.0), torch.full((1, 4, 4), 9.0), torch.ones(4, 4))
    assert (flat[0].item(), flat[1].item()) == (1.0, 4.0)
    empty = solve_gain_bias(torch.rand(1, 4, 4), torch.rand(1, 4, 4), torch.zeros(4, 4))
    assert (empty[0].item(), empty[1].item()) == (1.0, 0.0)


def same(first, second) -> bool:
    return torch.equal(first.mean, second.mean) and torch.equal(first.log_std, second.log_std)


def test_a_masked_landmark_has_no_influence_and_a_seen_one_has(make_avatar, batch):
    avatar, driving = make_avatar(), batch.driving
    driving.keypoints[:, 1, 2] = 0
    moved = dataclasses.replace(driving, keypoints=driving.keypoints.clone())
    moved.keypoints[:, 1, :2] = 1e6
    assert same(avatar.prior("keypoints", driving), avatar.prior("keypoints", moved))
    moved.keypoints[:, 2, 0] += 1
    assert not same(avatar.prior("keypoints", driving), avatar.prior("keypoints", moved))


def test_an_absent_headset_view_has_no_influence_and_a_present_one_has(make_avatar, batch):
    avatar, driving = make_avatar(), batch.driving
    driving.hmc_present[:, 0] = False
    changed = dataclasses.replace(driving, hmc_images=driving.hmc_images.clone())
    changed.hmc_images[:, 0] = 0
    assert same(avatar.prior("hmc", driving), avatar.prior("hmc", changed))
    changed.hmc_images[:, 1, :, :12] = 0
    assert not same(avatar.prior("hmc", driving), avatar.prior("hmc", changed))


@pytest.mark.parametrize("signal", ["hmc", "frontal", "keypoints"])
def test_a_frame_without_the_signal_has_the_standard_prior(make_avatar, batch, signal):
    driving = batch.driving
    driving.hmc_present[0] = False
    driving.frontal_present[0] = False
    driving.keypoints[0, :, 2] = 0
    prior = make_avatar().prior(signal, driving)
    assert not prior.mean[0].any()
    assert not prior.log_std[0].any()
    assert prior.mean[1].any()


def test_keypoint_prior_does_not_depend_on_image_resolution(make_avatar, batch):
    avatar, driving = make_avatar(), batch.driving
    scale = torch.tensor([2.0, 2.0, 1.0])
    cameras = dataclasses.replace(
        driving.frontal_cameras, intrinsics=torch.diag(scale) @ driving.frontal_cameras.intrinsics
    )
    doubled = dataclasses.replace(driving, keypoints=driving.keypoints * scale, frontal_cameras=cameras)
    first, second = avatar.prior("keypoints", driving), avatar.prior("keypoints", doubled)
    torch.testing.assert_close(first.mean, second.mean, atol=1e-4, rtol=1e-4)


def test_input_dropout_hides_something_but_never_everything(make_avatar, batch):
    avatar, driving = make_avatar(driver_dropout=0.5), batch.driving
    for signal in ("hmc", "keypoints"):
        full = avatar.prior(signal, driving)
        dropped = avatar.prior(signal, driving, torch.Generator().manual_seed(0))
        assert not same(full, dropped)
        assert same(dropped, avatar.prior(signal, driving, torch.Generator().manual_seed(0)))
        assert dropped.mean.any(-1).all()


def test_log_std_of_a_prior_stays_in_its_range(make_avatar, batch):
    avatar = make_avatar()
    with torch.no_grad():
        avatar.drivers["hmc"].head.out.gain.fill_(1e6)
    log_std = avatar.prior("hmc", batch.driving).log_std
    assert log_std.min() >= -6
    assert log_std.max() <= 3


def test_log_prior_and_start_go_through_the_flow(make_avatar, batch):
    prior = make_avatar().prior("keypoints", batch.driving)
    prior.mean, prior.log_std = prior.mean.double(), prior.log_std.double()
    avatar = make_avatar().double()
    with torch.no_grad():
        for coupling in avatar.flow.couplings:
            coupling.hyper[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    z = avatar.start(prior)
    y, log_det = avatar.flow(z)
    torch.testing.assert_close(y, prior.mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(avatar.log_prior(z, prior), prior.log_prob(prior.mean) + log_det)


def test_fused_prior_leaves_out_absent_signals_frame_by_frame(make_avatar, batch):
    avatar, driving = make_avatar(), batch.driving
    driving.frontal_present[0] = False
    fused, alone = avatar.fused_prior(("frontal", "keypoints"), driving), avatar.prior("keypoints", driving)
    torch.testing.assert_close(fused.mean[0], alone.mean[0])
    assert (fused.log_std[1] < alone.log_std[1]).all()


def test_dam_has_no_drivers_and_a_standard_prior(make_avatar, batch):
    avatar = make_avatar(method="dam")
    assert avatar.signals == ()
    assert not any("flow" in name or "driver" in name for name, _ in avatar.named_parameters())
    assert not avatar.start(avatar.prior("hmc", batch.driving)).any()


def test_what_does_not_fit_is_refused_with_its_remedy(make_avatar, context, batch):
    with pytest.raises(ConfigError, match="set texture_size to 32"):
        make_avatar(texture_size=64)
    bare = dataclasses.replace(context, headset_cameras=())
    with pytest.raises(ConfigError, match="remove them"):
        Avatar(AvatarConfig.small(texture_size=32, signals=("hmc",)), bare)
    avatar = make_avatar(signals=("keypoints",))
    with pytest.raises(LipflowError, match="no hmc driver"):
        avatar.prior("hmc", batch.driving)
    with pytest.raises(LipflowError, match="no frontal signal"):
        avatar.prior("frontal", DrivingSignals())
    with pytest.raises(LipflowError, match="vertices of shape"):
        avatar.encode(batch.vertices[:, :-1], batch.average_texture)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texture_size": 96}, "power of two"),
        ({"method": "dam", "signals": ("hmc",)}, "no drivers"),
        ({"warp_field": True, "texture_size": 32, "warp_channels": (8, 8, 8, 8, 8)}, "fewer warp_channels"),
        ({"decoder_channels": (8, 0)}, "below 1"),
        ({"signals": ("hmc", "hmc")}, "twice"),
        ({"latent": 3}, "latent"),
    ],
)
def test_bad_configs_are_refused_when_built(changes, message):
    with pytest.raises(ValidationError, match=message):
        AvatarConfig(**changes)


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
