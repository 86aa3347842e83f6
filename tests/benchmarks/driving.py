"""How much driving encoders say with parts of their signal missing: ``python tests/benchmarks/driving.py --face DIR``.

A proxy that trains in seconds: the latent is y, the first 24 principal components of the meshes of a synthetic dome,
each in units of its std, and a driver is trained alone to maximise log P(y | h). One segment in five is held out
whole. All rows of a table see the same frames in the same order, and the same hidden parts.

Encoders, in place of the avatar's own set encoder: *mean* over the seen parts' tokens, *zeros*, a layer over all
tokens where a missing one is zero. *whole* is the set encoder trained without subset dropout.

Figures: root mean square error of the vertices in mm / negative log-likelihood of y, nats a dimension, of which the
best constant Gaussian has 1.42; on the held-out frames when only the named parts are seen. The last table fuses
both drivers: *product* of their Gaussians as the avatar does, and the same divided by N(0, I), which both contain if
what they see is independent given y; *whitened*: RMS of the residuals in standard deviations, 1 if calibrated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lipflow.config import AvatarConfig
from lipflow.model.blocks import NormLinear, leaky
from lipflow.model.context import AvatarContext
from lipflow.model.drivers import Driver, find_signal
from lipflow.model.gaussian import DiagonalGaussian, product_of_gaussians
from lipflow.render.camera import compose
from lipflow.types import CameraTensors, DrivingSignals, Normalization, map_tensors
from pipeline.dome.motion import segment_names
from pipeline.dome.scene import DomeConfig, FrameShoot, dome_scene

COMPONENTS, HELD_OUT = 24, 5
WIDTHS = {
    "driver_image_size": 32,
    "driver_channels": (48, 32, 16, 8),
    "driver_hidden_size": 96,
    "latent_size": COMPONENTS,
    "texture_size": 32,
}
ENCODERS = ("set", "mean", "zeros", "whole")
PARTS = {
    "hmc": {
        "all": ("left-eye", "right-eye", "left-mouth", "right-mouth", "cyclops"),
        "eyes": ("left-eye", "right-eye"),
        "mouth": ("left-mouth", "right-mouth"),
        "left side": ("left-eye", "left-mouth"),
        "cyclops": ("cyclops",),
    },
    "keypoints": {
        "all": ("eye", "brow", "nose", "lip", "chin"),
        "eyes": ("eye", "brow"),
        "no lips": ("eye", "brow", "nose", "chin"),
        "mouth": ("lip", "chin"),
    },
}
"""Names of views; beginnings of the names of landmarks."""


@dataclass
class Frames:
    """Driving signals and latents of all frames; ``mm`` is the vertices' RMS for a unit of each component."""

    context: AvatarContext
    driving: DrivingSignals
    y: Tensor
    mm: Tensor
    train: Tensor
    test: Tensor


class _MaskedMean(nn.Module):
    """The feature of DeepSets."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.fc = NormLinear(width, outputs)

    def forward(self, token: Tensor, seen: Tensor) -> Tensor:
        feature = leaky(self.fc(token))
        return torch.where(seen[..., None], feature, 0.0).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)


class _Zeros(nn.Module):
    """Weights for every part, and zero for a missing one."""

    def __init__(self, parts: int, width: int, outputs: int):
        super().__init__()
        self.fc = NormLinear(parts * width, outputs)

    def forward(self, token: Tensor, seen: Tensor) -> Tensor:
        return leaky(self.fc(torch.where(seen[..., None], token, 0.0).flatten(1)))


def main() -> None:
    """Train all rows and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--face", help="real face asset with its KRT; the procedural head without")
    parser.add_argument("--segments", type=int, default=110)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    frames = _synthesised(options.face, options.segments)
    console.print(f"{len(frames.train)} training frames, {len(frames.test)} held out, {options.steps} steps")
    trained: dict[str, list[Driver]] = {}
    for signal in PARTS:
        table = Table(title=f"{signal}: mm / nats, a seed each", title_justify="left")
        for column in ("encoder", *PARTS[signal], "s"):
            table.add_column(column)
        for encoder in ENCODERS:
            runs = [_train(frames, signal, encoder, options.steps, seed) for seed in range(options.seeds)]
            cells = [[_error(frames, signal, driver, parts) for driver, _ in runs] for parts in PARTS[signal].values()]
            table.add_row(encoder, *("\n".join(cell) for cell in cells), f"{runs[0][1]:.0f}")
            if encoder == "set":
                trained[signal] = [driver for driver, _ in runs]
        console.print(table)
    console.print(_fusion(frames, trained))


