"""Weights of the public Multiface code, as avatars.

The checkpoints of https://github.com/facebookresearch/multiface (``train.py``: ``model.pth``, ``best_model.pth``) are
state dicts of its ``DeepAppearanceVAE`` and ``WarpFieldVAE`` (``models.py``), with ``module.`` before each name if
they were saved from a ``DistributedDataParallel``. Its five architectures are told apart by names and shapes alone:

======== ============================================================================================
base     spatial biases, transposed convolutions
res      base, with residual convolutions in encoder and decoder
warp     base, with a decoded field of offsets: ``warp_kind="offset"``
non      base without spatial biases
bilinear base, up-sampling by nearest neighbours and a convolution: ``upsample="nearest"``
======== ============================================================================================

An imported avatar gives the public model's mean, log standard deviation, mesh and colour-corrected texture for the same
normalised inputs. Colour correction acts on normalised textures there: ``color_correction="deviation"``. Two biases
that are always added there, of a transposed convolution and of its texels, are one here.

The public loader shows texels that are exactly 0 to its encoder as the mean texture; here average textures are shown
as they are.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lipflow.checkpoint import CheckpointError
from lipflow.config import AvatarConfig
from lipflow.model.avatar import Avatar
from lipflow.model.context import AvatarContext

TEXTURE_SIZE = 1024
"""Of the checkpoints that can be imported; the public code's other size, 512, starts from 2 x 2 cells."""

_HIDDEN, _VIEW = 256, 8
_WIDTHS = (64, 64, 32, 32, 16, 16)
_WARP_WIDTHS = (256, 128, 128, 128, 64, 64, 32, 32, 16)
_ANCHOR = {"cc.weight_anchor": 1.0, "cc.bias_anchor": 0.0}
_CONSTANT = "warp.normal_grid"
_LISTED = 10


def read_multiface_weights(checkpoint: str | Path | BinaryIO, name: str | None = None) -> dict[str, Tensor]:
    """The tensors of a public checkpoint by their public names, without ``module.``; nothing in it is executed.

    Args:
        checkpoint: path or open file.
        name: for errors; by default the path.

    Raises:
        CheckpointError: no file of tensors.
    """
    name = name or str(checkpoint)
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{name}: there is no such file; give a model.pth of the public Multiface code"
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name}: no PyTorch checkpoint of plain tensors ({reason}); give a model.pth of the public Multiface "
            "code, and fetch it again if it is one"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{name}: a checkpoint, but no state dict; give the model.pth that train.py saved")
    return {key.removeprefix("module."): value for key, value in state.items()}


