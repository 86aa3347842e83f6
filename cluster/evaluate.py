"""The evaluation job: ``lipflow evaluate MODEL SHARDS --out DIR``.

Two tables. *Quadrants*: the encoder's reconstructions on {training, held-out} cameras x {training, held-out}
expressions. *Fitted latents*: for each driving signal, held-out expressions driven by it alone, before and after the
fit, compared with all training cameras but the frontal one. ``DIR`` holds::

    evaluation.json   the tables, with bootstrap intervals over frames; written last
    scores.json       one row for each frame, latent and camera set
    latents.json      the fitted latents
    pictures/         photo | reconstruction | error
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.evaluation import Evaluation, as_document, picture_sheets, png_bytes, table_rows
from cluster.recipe import load_recipe
from cluster.registry import download_model, record_evaluation, registered_version
from cluster.runtime import map_tasks, ray_cluster
from cluster.scoring import (
    FrameScore,
    Picture,
    TaskResult,
    calibrate_colors,
    score_fits,
    score_reconstructions,
    scored_cameras,
)
from cluster.tracking import TrackingConfig, initialise, tracked_run
from lipflow.checkpoint import load_avatar
from lipflow.config import FitConfig, RenderConfig, Signal, StrictConfig
from lipflow.errors import ConfigError
from lipflow.model.avatar import Avatar
from pipeline import storage
from pipeline.loading.loader import ShardSet
from pipeline.sharding.splits import spread

EVALUATION_FILE = "evaluation.json"


class EvaluateRecipe(StrictConfig):
    """Settings of an evaluation.

    Attributes:
        fit: of the inference-time optimisation.
        render: how images are drawn; best as in the training.
        signals: to drive with; None: all that the shard set offers.
        max_frames: scored in each of the two expression splits, evenly spread; None: all of them.
        max_cameras: training cameras that are scored, evenly spread; None: all but the frontal one.
        frames_per_task: fitted side by side in one task.
        calibration_segment: training segment on which held-out cameras' colours are solved; None: the first one.
        calibration_frames: taken from it.
        picture_frames: held-out frames shown in pictures.
        tracking: where MLflow keeps the run.
    """

    fit: FitConfig = FitConfig()
    render: RenderConfig = RenderConfig()
    signals: tuple[Signal, ...] | None = None
    max_frames: int | None = Field(None, gt=0)
    max_cameras: int | None = Field(None, gt=0)
    frames_per_task: int = Field(8, gt=0)
    calibration_segment: str | None = None
    calibration_frames: int = Field(4, gt=0)
    picture_frames: int = Field(2, ge=0)
    tracking: TrackingConfig = TrackingConfig()


def evaluate(
    model: str, shards_uri: str, out_uri: str, recipe: EvaluateRecipe, *, parent_run: str | None = None
) -> Evaluation:
    """Score an avatar on a shard set.

    Args:
        model: a path, ``file://``, ``s3://``, ``models:/`` or ``runs:/`` URI of an avatar.
        shards_uri: the shard set.
        out_uri: where tables and pictures go.
        recipe: the settings.
        parent_run: the training run, for MLflow's links.

    Raises:
        LipflowError: no such model or shard set, or one that does not fit the other; ``out_uri`` not writable.
    """
    shards_uri, out_uri = storage.normalize_uri(shards_uri), storage.normalize_uri(out_uri)
    shards = ShardSet.open(shards_uri)
    storage.check_writable(out_uri)
    initialise(recipe.tracking)
    with tempfile.TemporaryDirectory() as folder:
        local = download_model(model, Path(folder, "avatar"), recipe.tracking)
        avatar = load_avatar(local)
        method, signals = avatar.config.method, _driving_signals(avatar, shards, recipe)
        avatar_uri = storage.join(out_uri, "avatar")
        storage.upload_dir(local, avatar_uri)
    held_out, seen = (spread(shards.frame_ids(split), recipe.max_frames) for split in ("test", "train"))
    if not held_out:
        raise ConfigError(f"{shards_uri} has no test frames: hold segments out when sharding (splits)")
    segment = _calibration_segment(shards, recipe)
    pictured = spread(held_out, recipe.picture_frames)
    with (
        tracked_run(
            "evaluate",
            f"evaluate-{method}",
            config=recipe.tracking,
            recipe=recipe,
            shards_digest=shards.digest,
            parent_run=parent_run,
        ) as run,
        ray_cluster(),
    ):
        calibration = [frame for frame in shards.frame_ids("train") if frame.split("/")[0] == segment]
        calibration = spread(calibration, recipe.calibration_frames)
        (colors,) = map_tasks(
            calibrate_colors,
            [(avatar_uri, shards_uri, recipe.render, calibration)],
            description="calibrate held-out cameras",
        )
        cameras = scored_cameras(shards, recipe.max_cameras)
        result = _score_all(
            avatar_uri, shards_uri, seen + held_out, held_out, cameras, signals, recipe, colors, pictured
        )
        evaluation = Evaluation(
            method=method,
            rows=tuple(table_rows(result.scores, set(held_out))),
            calibration_segment=segment,
            fit_traces=result.traces,
            fit_seconds={signal: seconds / len(held_out) for signal, seconds in result.seconds.items()},
            run_id=run.run_id,
            shards_digest=shards.digest,
            pictures=tuple(result.pictures),
        )
        run.log_metrics(evaluation.metrics())
        run.log_table([asdict(score) for score in result.scores], "scores.json")
        latents = [{"latent": latent, "frame_id": frame_id, "z": z} for (latent, frame_id), z in result.latents.items()]
        run.log_table(latents, "latents.json")
        sheets = picture_sheets({method: evaluation})
        for name, sheet in sheets.items():
            run.log_image(sheet, f"pictures/{name}.png")
        if model.startswith("models:/"):
            record_evaluation(
                registered_version(model, recipe.tracking),
                run,
                metrics=evaluation.metrics(),
                shards_digest=shards.digest,
            )
    for name, sheet in sheets.items():
        storage.write_bytes(storage.join(out_uri, "pictures", f"{name}.png"), png_bytes(sheet))
    for name, rows in (("scores.json", [asdict(score) for score in result.scores]), ("latents.json", latents)):
        storage.write_bytes(storage.join(out_uri, name), json.dumps(rows).encode())
    storage.write_bytes(storage.join(out_uri, EVALUATION_FILE), json.dumps(as_document(evaluation)).encode())
    return evaluation


@dataclass
class _Collected:
    scores: list[FrameScore]
    latents: dict[tuple[str, str], list[float]]
    pictures: list[Picture]
    traces: dict[str, list[float]]
    seconds: dict[str, float]


def _score_all(
    avatar_uri: str,
    shards_uri: str,
    frame_ids: Sequence[str],
    held_out: Sequence[str],
    cameras: Sequence[str],
    signals: Sequence[str],
    recipe: EvaluateRecipe,
    colors: Any,
    pictured: Sequence[str],
) -> _Collected:
    """Every frame's reconstruction and every held-out frame's fit, as one map of Ray tasks."""
    size = recipe.frames_per_task
    fits = [(signal, held_out[start : start + size]) for signal in signals for start in range(0, len(held_out), size)]
    tasks: list[tuple] = [
        ("fit", (avatar_uri, shards_uri, recipe.render, frames, cameras, signal, recipe.fit, pictured))
        for signal, frames in fits
    ]
    tasks += [
        (
            "reconstruction",
            (avatar_uri, shards_uri, recipe.render, frame_ids[start : start + size], cameras, colors, pictured),
        )
        for start in range(0, len(frame_ids), size)
    ]
    results: list[TaskResult] = map_tasks(_run_task, tasks, description="score frames")
    collected = _Collected([], {}, [], {}, {})
    for result in results:
        collected.scores += result.scores
        collected.latents |= result.latents
        collected.pictures += result.pictures
    for (signal, frames), result in zip(fits, results, strict=False):
        share = len(frames) / len(held_out)
        before = collected.traces.get(signal, [0.0] * len(result.trace))
        collected.traces[signal] = [a + share * b for a, b in zip(before, result.trace, strict=True)]
        collected.seconds[signal] = collected.seconds.get(signal, 0.0) + result.seconds
    return collected


def _run_task(kind: str, arguments: tuple) -> TaskResult:
    return score_fits(*arguments) if kind == "fit" else score_reconstructions(*arguments)


def _driving_signals(avatar: Avatar, shards: ShardSet, recipe: EvaluateRecipe) -> tuple[str, ...]:
    """The signals to drive with; ConfigError if the avatar is of another capture or lacks one that is asked for."""
    expected, found = avatar.context.topology.num_vertices, shards.topology.num_vertices
    if expected != found or list(avatar.context.camera_ids) != [camera.camera_id for camera in shards.cameras]:
        raise ConfigError(
            f"the avatar was made for {expected} vertices and {len(avatar.context.camera_ids)} cameras, the shard set "
            f"has {found} vertices and {len(shards.cameras)} cameras, or others: give a shard set of the same capture"
        )
    # A prior N(0, I) needs no driver: it is fitted to whatever the capture shows.
    possible = avatar.signals if avatar.config.has_drivers else avatar.context.offered_signals
    lacking = [signal for signal in recipe.signals or () if signal not in possible]
    if lacking:
        raise ConfigError(f"signals: the avatar cannot be driven by {', '.join(lacking)}, but by {list(possible)}")
    return recipe.signals or possible


def _calibration_segment(shards: ShardSet, recipe: EvaluateRecipe) -> str:
    segments = list(dict.fromkeys(frame_id.split("/")[0] for frame_id in shards.frame_ids("train")))
    if recipe.calibration_segment is None:
        return segments[0]
    if recipe.calibration_segment not in segments:
        raise ConfigError(
            f"calibration_segment {recipe.calibration_segment!r} is no training segment; those are {segments}"
        )
    return recipe.calibration_segment


def evaluate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Avatar: path, s3://, models:/ or runs:/ URI.")],
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Shard set: path, file:// or s3:// URI.")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where tables and pictures go.")],
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score an avatar: four quadrants, and latents fitted to each driving signal."""
    evaluation = evaluate(model, shards, out, load_recipe(EvaluateRecipe, recipe, set_ or ()))
    lines = [
        f"{row.latent:>10} {row.iterations:>4} it  {row.cameras:>8} cameras  {row.expressions:>8} expressions  "
        f"{'calibrated' if row.calibrated else '':>10}  {row.psnr_db.mean:6.2f} dB  "
        f"{row.geometry_rmse_mm.mean:6.3f} mm"
        for row in evaluation.rows
    ]
    command.emit(as_document(evaluation), as_json, "\n".join(lines))


if __name__ == "__main__":
    command.run_job("cluster.evaluate", "evaluate_command")