def _synthesised(face: str | None, segments: int, frames_per_segment: int = 12) -> Frames:
    config = DomeConfig(
        face=face, krt=f"{face}/KRT" if face else None, segments=segments, frames_per_segment=frames_per_segment,
        supersampling=1, texture_size=64, image_size_hw=(192, 128),
    )  # fmt: skip
    scene = dome_scene(config)
    frontal = next(camera for camera in scene.cameras if camera.camera_id == scene.frontal_camera_id)
    vertices, keypoints, views, poses, segment_of = [], [], [], [], []
    for index, segment in enumerate(segment_names(segments)):
        for frame in range(frames_per_segment):
            shoot = FrameShoot(config, segment, frame)
            vertices.append(shoot.vertices.ravel())
            keypoints.append(shoot.keypoints())
            views.append(shoot.headset_images()[:, None])
            poses.append(compose(frontal.cam_from_world, shoot.world_from_head))
            segment_of.append(index)
    held_out = np.array(segment_of) % HELD_OUT == HELD_OUT - 1
    mesh = np.array(vertices, np.float64)
    mean = mesh[~held_out].mean(0)
    centred = (mesh - mean)[~held_out]
    # The few frames' inner products have the same components as the many coordinates'.
    variance, weights = (array[..., ::-1][..., :COMPONENTS] for array in np.linalg.eigh(centred @ centred.T))
    axes = centred.T @ weights / np.sqrt(variance)
    scale = np.sqrt(variance / len(centred))
    texture, vertices_mean = np.zeros((3, 32, 32), np.float32), mean.reshape(-1, 3).astype(np.float32)
    context = AvatarContext(
        scene.face.topology,
        Normalization(texture, 1.0, vertices_mean, float(centred.std())),
        camera_ids=("frontal",),
        train_camera_ids=("frontal",),
        headset_cameras=scene.headset.cameras,
        keypoint_names=tuple(scene.face.topology.landmarks),
    )
    count = len(mesh)
    driving = DrivingSignals(
        hmc_images=torch.from_numpy(np.array(views)),
        hmc_present=torch.ones(count, len(scene.headset.cameras), dtype=torch.bool),
        keypoints=torch.from_numpy(np.array(keypoints)),
        frontal_cameras=CameraTensors(
            torch.from_numpy(frontal.intrinsics).float().expand(count, 3, 3),
            torch.from_numpy(np.array(poses)).float(),
        ),
    )
    return Frames(
        context,
        driving,
        torch.from_numpy((mesh - mean) @ axes / scale).float(),
        torch.from_numpy(scale / np.sqrt(len(mean) / 3)).float(),
        torch.from_numpy(np.flatnonzero(~held_out)),
        torch.from_numpy(np.flatnonzero(held_out)),
    )


