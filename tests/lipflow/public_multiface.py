"""The public Multiface model for tests: its state dict's names and shapes, and its formulas in float64."""

import numpy as np
import torch
import torch.nn.functional as F

ARCHITECTURES = ("base", "res", "warp", "non", "bilinear")
CAMERAS, LATENT = 4, 24


def public_weights(architecture: str, vertices: int) -> dict[str, torch.Tensor]:
    """A state dict with the public names and shapes, every value random, of moderate size."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def layer(name, *shape, transposed=False):
        outputs = shape[1] if transposed else shape[0]
        weights[f"{name}.weight"] = draw(*shape)
        weights[f"{name}.bias"] = 0.1 * draw(outputs)
        weights[f"{name}.g"] = weights[f"{name}.weight"].norm() * draw(outputs).abs() / np.sqrt(np.prod(shape[1:]))

    def doubling(name, inputs, outputs, side, nearest=False, spatial=True):
        if nearest:
            layer(f"{name}.deconv", outputs, inputs, 3, 3)
        else:
            layer(f"{name}.deconv", inputs, outputs, 4, 4, transposed=True)
        weights[f"{name}.bias"] = 0.1 * draw(1, outputs, side if spatial else 1, side if spatial else 1)

    blocks = [(3, 16, 16), (16, 32, 32), (32, 64, 64), (64, 128, 128)]
    for block, (inputs, hidden, outputs) in enumerate(blocks):
        prefix = f"enc.texture_encoder.downsample.{block}"
        layer(f"{prefix}.conv1", hidden, inputs, 4, 4)
        layer(f"{prefix}.conv2", outputs, hidden, 4, 4)
        if architecture == "res":
            layer(f"{prefix}.res1", hidden, hidden, 3, 3)
            layer(f"{prefix}.res2", outputs, outputs, 3, 3)
    layer("enc.texture_fc", 256, 2048)
    layer("enc.mesh_fc", 256, 3 * vertices)
    layer("enc.fc", 2 * LATENT, 512)
    layer("dec.view_fc", 8, 3)
    layer("dec.z_fc", 256, LATENT)
    layer("dec.mesh_fc", 3 * vertices, 256)
    layer("dec.texture_fc", 16 * LATENT, 264)
    blocks = [(LATENT, LATENT, 64), (64, 64, 32), (32, 32, 16), (16, 16, 3)]
    for block, (inputs, hidden, outputs) in enumerate(blocks):
        prefix, side = f"dec.texture_decoder.upsample.{block}", 8 * 4**block
        switches = {"nearest": architecture == "bilinear", "spatial": architecture != "non"}
        doubling(f"{prefix}.conv1", inputs, hidden, side, **switches)
        doubling(f"{prefix}.conv2", hidden, outputs, 2 * side, **switches)
        if architecture == "res":
            layer(f"{prefix}.res1", hidden, hidden, 3, 3)
            layer(f"{prefix}.res2", outputs, outputs, 3, 3)
    if architecture == "warp":
        layer("warp.mlp.0", 256, LATENT)
        layer("warp.mlp.2", 1024, 256)
        blocks = [(256, 128, 128), (128, 128, 64), (64, 64, 32), (32, 32, 16)]
        for block, (inputs, hidden, outputs) in enumerate(blocks):
            doubling(f"warp.upsample.{block}.conv1", inputs, hidden, 4 * 4**block)
            doubling(f"warp.upsample.{block}.conv2", hidden, outputs, 8 * 4**block)
        weights["warp.upsample.5.weight"] = 2 * draw(2, 16, 3, 3)
        weights["warp.upsample.5.bias"] = draw(2)
        weights["warp.normal_grid"] = public_identity()
    weights["cc.weight_anchor"], weights["cc.bias_anchor"] = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    weights["cc.weight"] = 1 + 0.3 * draw(CAMERAS - 1, 3, 1, 1)
    weights["cc.bias"] = 0.3 * draw(CAMERAS - 1, 3, 1, 1)
    return weights


def public_identity() -> torch.Tensor:
    x, y = np.meshgrid(np.linspace(-1, 1, 1024), np.linspace(-1, 1, 1024))
    return torch.from_numpy(np.stack([x, y])[None].astype(np.float32))


class PublicModel:
    """``models.py`` as formulas: w = g v / |v|, leaky ReLU of slope 0.2, in float64."""

    def __init__(self, weights):
        self.weights = {name: tensor.double() for name, tensor in weights.items()}

    def normed(self, name, axis=0):
        weight, gain = self.weights[f"{name}.weight"], self.weights[f"{name}.g"]
        shape = [1] * weight.ndim
        shape[axis] = -1
        return weight * gain.view(shape) / weight.square().sum().sqrt()

    def linear(self, name, x):
        return x @ self.normed(name).T + self.weights[f"{name}.bias"]

    def conv(self, name, x, stride):
        return F.conv2d(x, self.normed(name), self.weights[f"{name}.bias"], stride=stride, padding=1)

    def doubling(self, name, x):
        deconv = f"{name}.deconv"
        if self.weights[f"{deconv}.weight"].shape[-1] == 4:
            x = F.conv_transpose2d(x, self.normed(deconv, 1), self.weights[f"{deconv}.bias"], stride=2, padding=1)
        else:
            x = self.conv(deconv, x.repeat_interleave(2, -1).repeat_interleave(2, -2), 1)
        return x + self.weights[f"{name}.bias"]

    def encode(self, texture, mesh):
        for block in range(4):
            for half in (1, 2):
                prefix = f"enc.texture_encoder.downsample.{block}"
                texture = leaky(self.conv(f"{prefix}.conv{half}", texture, 2))
                if f"{prefix}.res{half}.weight" in self.weights:
                    texture = leaky(self.conv(f"{prefix}.res{half}", texture, 1) + texture)
        features = [
            leaky(self.linear("enc.texture_fc", texture.flatten(1))),
            leaky(self.linear("enc.mesh_fc", mesh.flatten(1))),
        ]
        mean, log_std = self.linear("enc.fc", torch.cat(features, 1)).chunk(2, 1)
        return mean * 0.1, log_std * 0.01

    def decode(self, z, view, camera):
        code = leaky(self.linear("dec.z_fc", z))
        joined = torch.cat([leaky(self.linear("dec.view_fc", view)), code], 1)
        texture = leaky(self.linear("dec.texture_fc", joined)).view(len(z), LATENT, 4, 4)
        texture = self.up("dec.texture_decoder.upsample", texture, last_is_active=False)
        if "warp.mlp.0.weight" in self.weights:
            texture = self.warped(z, texture)
        weight = torch.cat([self.weights["cc.weight_anchor"], self.weights["cc.weight"]])
        bias = torch.cat([self.weights["cc.bias_anchor"], self.weights["cc.bias"]])
        return texture * weight[camera] + bias[camera], self.linear("dec.mesh_fc", code).view(len(z), -1, 3)

    def up(self, prefix, x, *, last_is_active):
        for block in range(4):
            for half in (1, 2):
                activate = leaky if last_is_active or (block, half) != (3, 2) else lambda value: value
                x = activate(self.doubling(f"{prefix}.{block}.conv{half}", x))
                if f"{prefix}.{block}.res{half}.weight" in self.weights:
                    x = activate(self.conv(f"{prefix}.{block}.res{half}", x, 1) + x)
        return x

    def warped(self, z, texture):
        code = leaky(self.linear("warp.mlp.2", leaky(self.linear("warp.mlp.0", z))))
        field = self.up("warp.upsample", code.view(len(z), 256, 2, 2), last_is_active=True)
        field = F.interpolate(field, size=(1024, 1024), mode="bilinear", align_corners=False)
        head = "warp.upsample.5"
        field = F.conv2d(field, self.weights[f"{head}.weight"], self.weights[f"{head}.bias"], padding=1)
        grid = (field / 1024 + self.weights["warp.normal_grid"]).permute(0, 2, 3, 1)
        return F.grid_sample(texture, grid, align_corners=False)


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)
