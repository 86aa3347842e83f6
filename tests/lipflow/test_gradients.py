"""Every path of gradients is alive: each parameter of each variant gets a finite gradient that is not zero.

Those of drivers that are added to a frozen avatar are in ``test_added_drivers.py``.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from lipflow.config import LossConfig
from lipflow.losses import training_loss

METHODS = ("dam", "conditional", "lipflow")


DECODERS: list[dict[str, Any]] = [
    {"spatial_bias": bias, "residual": residual, "upsample": upsample, **warp}
    for bias, residual, upsample, warp in itertools.product(
        (True, False),
        (True, False),
        ("transposed", "bilinear", "nearest"),
        ({"warp_field": False}, {"warp_field": True}, {"warp_field": True, "warp_kind": "offset"}),
    )
]

# Each decoder with one method by default, and with the other two in the slow run: all 108 combinations.
VARIANTS = [
    pytest.param(decoder | {"method": method}, marks=() if (number + turn) % len(METHODS) == 0 else pytest.mark.slow)
    for number, decoder in enumerate(DECODERS)
    for turn, method in enumerate(METHODS)
]
VARIANTS += [
    pytest.param({"flow_transform": "spline", "flow_bins": 4}),
    pytest.param({"flow_conditional": True}),
    pytest.param({"flow_conditional": True, "flow_transform": "spline", "flow_bins": 4}),
    pytest.param({"method": "flow-gaussian"}),
    pytest.param({"color_correction": "deviation"}),
    *(pytest.param({"method": method, "signals": (signal,)})
      for method in ("conditional", "lipflow") for signal in ("hmc", "frontal", "keypoints")),
]  # fmt: skip


@pytest.mark.parametrize("switches", VARIANTS, ids=lambda switches: "-".join(map(str, switches.values())))
def test_every_parameter_of_every_variant_gets_a_finite_gradient(make_avatar, renderer, batch, generator, switches):
    avatar = make_avatar(**switches)
    training_loss(avatar, renderer, batch, LossConfig(prior_signals_per_step=3), generator).total.backward()
    for name, parameter in avatar.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("method", ["conditional", "lipflow"])
@pytest.mark.parametrize(
    "weights",
    [
        {"prior_weight": 0.0},
        {"latent_weight": 0.0},
        {"latent_estimate": "likelihood"},
        {"reverse_weight": 1.0, "prior_weight": 0.0, "latent_weight": 0.0},
    ],
    ids=lambda weights: "-".join(weights),
)
def test_each_term_alone_reaches_every_driver_and_the_flow(make_avatar, renderer, batch, generator, method, weights):
    """Whatever ablation is trained, nothing of it stays as it was initialised."""
    avatar = make_avatar(method=method)
    config = LossConfig(prior_signals_per_step=3, **weights)
    training_loss(avatar, renderer, batch, config, generator).total.backward()
    for name, parameter in avatar.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