def _train(frames: Frames, signal: str, encoder: str, steps: int, seed: int) -> tuple[Driver, float]:
    """A driver, and the CPU seconds of its training."""
    config = AvatarConfig(**WIDTHS, **({"driver_subset_dropout": 0.0} if encoder == "whole" else {}))
    torch.manual_seed(seed)
    driver = find_signal(signal).driver(config, frames.context)
    width = config.driver_hidden_size if signal == "hmc" else config.driver_landmark_size
    parts = len(frames.context.headset_cameras if signal == "hmc" else frames.context.keypoint_names)
    rivals: dict[str, Callable[[], nn.Module]] = {
        "mean": lambda: _MaskedMean(width, config.driver_hidden_size),
        "zeros": lambda: _Zeros(parts, width, config.driver_hidden_size),
    }
    if encoder in rivals:
        setattr(driver, "views" if signal == "hmc" else "landmarks", rivals[encoder]())
    driver.measure(_rows(frames.driving, frames.train))
    optimizer = torch.optim.Adam(driver.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    began = time.process_time()
    for _ in range(steps):
        rows = frames.train[torch.randint(len(frames.train), (32,), generator=generator)]
        loss = -driver(_rows(frames.driving, rows), generator).log_prob(frames.y[rows]).mean() / COMPONENTS
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(driver.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return driver, time.process_time() - began


def _rows(driving: DrivingSignals, rows: Tensor) -> DrivingSignals:
    return map_tensors(driving, lambda tensor: tensor[rows])


def _seen(frames: Frames, signal: str, parts: Sequence[str]) -> DrivingSignals:
    """The held-out frames, of one signal only the parts whose names begin so."""
    names = [camera.camera_id for camera in frames.context.headset_cameras]
    if signal == "keypoints":
        names = list(frames.context.keypoint_names)
    limit = {"hmc": "headset_views", "keypoints": "keypoints"}[signal]
    kept = tuple(name for name in names if name.startswith(tuple(parts)))
    config = AvatarConfig(**WIDTHS, **{limit: kept})
    return find_signal(signal).visible(_rows(frames.driving, frames.test), config, frames.context)


@torch.no_grad()
def _error(frames: Frames, signal: str, driver: Driver, parts: Sequence[str]) -> str:
    prior, y = driver(_seen(frames, signal, parts), None), frames.y[frames.test]
    return f"{_rms_mm(frames, prior):.3f} / {-prior.log_prob(y).mean() / COMPONENTS:+.2f}"


def _rms_mm(frames: Frames, prior: DiagonalGaussian) -> float:
    return ((prior.mean - frames.y[frames.test]) * frames.mm).square().sum(-1).mean().sqrt().item()


@torch.no_grad()
def _fusion(frames: Frames, trained: dict[str, list[Driver]]) -> Table:
    """Both drivers at once, mean over seeds: mm, nats a dimension, whitened residual."""
    table = Table(title="hmc with keypoints: mm / nats / whitened, mean over seeds", title_justify="left")
    cases = {
        "all parts": ("all", "all"),
        "eye views, mouth landmarks": ("eyes", "mouth"),
        "only eyes": ("eyes", "eyes"),
    }
    for column in ("", *cases):
        table.add_column(column)
    rows: dict[str, list[str]] = {"hmc": [], "keypoints": [], "product": [], "product / N(0, I)": []}
    present = torch.ones(len(frames.test), dtype=torch.bool)
    for views, landmarks in cases.values():
        shown = {"hmc": PARTS["hmc"][views], "keypoints": PARTS["keypoints"][landmarks]}
        figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rows}
        for seed in range(len(trained["hmc"])):
            experts = {name: trained[name][seed](_seen(frames, name, shown[name]), None) for name in shown}
            product = product_of_gaussians(list(experts.values()), [present, present])
            priors = experts | {"product": product, "product / N(0, I)": _without_standard(product)}
            y = frames.y[frames.test]
            for name, prior in priors.items():
                nats = (-prior.log_prob(y).mean() / COMPONENTS).item()
                figures[name].append((_rms_mm(frames, prior), nats, prior.whiten(y).square().mean().sqrt().item()))
        for name, values in figures.items():
            mm, nats, whitened = np.mean(values, 0)
            rows[name].append(f"{mm:.3f} / {nats:+.2f} / {whitened:.2f}")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _without_standard(product: DiagonalGaussian) -> DiagonalGaussian:
    """The product of two posteriors divided by one N(0, I); where too little precision is left, the product."""
    precision = (-2 * product.log_std).exp()
    left = torch.where(precision > 1.1, precision - 1, precision)
    return DiagonalGaussian(product.mean * precision / left, -0.5 * left.log())


if __name__ == "__main__":
    main()
