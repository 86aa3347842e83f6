"""What one task of ``lipflow fit`` computes: the latent codes of a few frames, how they were found, and how sure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from trimesh import Trimesh
from trimesh.exchange.ply import export_ply

from cluster.scores.scene import open_scene
from lipflow.config import FitConfig, RenderConfig, StrictConfig
from lipflow.fitting import FitResult, fit, fit_sequence, posterior, vertex_std_mm
from lipflow.model.avatar import Avatar
from pipeline import storage

MESH_FOLDER = "meshes"
UNCERTAINTY_FOLDER = "uncertainty"


class FittingConfig(StrictConfig):
    """What is computed of each frame.

    Attributes:
        fit: the inference-time optimisation.
        render: how images are drawn; best as in the training.
        sequences: frames of a segment are fitted one after another, each from the better of the avatar's own start
            and the answer before it; otherwise side by side.
        meshes: decoded meshes are written, too.
        uncertainty_samples: of the posterior, over which the spread of vertices and codes is taken; 0: no uncertainty.
        uncertainty_directions: of latent space along which the signal's information is measured, at two renderings
            each; what is not measured keeps the prior's spread.
        seed: of the samples.
    """

    fit: FitConfig = FitConfig()
    render: RenderConfig = RenderConfig()
    sequences: bool = False
    meshes: bool = False
    uncertainty_samples: int = Field(0, ge=0)
    uncertainty_directions: int = Field(8, ge=0)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> FittingConfig:
        if self.uncertainty_samples == 1:
            raise ValueError("uncertainty_samples is 1, and one sample has no spread: use 0 for none, or 2 and more")
        if self.uncertainty_samples and self.fit.prior_weight == 0:
            raise ValueError(
                "uncertainty_samples asks for a posterior, and fit.prior_weight is 0: give it a positive weight"
            )
        if self.fit.temporal_weight > 0 and not self.sequences:
            raise ValueError("fit.temporal_weight draws to the frame before, so it needs sequences=true")
        return self


@dataclass(frozen=True)
class FrameFit:
    """How the fit of one frame went.

    Attributes:
        frame_id: ``"SEGMENT/FRAME"``.
        shown: the fitted signals that show anything in this frame; without any, the answer is the prior's.
        iterations: that it took.
        stopped: why there were no more.
        converged: whether it stopped because nothing was left to gain.
        from_previous: whether it started at the answer of the frame before it.
        objective_start: at the start.
        objective: at the answer.
        observed_start: L_obs at the start.
        observed: L_obs at the answer.
        relative_decrease: of the objective, in shares of its size at the start.
        gradient_norm: of the objective at the answer.
        vertex_std_mm: RMS over the vertices of their spread under the posterior; None if it was not asked for.
    """

    frame_id: str
    shown: tuple[str, ...]
    iterations: int
    stopped: str
    converged: bool
    from_previous: bool
    objective_start: float
    objective: float
    observed_start: float
    observed: float
    relative_decrease: float
    gradient_norm: float
    vertex_std_mm: float | None


@dataclass(frozen=True)
class RunFit:
    """What one task brings back.

    Attributes:
        frames: how each fit went.
        z: ``(N, D)`` float32.
        start: ``(N, D)`` float32.
        z_std: ``(N, D)`` float32 over samples of the posterior; None if it was not asked for.
        seconds: spent in fitting.
    """

    frames: list[FrameFit]
    z: np.ndarray
    start: np.ndarray
    z_std: np.ndarray | None
    seconds: float


def fit_frames(
    avatar_uri: str,
    shards_uri: str,
    out_uri: str,
    config: FittingConfig,
    signals: tuple[str, ...],
    frame_ids: Sequence[str],
) -> RunFit:
    """Fit a few frames; meshes and the vertices' spread are written to ``out_uri``, the rest is brought back.

    With ``config.sequences`` the frames are those of whole segments, each in the order of time.
    """
    scene = open_scene(avatar_uri, shards_uri, config.render)
    avatar, renderer, shards = scene.avatar, scene.renderer, scene.shards
    # One camera is enough to read the driving signals.
    driving = shards.frames(list(frame_ids), shards.train_camera_ids[:1], signals).driving
    if config.sequences:
        lengths = [len(list(frames)) for _, frames in groupby(frame_ids, key=lambda frame_id: frame_id.split("/")[0])]
        fitted = fit_sequence(avatar, renderer, driving, signals, config.fit, lengths)
    else:
        fitted = fit(avatar, renderer, driving, signals, config.fit)
    spread_mm, z_std = None, None
    if config.uncertainty_samples:
        beliefs = posterior(avatar, renderer, driving, signals, fitted.z, config.fit, config.uncertainty_directions)
        count = config.uncertainty_samples
        spread_mm = vertex_std_mm(avatar, beliefs, count, torch.Generator().manual_seed(config.seed)).numpy()
        with torch.no_grad():
            samples = beliefs.sample(avatar, count, torch.Generator().manual_seed(config.seed))
        z_std = samples.std(0).numpy()
    _write_arrays(out_uri, avatar, frame_ids, fitted.z, spread_mm, meshes=config.meshes)
    shown = {name: avatar.presence(name, driving).tolist() for name in signals}
    rows = _rows(frame_ids, fitted, shown, spread_mm)
    return RunFit(rows, fitted.z.numpy(), fitted.start.numpy(), z_std, fitted.seconds)


def _write_arrays(
    out_uri: str, avatar: Avatar, frame_ids: Sequence[str], z: Tensor, spread_mm: np.ndarray | None, *, meshes: bool
) -> None:
    for index, frame_id in enumerate(frame_ids):
        if meshes:
            with torch.no_grad():
                vertices = avatar.decode_vertices(z[index : index + 1])[0].numpy()
            mesh = Trimesh(vertices, avatar.context.topology.faces, process=False)
            storage.write_bytes(storage.join(out_uri, MESH_FOLDER, f"{frame_id}.ply"), export_ply(mesh))
        if spread_mm is not None:
            body = io.BytesIO()
            np.save(body, spread_mm[index].astype(np.float32))
            storage.write_bytes(storage.join(out_uri, UNCERTAINTY_FOLDER, f"{frame_id}.npy"), body.getvalue())


def _rows(
    frame_ids: Sequence[str],
    fitted: FitResult,
    shown: Mapping[str, Sequence[bool]],
    spread_mm: np.ndarray | None,
) -> list[FrameFit]:
    converged = fitted.converged.tolist()
    return [
        FrameFit(
            frame_id=frame_id,
            shown=tuple(name for name, frames in shown.items() if frames[row]),
            iterations=int(fitted.iterations[row]),
            stopped=fitted.stopped[row],
            converged=converged[row],
            from_previous=bool(fitted.from_previous[row]),
            objective_start=fitted.trace[0, row].item(),
            objective=fitted.objective[row].item(),
            observed_start=fitted.observed_trace[0, row].item(),
            observed=fitted.observed[row].item(),
            relative_decrease=fitted.relative_decrease[row].item(),
            gradient_norm=fitted.gradient_norm[row].item(),
            vertex_std_mm=None if spread_mm is None else float(np.sqrt(np.mean(spread_mm[row] ** 2))),
        )
        for row, frame_id in enumerate(frame_ids)
    ]
