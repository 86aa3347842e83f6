"""The figures of the science study. Pictures show the procedural head alone; curves may be of any face."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from science_findings import Findings
from science_tables import by_seed, in_order, where
from torch.nn.functional import avg_pool2d

from lipflow.checkpoint import load_avatar
from lipflow.render.renderer import Renderer
from lipflow.sampling import draw_latents
from lipflow.types import DRIVING_SIGNALS, map_tensors
from pipeline.loading.loader import ShardSet

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

_DPI = 130
_FACES_PER_ROW = 8
_OVERSAMPLING = 3
_BESIDE = 0.12
_AMBIGUOUS_NAMES = {"hmc": "eyes only", "keypoints": "5 keypoints"}


def draw_curves(found: Findings, folder: Path) -> None:
    """``fit_iterations.png`` and ``signals.png``."""
    _fit_iterations(found).savefig(folder / "fit_iterations.png", dpi=_DPI)
    _signals(found).savefig(folder / "signals.png", dpi=_DPI)
    plt.close("all")


def draw_random_faces(portrayed: dict[str, str], scratch: Path, folder: Path) -> None:
    """``prior_samples.png``: faces of each method's prior; ``portrayed`` maps methods to avatars."""
    _prior_samples(portrayed, scratch).savefig(folder / "prior_samples.png", dpi=_DPI)
    plt.close("all")


def _fit_iterations(found: Findings) -> plt.Figure:
    """Error on held-out expressions over fit iterations, by method and signal; bands are the seeds' range."""
    figure, axes = plt.subplots(2, len(DRIVING_SIGNALS), figsize=(10, 5.4), sharex=True, layout="constrained")
    counts = sorted({row["iterations"] for row in found.fits})
    for row, (key, label) in enumerate((("image_mse", "image MSE"), ("geometry_rmse_mm", "geometry RMSE, mm"))):
        for axis, signal in zip(axes[row], DRIVING_SIGNALS, strict=True):
            for method in in_order(entry["method"] for entry in found.fits):
                own = sorted({row["iterations"] for row in where(found.fits, method=method, latent=signal)})
                if not own:
                    continue
                seeds = torch.stack(
                    [
                        by_seed(where(found.fits, method=method, latent=signal, iterations=count), key).mean(1)
                        for count in own
                    ]
                )
                (line,) = axis.plot(own, seeds.mean(1), marker="o", markersize=3, label=method)
                axis.fill_between(own, seeds.amin(1), seeds.amax(1), color=line.get_color(), alpha=0.2, linewidth=0)
            axis.set_xscale("symlog", linthresh=10, base=10)
            axis.set_xticks(counts, [str(count) for count in counts])
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.25)
            if row == 0:
                axis.set_title(signal)
            else:
                axis.set_xlabel("fit iterations")
        axes[row, 0].set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _signals(found: Findings) -> plt.Figure:
    """Energy score of p(z | h) against what the signal leaves open."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    places = in_order((row["shown"], row["signal"]) for row in found.uncertainty)
    for position, method in enumerate(in_order(row["method"] for row in found.uncertainty)):
        heights = []
        for shown, signal in places:
            rows = where(found.uncertainty, method=method, shown=shown, signal=signal)
            heights.append(float(by_seed(rows, "energy_mm").mean()) if rows else float("nan"))
        beside = [place + _BESIDE * (position - 1) for place in range(len(places))]
        axis.plot(beside, heights, marker="o", linestyle="none", label=method)
    names = [signal if shown == "all" else _AMBIGUOUS_NAMES[signal] for shown, signal in places]
    axis.set_xticks(range(len(places)), names)
    axis.set_ylabel("energy score of driven meshes, mm")
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axis.grid(alpha=0.25)
    if places:
        axis.legend(frameon=False)
    return figure


@torch.no_grad()
def _prior_samples(rows: dict[str, str], scratch: Path) -> plt.Figure:
    """Random faces of each method's prior without a signal, one row each."""
    opened = ShardSet.open(str(scratch / "dome" / "shards"))
    camera = opened.frontal_camera_id or opened.train_camera_ids[0]
    batch = opened.frames(opened.frame_ids("test")[:1], [camera])
    renderer = Renderer(opened.topology)
    height, width = (_OVERSAMPLING * size for size in batch.images.shape[-2:])
    zoom = torch.tensor([_OVERSAMPLING, _OVERSAMPLING, 1.0])[:, None]
    figure, axes = plt.subplots(len(rows), _FACES_PER_ROW, figsize=(10, 1.9 * len(rows)), layout="constrained")
    for line, (method, name) in zip(np.atleast_2d(axes), rows.items(), strict=True):
        avatar = load_avatar(scratch / "avatars" / name)
        z = draw_latents(avatar, _FACES_PER_ROW, torch.Generator().manual_seed(0))
        for place, axis in enumerate(line):
            cameras = map_tensors(batch.cameras, lambda tensor: tensor)
            decoded = avatar.decode(z[place : place + 1], cameras.view_vectors())
            cameras.intrinsics = cameras.intrinsics * zoom
            image = renderer.render(decoded.vertices, decoded.textures, cameras, (height, width)).image[0]
            small = avg_pool2d(image, _OVERSAMPLING)[0].permute(1, 2, 0).clamp(0, 255)
            axis.imshow(small.round().to(torch.uint8).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(method)
    return figure
