"""The networks: variants, colour, drivers, warp."""

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from lipflow.config import AvatarConfig
from lipflow.errors import ConfigError, LipflowError
from lipflow.model.avatar import Avatar
from lipflow.model.blocks import NormConv, NormConvTransposed, NormLinear, UpConv
from lipflow.model.color import ColorCorrection, solve_gain_bias
from lipflow.model.decoder import Decoder
from lipflow.model.encoder import Encoder
from lipflow.types import DrivingSignals


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


def bend(avatar: Avatar) -> None:
    """Take the avatar's flow far from the identity."""
    with torch.no_grad():
        for coupling in avatar.flow.couplings:
            coupling.hyper[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
            coupling.hyper[-1].bias.normal_(generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("flow_conditional", [False, True])
def test_log_prior_and_start_go_through_the_flow(make_avatar, batch, flow_conditional):
    prior = make_avatar().prior("keypoints", batch.driving)
    prior.mean, prior.log_std = prior.mean.double(), prior.log_std.double()
    avatar = make_avatar(flow_conditional=flow_conditional).double()
    bend(avatar)
    z = avatar.start(prior)
    y, log_det = avatar.flow(z, prior)
    torch.testing.assert_close(y, prior.mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(avatar.log_prior(z, prior), prior.log_prob(prior.mean) + log_det)


def test_dam_has_no_drivers_and_a_standard_prior(make_avatar, batch):
    avatar = make_avatar(method="dam")
    assert avatar.signals == ()
    assert not any("flow" in name or "driver" in name for name, _ in avatar.named_parameters())
    assert not avatar.start(avatar.prior("hmc", batch.driving)).any()


def test_flow_gaussian_has_a_standard_prior_in_y_behind_its_flow(make_avatar, batch):
    avatar = make_avatar(method="flow-gaussian")
    bend(avatar)
    assert avatar.signals == ()
    assert any("flow" in name for name, _ in avatar.named_parameters())
    assert not any("driver" in name for name, _ in avatar.named_parameters())
    for signals in (("hmc",), ("hmc", "frontal", "keypoints")):
        prior = avatar.fused_prior(signals, batch.driving)
        assert not prior.mean.any()
        assert not prior.log_std.any()
        start = avatar.start_from(signals, batch.driving)
        assert start.abs().max() > 0.5
        assert torch.equal(start, avatar.flow.inverse(torch.zeros(2, 6)))
    z = torch.linspace(-1, 1, 12).view(2, 6)
    y, log_det = avatar.flow(z)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(y).sum(-1)
    torch.testing.assert_close(avatar.log_prior(z, prior), standard + log_det)
    assert log_det.abs().max() > 0.1


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
        ({"method": "flow-gaussian", "signals": ("hmc",)}, "method is flow-gaussian, which has no drivers"),
        ({"method": "flow-gaussian", "flow_conditional": True}, "flow_conditional is true"),
        ({"method": "conditional", "flow_conditional": True}, "flow_conditional is true"),
        ({"warp_field": True, "texture_size": 32, "warp_channels": (8, 8, 8, 8, 8)}, "fewer warp_channels"),
        ({"decoder_channels": (8, 0)}, "below 1"),
        ({"signals": ("hmc", "hmc")}, "twice"),
        ({"latent": 3}, "latent"),
    ],
)
def test_bad_configs_are_refused_when_built(changes, message):
    with pytest.raises(ValidationError, match=message):
        AvatarConfig(**changes)
