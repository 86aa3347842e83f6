"""The evaluation job: ``lipflow evaluate MODEL... SHARDS --out DIR``.

Two protocols (:mod:`cluster.scores.protocols`), both unless one is asked for: *multiface*, the encoder's
reconstructions on {training, held-out} cameras x {training, held-out} expressions, and *lipflow*, held-out expressions
driven by one signal each, after several numbers of fit iterations, compared with all training cameras but the
frontal one. ``DIR`` holds::

    report.html                 tables, pictures and curves on one page
    tables.md, tables/*.csv     the tables
    evaluation.json             the tables and all else; written last
    scores.json                 one row for each frame, latent and camera set: all that tables are computed from
    latents.json                the fitted latents
    pictures/, failures/        photo | reconstruction | error: chosen frames, and the worst ones

Several models, ``NAME=MODEL`` to name them, are evaluated one after the other on the same frames, each in ``DIR/NAME``,
and ``DIR`` holds the tables of all. Models of one name are seeds of one variant.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Self

import typer
from pydantic import Field, model_validator

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.compare import called, named, refuse_namesakes
from cluster.recipe import load_recipe
from cluster.records.evaluations import log_scores, record_evaluation
from cluster.records.registry import download_model, registered_version, run_of
from cluster.records.tracking import MODEL_TAG, TrackingConfig, initialise, tracked_run
from cluster.reports.evaluation_report import Comparison, compared, write_comparison
from cluster.reports.gallery import failure_sheets, picture_sheets, worst_frames
from cluster.runtime import map_tasks, ray_cluster
from cluster.scores.evaluation import Evaluation, as_document, evaluation_rows, png_bytes
from cluster.scores.evaluation_tasks import EvaluationPlan, draw, score_all
from cluster.scores.protocols import Protocol
from cluster.scores.scene import context_of, drivable_signals
from cluster.scores.scoring import calibrate_colors, held_out_cameras, scored_cameras
from cluster.scores.sheet import SCORES_FILE, ScoreSheet
from cluster.scores.tables import IntervalUnit
from lipflow.checkpoint import load_avatar
from lipflow.config import FitConfig, RenderConfig, Signal, StrictConfig
from lipflow.errors import ConfigError
from lipflow.model.avatar import Avatar
from pipeline import storage
from pipeline.loading.loader import ShardSet
from pipeline.sharding.splits import spread

PROTOCOL_ITERATIONS = (0, 10, 50, 200)
"""Fit iterations of the protocol ``lipflow``."""


class EvaluateRecipe(StrictConfig):
    """Settings of an evaluation.

    Attributes:
        protocol: ``multiface``, ``lipflow``, or None for both.
        fit: of the inference-time optimisation; its ``iterations`` give way to ``fit_iterations``.
        fit_iterations: after which the fits are scored; None: 0, 10, 50 and 200 in the protocol ``lipflow``, else 0
            and ``fit.iterations``.
        render: how images are drawn; best as in the training.
        signals: to drive with; None: all that the shard set offers.
        max_frames: scored in each of the two expression splits, evenly spread; None: all of them.
        consecutive: frames are chosen in runs of so many neighbours; jitter needs at least 3.
        max_cameras: training cameras that are scored, evenly spread; None: all but the frontal one.
        frames_per_task: fitted side by side in one task.
        calibration_segment: training segment on which held-out cameras' colours are solved; None: the first one of
            each capture.
        calibration_frames: taken from each.
        intervals: resample whole ``segment`` or single ``frame``; ``auto``: segments from 8 held-out ones on.
        baseline: name of the variant whose errors ratios are over; None: the first.
        picture_frames: held-out frames shown in pictures.
        failure_frames: worst frames shown for each latent and metric.
        tracking: where MLflow keeps the run.
    """

    protocol: Protocol | None = None
    fit: FitConfig = FitConfig()
    fit_iterations: tuple[int, ...] | None = Field(None, min_length=1)
    render: RenderConfig = RenderConfig()
    signals: tuple[Signal, ...] | None = None
    max_frames: int | None = Field(None, gt=0)
    consecutive: int = Field(1, gt=0)
    max_cameras: int | None = Field(None, gt=0)
    frames_per_task: int = Field(8, gt=0)
    calibration_segment: str | None = None
    calibration_frames: int = Field(4, gt=0)
    intervals: IntervalUnit = "auto"
    baseline: str | None = None
    picture_frames: int = Field(2, ge=0)
    failure_frames: int = Field(2, ge=0)
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fit_iterations is not None and sorted(set(self.fit_iterations)) != list(self.fit_iterations):
            raise ValueError(f"fit_iterations is {self.fit_iterations}: list each number once, in ascending order")
        if self.fit_iterations is not None and self.fit_iterations[0] < 0:
            raise ValueError(f"fit_iterations is {self.fit_iterations}: numbers of iterations are at least 0")
        if self.max_frames is not None and self.consecutive > self.max_frames:
            raise ValueError(f"consecutive is {self.consecutive}, more than max_frames {self.max_frames}: lower it")
        return self

    @property
    def scored_iterations(self) -> tuple[int, ...]:
        """After which the fits are scored."""
        if self.fit_iterations is not None:
            return self.fit_iterations
        return PROTOCOL_ITERATIONS if self.protocol == "lipflow" else tuple(sorted({0, self.fit.iterations}))


def evaluate(
    model: str,
    shards_uri: str,
    out_uri: str,
    recipe: EvaluateRecipe,
    *,
    name: str | None = None,
    parent_run: str | None = None,
) -> Evaluation:
    """Score an avatar on a shard set.

    Args:
        model: a path, ``file://``, ``s3://``, ``models:/`` or ``runs:/`` URI of an avatar.
        shards_uri: the shard set.
        out_uri: where tables and pictures go.
        recipe: the settings.
        name: of the variant in tables; None: its method.
        parent_run: the training run, for MLflow's links; None: that of a ``models:/`` or ``runs:/`` URI.

    Raises:
        LipflowError: no such model or shard set, or one that does not fit the other; ``out_uri`` not writable.
    """
    shards_uri, out_uri = storage.normalize_uri(shards_uri), storage.normalize_uri(out_uri)
    shards = ShardSet.open(shards_uri)
    storage.check_writable(out_uri)
    initialise(recipe.tracking)
    version = None
    if model.startswith("models:/"):
        # An alias may move while this runs.
        version = registered_version(model, recipe.tracking)
        model, parent_run = version.uri, parent_run or version.run_id
    elif model.startswith("runs:/"):
        parent_run = parent_run or run_of(model)
    with tempfile.TemporaryDirectory() as folder:
        local = download_model(model, Path(folder, "avatar"), recipe.tracking)
        avatar = load_avatar(local)
        method, signals = avatar.config.method, _driving_signals(avatar, shards, recipe)
        avatar_uri = storage.join(out_uri, "avatar")
        storage.upload_dir(local, avatar_uri)
    plan = _plan(avatar_uri, shards, recipe, signals)
    segments = calibration_segments(shards, recipe)
    shown = spread(plan.held_out_frames, recipe.picture_frames)
    with (
        tracked_run(
            "evaluate",
            f"evaluate-{name or method}",
            config=recipe.tracking,
            recipe=recipe,
            tags={MODEL_TAG: model},
            shards_digest=shards.digest,
            parent_run=parent_run,
        ) as run,
        ray_cluster(),
    ):
        colors = {}
        if plan.held_out_cameras:
            calibration = _calibration_frames(shards, segments, recipe.calibration_frames)
            (colors,) = map_tasks(
                calibrate_colors,
                [(avatar_uri, shards_uri, recipe.render, calibration)],
                description="calibrate held-out cameras",
            )
        result = score_all(plan, colors)
        sheet = ScoreSheet(
            name=name or method,
            method=method,
            shards_digest=shards.digest,
            train_frames=plan.train_frames,
            held_out_frames=plan.held_out_frames,
            train_cameras=plan.train_cameras,
            held_out_cameras=plan.held_out_cameras,
            calibration_segments=segments if plan.held_out_cameras else (),
            uncalibrated_cameras=tuple(camera for camera in plan.held_out_cameras if camera not in colors),
            fit=plan.fit.model_dump(mode="json"),
            scores=tuple(result.scores),
        )
        failures = worst_frames(sheet.scores, plan.held_out_frames, recipe.failure_frames)
        pictures = draw(plan, result, shown, failures)
        evaluation = Evaluation(
            sheet=sheet,
            rows=tuple(evaluation_rows(sheet, recipe.intervals)),
            fit_traces=result.traces,
            fit_seconds={signal: seconds / len(plan.held_out_frames) for signal, seconds in result.seconds.items()},
            run_id=run.run_id,
            pictures=tuple(pictures),
            shown_frames=tuple(shown),
            failures=tuple(failures),
        )
        run.log_metrics(evaluation.metrics())
        log_scores(run, sheet)
        run.log_table([asdict(score) for score in sheet.scores], SCORES_FILE)
        latents = [
            {"latent": latent, "iterations": iterations, "frame_id": frame_id, "z": z}
            for (latent, iterations, frame_id), z in result.latents.items()
        ]
        run.log_table(latents, "latents.json")
        sheets = {f"pictures/{key}": image for key, image in picture_sheets({sheet.name: evaluation.shown}).items()}
        sheets |= {f"failures/{key}": image for key, image in failure_sheets(failures, pictures).items()}
        for key, image in sheets.items():
            run.log_image(image, f"{key}.png")
        if version is not None:
            record_evaluation(version, run, metrics=evaluation.metrics(), shards_digest=shards.digest)
    for key, image in sheets.items():
        storage.write_bytes(storage.join(out_uri, f"{key}.png"), png_bytes(image))
    storage.write_bytes(storage.join(out_uri, SCORES_FILE), sheet.to_json().encode())
    storage.write_bytes(storage.join(out_uri, "latents.json"), json.dumps(latents).encode())
    comparison = compared([sheet], recipe.protocol, recipe.intervals, None)
    write_comparison(out_uri, comparison, [evaluation], as_document(evaluation), recipe.model_dump(mode="json"))
    return evaluation


def evaluate_models(
    models: Sequence[str], shards_uri: str, out_uri: str, recipe: EvaluateRecipe
) -> tuple[Comparison, list[Evaluation]]:
    """Score several avatars on the same frames of a shard set, and put them side by side.

    Args:
        models: ``MODEL`` or ``NAME=MODEL``; those of one name are seeds of one variant.
        shards_uri: the shard set.
        out_uri: where everything goes; a single model's own output goes there too.
        recipe: the settings, the same for all.

    Raises:
        LipflowError: as :func:`evaluate`.
    """
    if len(models) == 1:
        name, model = named(models[0])
        evaluation = evaluate(model, shards_uri, out_uri, recipe, name=name)
        return compared([evaluation.sheet], recipe.protocol, recipe.intervals, recipe.baseline), [evaluation]
    pairs = [named(model) for model in models]
    names = [name or called(model) for name, model in pairs]
    refuse_namesakes([(name, used) for (name, _), used in zip(pairs, names, strict=True)])
    if recipe.baseline is not None and recipe.baseline not in names:
        raise ConfigError(f"baseline {recipe.baseline!r} is none of the models; choose from {names}")
    # All of them before the first is scored, which may take hours.
    shards = ShardSet.open(storage.normalize_uri(shards_uri))
    for _, model in pairs:
        with tempfile.TemporaryDirectory() as folder:
            avatar = load_avatar(download_model(model, Path(folder, "avatar"), recipe.tracking))
            _driving_signals(avatar, shards, recipe)
    evaluations = []
    with ray_cluster():
        for place, (name, (_, model)) in enumerate(zip(names, pairs, strict=True)):
            seed = names[:place].count(name)
            own = storage.join(out_uri, f"{name}-{seed}" if names.count(name) > 1 else name)
            evaluations.append(evaluate(model, shards_uri, own, recipe, name=name))
    sheets = [evaluation.sheet for evaluation in evaluations]
    comparison = compared(sheets, recipe.protocol, recipe.intervals, recipe.baseline)
    write_comparison(out_uri, comparison, evaluations, {}, recipe.model_dump(mode="json"))
    return comparison, evaluations


def _plan(avatar_uri: str, shards: ShardSet, recipe: EvaluateRecipe, signals: Sequence[str]) -> EvaluationPlan:
    held_out = chosen_frames(shards.frame_ids("test"), recipe)
    if not held_out:
        raise ConfigError(f"{shards.uri} has no test frames: hold segments out when sharding (splits)")
    quadrants, driven = recipe.protocol != "lipflow", recipe.protocol != "multiface"
    return EvaluationPlan(
        avatar_uri=avatar_uri,
        shards_uri=shards.uri,
        render=recipe.render,
        fit=recipe.fit.model_copy(update={"iterations": recipe.scored_iterations[-1]}),
        iterations=recipe.scored_iterations,
        train_frames=tuple(chosen_frames(shards.frame_ids("train"), recipe)) if quadrants else (),
        held_out_frames=tuple(held_out),
        train_cameras=tuple(scored_cameras(shards, recipe.max_cameras)),
        held_out_cameras=tuple(held_out_cameras(shards)) if quadrants else (),
        signals=tuple(signals) if driven else (),
        frames_per_task=recipe.frames_per_task,
    )


def chosen_frames(frame_ids: Sequence[str], recipe: EvaluateRecipe) -> list[str]:
    """At most ``max_frames``, evenly spread in runs of ``consecutive`` neighbours of a segment."""
    if recipe.max_frames is None or recipe.consecutive == 1:
        return spread(frame_ids, recipe.max_frames)
    by_segment: dict[str, list[str]] = {}
    for frame_id in frame_ids:
        by_segment.setdefault(frame_id.split("/")[0], []).append(frame_id)
    size = recipe.consecutive
    starts = [
        frames[start : start + size]
        for frames in by_segment.values()
        for start in range(0, len(frames) - len(frames) % size, size)
    ]
    count = recipe.max_frames // size
    kept = [starts[int(place)] for place in spread([str(i) for i in range(len(starts))], count)]
    return [frame_id for run in kept for frame_id in run]


def _driving_signals(avatar: Avatar, shards: ShardSet, recipe: EvaluateRecipe) -> tuple[str, ...]:
    """The signals to drive with; ConfigError if the avatar lacks one, or is of another capture than the shard set."""
    signals = drivable_signals(avatar, recipe.signals, "signals")
    driven = () if recipe.protocol == "multiface" else signals
    avatar.context.require_same_capture(context_of(shards), driven)
    return signals


def calibration_segments(shards: ShardSet, recipe: EvaluateRecipe) -> tuple[str, ...]:
    """The segment that was asked for, or the first training segment of every capture of the set."""
    first_of_capture: dict[str | None, str] = {}
    segments = list(dict.fromkeys(frame_id.split("/")[0] for frame_id in shards.frame_ids("train")))
    if recipe.calibration_segment is None:
        for frame_id in shards.frame_ids("train"):
            first_of_capture.setdefault(shards.manifest.capture_of(frame_id).name, frame_id.split("/")[0])
        return tuple(first_of_capture.values())
    if recipe.calibration_segment not in segments:
        raise ConfigError(
            f"calibration_segment {recipe.calibration_segment!r} is no training segment; those are {segments}"
        )
    return (recipe.calibration_segment,)


def _calibration_frames(shards: ShardSet, segments: Sequence[str], count: int) -> list[str]:
    train = shards.frame_ids("train")
    of_segment = ([frame for frame in train if frame.split("/")[0] == segment] for segment in segments)
    return [frame for frames in of_segment for frame in spread(frames, count)]


def evaluate_command(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Avatars: [NAME=] path, s3://, models:/ or runs:/ URI.")
    ],
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Shard set: path, file:// or s3:// URI.")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where tables and pictures go.")],
    protocol: Annotated[
        str | None, typer.Option("--protocol", metavar="NAME", help="multiface or lipflow; both if left out.")
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score avatars: novel views and expressions, and latents fitted to each driving signal."""
    overrides = [*(set_ or ()), *([f"protocol={protocol}"] if protocol is not None else [])]
    comparison, _ = evaluate_models(models, shards, out, load_recipe(EvaluateRecipe, recipe, overrides))
    command.emit(comparison.document(), as_json, comparison.text(f"{out}/report.html"))


if __name__ == "__main__":
    command.run_job("cluster.evaluate", "evaluate_command")
