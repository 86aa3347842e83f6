"""The sampling job: ``lipflow sample MODEL SHARDS --out DIR``.

How good are random faces of an avatar's prior, and what does a driving signal leave open? Random faces are drawn
without a signal, once for each of several seeds, and compared with real meshes at equal counts. ``DIR`` holds::

    samples.json         the figures, with their spread over seeds; written last
    pictures/random.png  training faces, and random ones below
    pictures/spread.png  for each signal: faces that it allows, and how far each vertex moves among them
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.recipe import load_recipe
from cluster.records.registry import download_model
from cluster.records.tracking import TrackingConfig, initialise, tracked_run
from cluster.runtime import map_tasks, ray_cluster
from cluster.scores.evaluation import png_bytes
from cluster.scores.sample_tasks import (
    NO_SIGNAL,
    MetricsResult,
    SpreadResult,
    compare_sets,
    draw_faces,
    open_spread,
)
from cluster.scores.samples import Samples, random_sheet, spread_sheet, summarised
from cluster.scores.scene import context_of
from cluster.scores.scoring import picture_camera
from lipflow.checkpoint import load_avatar
from lipflow.config import RenderConfig, Signal, StrictConfig
from lipflow.errors import ConfigError
from lipflow.model.avatar import Avatar
from pipeline import storage
from pipeline.loading.loader import ShardSet
from pipeline.sharding.splits import spread

SAMPLES_FILE = "samples.json"


class SampleRecipe(StrictConfig):
    """Settings of a sampling.

    Attributes:
        count: faces in a set; at most as many as there are training frames, so that counts are equal.
        repeats: sets of random faces, each with a seed of its own.
        seed: of the first of them, and of all pictures.
        components: of the mesh-PCA space, at most; well below ``count``.
        neighbours: k of precision and recall.
        signals: whose open spread is shown; None: all that the avatar has a driver for. Random faces are always.
        spread_frames: held-out frames in which it is.
        spread_draws: faces drawn in each of them.
        camera: that pictures show; None: the training camera that looks most like the frontal one.
        rows: of random faces in the picture.
        columns: of pictures in each row, at least 4.
        render: how pictures are drawn.
        tracking: where MLflow keeps the run.
    """

    count: int = Field(256, ge=8)
    repeats: int = Field(5, ge=2)
    seed: int = Field(0, ge=0)
    components: int = Field(16, ge=1)
    neighbours: int = Field(3, ge=1)
    signals: tuple[Signal, ...] | None = None
    spread_frames: int = Field(2, ge=1)
    spread_draws: int = Field(64, ge=2)
    camera: str | None = None
    rows: int = Field(3, ge=1)
    columns: int = Field(6, ge=4)
    render: RenderConfig = RenderConfig()
    tracking: TrackingConfig = TrackingConfig()


def sample(model: str, shards_uri: str, out_uri: str, recipe: SampleRecipe) -> Samples:
    """Draw faces from an avatar's priors, and judge them against a shard set's meshes.

    Args:
        model: a path, ``file://``, ``s3://``, ``models:/`` or ``runs:/`` URI of an avatar.
        shards_uri: the shard set.
        out_uri: where figures and pictures go.
        recipe: the settings.

    Raises:
        LipflowError: no such model or shard set, or one that does not fit the other; too few frames; ``out_uri`` not
            writable.
    """
    shards_uri, out_uri = storage.normalize_uri(shards_uri), storage.normalize_uri(out_uri)
    shards = ShardSet.open(shards_uri)
    storage.check_writable(out_uri)
    initialise(recipe.tracking)
    with tempfile.TemporaryDirectory() as folder:
        local = download_model(model, Path(folder, "avatar"), recipe.tracking)
        avatar = load_avatar(local)
        method, signals = avatar.config.method, _open_signals(avatar, recipe)
        avatar.context.require_same_capture(context_of(shards), signals)
        camera = _camera(shards, recipe)
        avatar_uri = storage.join(out_uri, "avatar")
        storage.upload_dir(local, avatar_uri)
    train = spread(shards.frame_ids("train"), recipe.count)
    test = spread(shards.frame_ids("test"), len(train))
    if len(train) <= recipe.neighbours or not test:
        raise ConfigError(
            f"{shards_uri} has {len(train)} training and {len(test)} held-out frames: sampling needs more than "
            f"{recipe.neighbours} (neighbours) to compare with, and one to drive with"
        )
    shown = spread(test, recipe.spread_frames)
    seeds = [recipe.seed + number for number in range(recipe.repeats)]
    with (
        tracked_run(
            "sample", f"sample-{method}", config=recipe.tracking, recipe=recipe, shards_digest=shards.digest
        ) as run,
        ray_cluster(),
    ):
        faces = recipe.rows * recipe.columns
        tasks: list[tuple] = [
            (compare_sets, (avatar_uri, shards_uri, train, test, seeds, recipe.components, recipe.neighbours)),
            (draw_faces, (avatar_uri, shards_uri, recipe.render, train[0], camera, faces, recipe.seed)),
        ]
        drawn = (camera, recipe.spread_draws, recipe.columns - 3, recipe.seed)
        tasks += [
            (open_spread, (avatar_uri, shards_uri, recipe.render, frame, signal, *drawn))
            for frame in shown
            for signal in (*signals, NO_SIGNAL)
        ]
        results = map_tasks(_run_task, tasks, description="draw faces")
        figures: MetricsResult = results[0]
        spreads: list[SpreadResult] = results[2:]
        samples = Samples(
            method=method,
            rows=tuple(map(summarised, figures.sets)),
            components=figures.components,
            explained=figures.explained,
            spreads=tuple(result.row for result in spreads),
            camera=camera,
            run_id=run.run_id,
            shards_digest=shards.digest,
        )
        photos = [
            image.permute(1, 2, 0).numpy()
            for frame in spread(train, recipe.columns)
            if (image := shards.view(frame, camera)) is not None
        ]
        pictures = {
            "random": random_sheet(photos, results[1], recipe.columns, method),
            "spread": spread_sheet(spreads, method),
        }
        run.log_metrics(samples.metrics())
        run.log_dict(asdict(samples), SAMPLES_FILE)
        for name, picture in pictures.items():
            run.log_image(picture, f"pictures/{name}.png")
    for name, picture in pictures.items():
        storage.write_bytes(storage.join(out_uri, "pictures", f"{name}.png"), png_bytes(picture))
    storage.write_bytes(storage.join(out_uri, SAMPLES_FILE), json.dumps(asdict(samples)).encode())
    return samples


def _run_task(function: Any, arguments: tuple) -> Any:
    return function(*arguments)


def _open_signals(avatar: Avatar, recipe: SampleRecipe) -> tuple[str, ...]:
    lacking = [signal for signal in recipe.signals or () if signal not in avatar.signals]
    if lacking:
        raise ConfigError(f"signals: the avatar has no driver for {', '.join(lacking)}, but {list(avatar.signals)}")
    return avatar.signals if recipe.signals is None else recipe.signals


def _camera(shards: ShardSet, recipe: SampleRecipe) -> str:
    """The camera of the pictures; ConfigError if there is none."""
    cameras = [camera.camera_id for camera in shards.cameras]
    if recipe.camera is None:
        return picture_camera(shards)
    if recipe.camera not in cameras:
        raise ConfigError(f"camera {recipe.camera!r} is none of the shard set's {len(cameras)}, such as {cameras[0]!r}")
    return recipe.camera


def sample_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Avatar: path, s3://, models:/ or runs:/ URI.")],
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Shard set: path, file:// or s3:// URI.")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where figures and pictures go.")],
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw random faces and judge them; show what each driving signal leaves open."""
    samples = sample(model, shards, out, load_recipe(SampleRecipe, recipe, set_ or ()))
    lines = [f"{'meshes':>13} {'against':>7} {'count':>5}  Fréchet mm²      precision  recall  diversity mm"]
    for row in samples.rows:
        deviation = "" if row.frechet_mm2.std is None else f"± {row.frechet_mm2.std:.4f}"
        lines.append(
            f"{row.meshes:>13} {row.against:>7} {row.count:>5}  {row.frechet_mm2.mean:7.4f} {deviation:<9}"
            f"{row.precision.mean:8.3f}  {row.recall.mean:6.3f}  {row.diversity_mm.mean:9.3f}"
        )
    lines += [
        f"{row.signal:>13} {row.frame_id}: spread {row.spread_mm:.3f} mm"
        + ("" if row.error_mm is None else f", error of its mean {row.error_mm:.3f} mm")
        for row in samples.spreads
    ]
    command.emit(asdict(samples), as_json, "\n".join(lines))


if __name__ == "__main__":
    command.run_job("cluster.sample", "sample_command")