def multiface_config(weights: Mapping[str, Tensor]) -> AvatarConfig:
    """The architecture that public weights belong to.

    Raises:
        CheckpointError: a name is missing by which it is told, or they were trained at another texture size.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights or weights[name].ndim < 2:
            raise CheckpointError(f"{name}: missing, or no matrix; these are no weights of the public Multiface models")
        return tuple(weights[name].shape)

    latent_size = shape("dec.z_fc.weight")[1]
    features = shape("dec.texture_fc.weight")[0]
    if features != 16 * latent_size:
        raise CheckpointError(
            f"dec.texture_fc.weight: {features} outputs, expected {16 * latent_size}, 4 x 4 cells of the latent size; "
            f"only models trained with --tex_size {TEXTURE_SIZE} can be imported"
        )
    stage = "dec.texture_decoder.upsample.0.conv1"
    return AvatarConfig(
        method="dam",
        texture_size=TEXTURE_SIZE,
        latent_size=latent_size,
        hidden_size=_HIDDEN,
        view_size=_VIEW,
        encoder_channels=(128, 128, *_WIDTHS),
        decoder_channels=(latent_size, latent_size, *_WIDTHS),
        spatial_bias=shape(f"{stage}.bias")[-1] > 1,
        residual="enc.texture_encoder.downsample.0.res1.weight" in weights,
        upsample="transposed" if shape(f"{stage}.deconv.weight")[-1] == 4 else "nearest",
        warp_field="warp.mlp.0.weight" in weights,
        warp_kind="offset",
        warp_channels=_WARP_WIDTHS,
        color_correction="deviation",
    )


def avatar_from_multiface(weights: Mapping[str, Tensor], context: AvatarContext) -> Avatar:
    """The avatar of public weights, in evaluation mode.

    Args:
        weights: as :func:`read_multiface_weights` gives them.
        context: of the capture that they were trained on: its own statistics, and all cameras of its ``KRT`` in that
            order as training cameras.

    Raises:
        CheckpointError: the weights are none of the public models, or do not fit the capture; all that does not fit is
            listed.
        ConfigError: the capture's textures are not of :data:`TEXTURE_SIZE`.
    """
    avatar = Avatar(multiface_config(weights), context)
    remaining = {name: tensor for name, tensor in weights.items() if name != _CONSTANT}
    misfits: list[str] = []

    def take(name: str, shape: Sequence[int]) -> Tensor:
        """The tensor of that public name, as ``float32`` of that shape; one that does not fit is noted."""
        tensor = remaining.pop(name, None)
        if tensor is None or tuple(tensor.shape) != tuple(shape):
            found = "missing" if tensor is None else f"{tuple(tensor.shape)}"
            misfits.append(f"{name}: {found}, expected {tuple(shape)}")
            return torch.zeros(*shape)
        return tensor.float()

    state = {name: tensor.detach().clone() for name, tensor in avatar.state_dict().items()}
    for ours, public in _layers(avatar.config).items():
        state[f"{ours}.weight"] = take(f"{public}.weight", state[f"{ours}.weight"].shape)
        if f"{ours}.gain" in state:
            state[f"{ours}.gain"] = take(f"{public}.g", state[f"{ours}.gain"].shape)
        if f"{ours}.bias" in state:
            state[f"{ours}.bias"] = take(f"{public}.bias", state[f"{ours}.bias"].shape)
    for ours, public in _stages(avatar.config).items():
        channels = len(state[f"{ours}.bias"])
        state[f"{ours}.conv.weight"] = take(f"{public}.deconv.weight", state[f"{ours}.conv.weight"].shape)
        state[f"{ours}.conv.gain"] = take(f"{public}.deconv.g", (channels,))
        texels = take(f"{public}.bias", (1, *state[f"{ours}.bias"].shape))
        state[f"{ours}.bias"] = texels[0] + take(f"{public}.deconv.bias", (channels,))[:, None, None]
    # The public decoder joins the view's code before z's.
    joined = state["decoder.texture_fc.weight"]
    state["decoder.texture_fc.weight"] = torch.cat([joined[:, _VIEW:], joined[:, :_VIEW]], 1)
    for ours, public in (("gain", "weight"), ("bias", "bias")):
        cameras = len(state[f"color.{ours}"])
        state[f"color.{ours}"] = take(f"cc.{public}", (cameras, 3, 1, 1))[..., 0, 0]
    for name, value in _ANCHOR.items():
        anchor = take(name, (1, 3, 1, 1))
        if not (anchor == value).all():
            misfits.append(f"{name}: {anchor.flatten().tolist()}, expected {value} throughout")
    misfits += [f"{name}: {tuple(tensor.shape)}, unknown" for name, tensor in remaining.items()]
    misfits += [f"{name}: not finite" for name, tensor in weights.items() if not tensor.isfinite().all()]
    if misfits:
        more = f"; and {len(misfits) - _LISTED} more" if len(misfits) > _LISTED else ""
        raise CheckpointError(
            f"{len(misfits)} tensors do not fit the public Multiface model and the capture: "
            f"{'; '.join(misfits[:_LISTED])}{more}. Give the capture that the model was trained on, and all of its KRT"
        )
    avatar.load_state_dict(state)
    return avatar.eval()


def _layers(config: AvatarConfig) -> dict[str, str]:
    """Our names of layers with one weight each to the public ones."""
    names = {
        "encoder.texture_fc": "enc.texture_fc",
        "encoder.mesh_fc": "enc.mesh_fc",
        "encoder.head": "enc.fc",
        "decoder.latent_fc": "dec.z_fc",
        "decoder.view_fc": "dec.view_fc",
        "decoder.mesh_fc": "dec.mesh_fc",
        "decoder.texture_fc": "dec.texture_fc",
    }
    for level in range(8):
        block, half = level // 2, level % 2 + 1
        names[f"encoder.tower.convs.{level}"] = f"enc.texture_encoder.downsample.{block}.conv{half}"
        if config.residual:
            names[f"encoder.tower.residuals.{level}"] = f"enc.texture_encoder.downsample.{block}.res{half}"
            names[f"decoder.tower.residuals.{level}"] = f"dec.texture_decoder.upsample.{block}.res{half}"
    if config.warp_field:
        names |= {
            "decoder.warp.latent_fc": "warp.mlp.0",
            "decoder.warp.fc": "warp.mlp.2",
            "decoder.warp.head": "warp.upsample.5",
        }
    return names


def _stages(config: AvatarConfig) -> dict[str, str]:
    """Our names of layers that double the side to the public ones."""
    towers = {"decoder.tower": "dec.texture_decoder.upsample"}
    if config.warp_field:
        towers["decoder.warp.tower"] = "warp.upsample"
    return {
        f"{ours}.stages.{level}": f"{public}.{level // 2}.conv{level % 2 + 1}"
        for ours, public in towers.items()
        for level in range(8)
    }
