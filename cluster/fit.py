"""The fitting job: ``lipflow fit MODEL SHARDS --signal SIGNAL --out DIR`` drives an avatar by what a signal shows.

Runs of frames are Ray tasks. ``DIR`` holds::

    fit.json              what was fitted, and a summary; written last
    frames.json           how the fit of each frame went
    latents.safetensors   z and start (N, D), z_std with uncertainty; the frame ids are in its metadata
    meshes/SEG/FRAME.ply       decoded meshes, mm in the head frame (--meshes)
    uncertainty/SEG/FRAME.npy  (V,) standard deviation of each vertex, mm (uncertainty_samples)
    avatar/               the avatar that the codes belong to
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import numpy as np
import typer
from pydantic import Field
from safetensors.numpy import save

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.recipe import load_recipe
from cluster.records.registry import download_model
from cluster.records.tracking import TrackingConfig, initialise, tracked_run
from cluster.runtime import map_tasks, ray_cluster
from cluster.scores.frame_fits import FittingConfig, FrameFit, RunFit, fit_frames
from cluster.scores.scene import context_of, drivable_signals
from lipflow.checkpoint import load_avatar
from lipflow.config import StrictConfig
from lipflow.errors import ConfigError
from pipeline import storage
from pipeline.loading.loader import ShardSet
from pipeline.sharding.splits import spread

SUMMARY_FILE = "fit.json"
FRAMES_FILE = "frames.json"
LATENTS_FILE = "latents.safetensors"


class FitRecipe(StrictConfig):
    """Settings of a fitting.

    Attributes:
        frames: what is computed of each frame.
        split: of the shard set.
        segments: shell patterns of those of its segments that are fitted; empty: all.
        max_frames: evenly spread over them; None: all of them.
        frames_per_task: fitted side by side in one task; whole segments, where sequences are fitted.
        tracking: where MLflow keeps the run.
    """

    frames: FittingConfig = FittingConfig()
    split: Literal["train", "val", "test"] = "test"
    segments: tuple[str, ...] = ()
    max_frames: int | None = Field(None, gt=0)
    frames_per_task: int = Field(8, gt=0)
    tracking: TrackingConfig = TrackingConfig()


@dataclass(frozen=True)
class FitSummary:
    """What the job came to.

    Attributes:
        out: URI of the output.
        model: as it was named.
        method: the avatar's.
        signals: that were fitted.
        shards: URI of the shard set.
        shards_digest: its digest.
        frames: how many.
        unseen: of them show nothing of the signals, so that their answers are the prior's.
        converged: of them stopped because nothing was left to gain.
        diverged: of them ended at their best point before the objective was not finite any more.
        mean_iterations: over the frames.
        mean_observed_start: L_obs at the start, over the frames.
        mean_observed: L_obs at the answers.
        mean_relative_decrease: of the objective.
        vertex_std_mm: mean over the frames; None without uncertainty.
        seconds_per_frame: of fitting, without reading and writing.
        run_id: the MLflow run.
    """

    out: str
    model: str
    method: str
    signals: tuple[str, ...]
    shards: str
    shards_digest: str
    frames: int
    unseen: int
    converged: int
    diverged: int
    mean_iterations: float
    mean_observed_start: float
    mean_observed: float
    mean_relative_decrease: float
    vertex_std_mm: float | None
    seconds_per_frame: float
    run_id: str


def fit_model(model: str, shards_uri: str, signals: Sequence[str], out_uri: str, recipe: FitRecipe) -> FitSummary:
    """Fit an avatar to driving signals.

    Args:
        model: a path, ``file://``, ``s3://``, ``models:/`` or ``runs:/`` URI of an avatar.
        shards_uri: the shard set that holds the signals.
        signals: one, or several that are fitted at once.
        out_uri: where the results go.
        recipe: the settings.

    Raises:
        LipflowError: no such model, shard set, signal or segment, or they do not fit one another; ``out_uri`` not
            writable; a frame whose objective is not finite.
    """
    shards_uri, out_uri = storage.normalize_uri(shards_uri), storage.normalize_uri(out_uri)
    shards = ShardSet.open(shards_uri)
    frame_ids = _chosen_frames(shards, recipe)
    storage.check_writable(out_uri)
    initialise(recipe.tracking)
    with tempfile.TemporaryDirectory() as folder:
        local = download_model(model, Path(folder, "avatar"), recipe.tracking)
        avatar = load_avatar(local)
        chosen = drivable_signals(avatar, signals, "--signal")
        avatar.context.require_same_capture(context_of(shards), chosen, cameras=False)
        summary_uri = storage.join(out_uri, SUMMARY_FILE)
        if storage.exists(summary_uri):
            storage.delete(summary_uri)
        avatar_uri = storage.join(out_uri, "avatar")
        storage.upload_dir(local, avatar_uri)
    with (
        tracked_run(
            "fit", f"fit-{'-'.join(chosen)}", config=recipe.tracking, recipe=recipe, shards_digest=shards.digest
        ) as run,
        ray_cluster(),
    ):
        runs: list[RunFit] = map_tasks(
            fit_frames,
            [(avatar_uri, shards_uri, out_uri, recipe.frames, chosen, part) for part in _parts(frame_ids, recipe)],
            description=f"fit {', '.join(chosen)}",
        )
        frames = [frame for part in runs for frame in part.frames]
        spreads = [frame.vertex_std_mm for frame in frames if frame.vertex_std_mm is not None]
        summary = FitSummary(
            out=out_uri,
            model=model,
            method=avatar.config.method,
            signals=chosen,
            shards=shards_uri,
            shards_digest=shards.digest,
            frames=len(frames),
            unseen=sum(not frame.shown for frame in frames),
            converged=sum(frame.converged for frame in frames),
            diverged=sum(frame.stopped == "not finite" for frame in frames),
            mean_iterations=fmean(frame.iterations for frame in frames),
            mean_observed_start=fmean(frame.observed_start for frame in frames),
            mean_observed=fmean(frame.observed for frame in frames),
            mean_relative_decrease=fmean(frame.relative_decrease for frame in frames),
            vertex_std_mm=fmean(spreads) if spreads else None,
            seconds_per_frame=sum(part.seconds for part in runs) / len(frames),
            run_id=run.run_id,
        )
        run.set_tags({"lipflow.model": model})
        run.log_metrics({name: value for name, value in asdict(summary).items() if isinstance(value, int | float)})
        run.log_table([asdict(frame) for frame in frames], FRAMES_FILE)
    _write(out_uri, summary, frames, runs)
    return summary


def _write(out_uri: str, summary: FitSummary, frames: Sequence[FrameFit], runs: Sequence[RunFit]) -> None:
    tensors = {name: np.concatenate([getattr(part, name) for part in runs]) for name in ("z", "start")}
    spreads = [part.z_std for part in runs if part.z_std is not None]
    if spreads:
        tensors["z_std"] = np.concatenate(spreads)
    named = {"frame_ids": json.dumps([frame.frame_id for frame in frames])}
    storage.write_bytes(storage.join(out_uri, LATENTS_FILE), save(tensors, metadata=named))
    rows = json.dumps([asdict(frame) for frame in frames])
    storage.write_bytes(storage.join(out_uri, FRAMES_FILE), rows.encode())
    storage.write_bytes(storage.join(out_uri, SUMMARY_FILE), json.dumps(asdict(summary)).encode())


def _chosen_frames(shards: ShardSet, recipe: FitRecipe) -> list[str]:
    found = shards.frame_ids(recipe.split)
    if not found:
        raise ConfigError(f"{shards.uri} has no {recipe.split} frames: choose another split with --split")
    segments = list(dict.fromkeys(_segment(frame_id) for frame_id in found))
    for pattern in recipe.segments:
        if not any(fnmatchcase(segment, pattern) for segment in segments):
            raise ConfigError(
                f"no segment of the {recipe.split} split is like {pattern!r}; those are {', '.join(segments)}"
            )
    chosen = [
        frame_id
        for frame_id in found
        if not recipe.segments or any(fnmatchcase(_segment(frame_id), pattern) for pattern in recipe.segments)
    ]
    return spread(chosen, recipe.max_frames)


def _parts(frame_ids: Sequence[str], recipe: FitRecipe) -> list[list[str]]:
    """One task each: a number of frames, or a segment in the order of time."""
    if recipe.frames.sequences:
        return [list(frames) for _, frames in groupby(frame_ids, key=_segment)]
    size = recipe.frames_per_task
    return [list(frame_ids[start : start + size]) for start in range(0, len(frame_ids), size)]


def _segment(frame_id: str) -> str:
    return frame_id.split("/")[0]


def fit_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Avatar: path, s3://, models:/ or runs:/ URI.")],
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Shard set: path, file:// or s3:// URI.")],
    signal: Annotated[
        list[str],
        typer.Option("--signal", metavar="hmc|frontal|keypoints", help="To drive by; repeatable: several at once."),
    ],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where codes, meshes and the report go.")],
    split: Annotated[str | None, typer.Option(help="train, val or test. Default: test.")] = None,
    segment: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Segments to fit; repeatable, default all.")
    ] = None,
    sequences: Annotated[
        bool | None, typer.Option("--sequences/--frames", help="Follow segments through time. Default: frames.")
    ] = None,
    meshes: Annotated[bool | None, typer.Option("--meshes/--no-meshes", help="Write PLY meshes. Default: no.")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Drive an avatar: latent codes, meshes and their uncertainty from a driving signal."""
    given = {"split": split, "segments": segment or None, "frames.sequences": sequences, "frames.meshes": meshes}
    overrides = [f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    summary = fit_model(model, shards, signal, out, load_recipe(FitRecipe, recipe, [*overrides, *(set_ or ())]))
    sure = "" if summary.vertex_std_mm is None else f", sure to {summary.vertex_std_mm:.2f} mm"
    unseen = f", {summary.unseen} of them without a signal" if summary.unseen else ""
    command.emit(
        asdict(summary),
        as_json,
        f"{summary.out}: {summary.frames} frames fitted to {', '.join(summary.signals)}{unseen}; L_obs "
        f"{summary.mean_observed_start:.4g} -> {summary.mean_observed:.4g} in {summary.mean_iterations:.1f} "
        f"iterations, {summary.converged} converged, {summary.diverged} diverged{sure}, "
        f"{summary.seconds_per_frame:.2f} s a frame",
    )


if __name__ == "__main__":
    command.run_job("cluster.fit", "fit_command")
