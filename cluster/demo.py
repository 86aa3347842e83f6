"""The demonstration: ``lipflow demo`` runs every job on a small synthetic dome, in minutes, on two cores.

Capture, shards, a DAM and a LiP-Flow avatar, their evaluations, a registered champion, and a report. Whatever is
finished is not done again: a second run reuses the capture, the shards and the trained avatars; remove the output
folder to start over.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from cluster import command
from cluster.charts import Chart
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.evaluate import (
    EvaluateRecipe,
    Evaluation,
    EvaluationRow,
    Interval,
    evaluate,
    picture_sheets,
    png_bytes,
)
from cluster.pictures import COMPARISON_LABELS, comparison_row, contact_sheet, expose, suggested_exposure
from cluster.promote import PromoteRecipe, promote_model
from cluster.recipe import load_recipe
from cluster.report import HeadlineRow, Measured, Picture, QuadrantRow, ReportContent, print_table, render_report
from cluster.runtime import ray_cluster
from cluster.scoring import ENCODER, MEAN_FACE
from cluster.shard import ShardRecipe, shard
from cluster.synth import synthesise
from cluster.tracking import TrackingConfig, code_version, open_client, resolve_tracking_uri
from cluster.train import TrainRecipe, TrainSummary, train
from lipflow.config import AvatarConfig, FitConfig, LossConfig, StrictConfig
from lipflow.errors import ConfigError
from lipflow.types import DRIVING_SIGNALS
from pipeline import storage
from pipeline.captures.dome import DomeConfig
from pipeline.captures.photo import check_photo, has_photo
from pipeline.loader import LoaderConfig
from pipeline.shards import ShardConfig
from pipeline.splits import SplitConfig

METHODS = ("dam", "lipflow")


def _training(method: Literal["dam", "lipflow"], steps: int) -> TrainRecipe:
    """A few minutes' worth of training: narrow layers, and terms and rates that get far in few steps.

    The dome's textures change by two or three grey levels from frame to frame, so an image error in units of their
    std is large: ``image_weight`` brings it to the size of the geometry term. The paper's small ``mean_scale`` and
    ``log_std_scale`` would leave the posterior's std near 1 for thousands of steps.
    """
    return TrainRecipe(
        avatar=AvatarConfig.small(method=method, texture_size=128, mean_scale=1.0, log_std_scale=0.1),
        loss=LossConfig(image_weight=0.05),
        loader=LoaderConfig(frames_per_batch=4, views_per_frame=2, signals=() if method == "dam" else DRIVING_SIGNALS),
        steps=steps,
        learning_rate=4e-3,
        checkpoint_every_steps=140,
    )


class DemoRecipe(StrictConfig):
    """Settings of all the demo's jobs.

    Attributes:
        dome: the synthetic capture.
        shard: the shard set.
        dam: training of the baseline, a Deep Appearance Model.
        lipflow: training of LiP-Flow.
        evaluate_dam: its fits start at z = 0, far away, and get more iterations.
        evaluate_lipflow: its fits start at the prior's mean.
        tracking: where MLflow keeps all runs; by default beside the output.
    """

    dome: DomeConfig = DomeConfig(segments=15, frames_per_segment=8)
    shard: ShardConfig = ShardConfig(
        frames_per_shard=8,
        splits=SplitConfig(
            # Sentences mix all shapes: held out, they are new mixtures of expressions that were seen.
            test_segments=("SEN_do_boats_float", "SEN_every_warm_loaf"),
            val_segments=("SEN_four_shy_foxes",),
        ),
    )
    dam: TrainRecipe = _training("dam", 260)
    lipflow: TrainRecipe = _training("lipflow", 280)
    evaluate_dam: EvaluateRecipe = EvaluateRecipe(
        fit=FitConfig(iterations=50, learning_rate=0.1, prior_weight=0.03),
        max_frames=12,
        max_cameras=8,
        picture_frames=3,
    )
    evaluate_lipflow: EvaluateRecipe = EvaluateRecipe(
        fit=FitConfig(iterations=20, learning_rate=0.1, prior_weight=0.03),
        max_frames=12,
        max_cameras=8,
        picture_frames=3,
    )
    tracking: TrackingConfig | None = None


@dataclass(frozen=True)
class DemoResult:
    """Where everything is, and the headline table.

    Attributes:
        report: URI of the HTML page.
        headline: the table's rows.
        model: ``models:/`` URI of the model that was judged.
        promoted: whether it became the champion in this run.
        seconds: step -> wall-clock time.
    """

    report: str
    headline: tuple[HeadlineRow, ...]
    model: str
    promoted: bool
    seconds: dict[str, float]


def demo(out_uri: str, recipe: DemoRecipe) -> DemoResult:
    """Run everything; ``out_uri`` may be a folder or an ``s3://`` URI.

    Raises:
        LipflowError: whatever a job raises.
    """
    out_uri = storage.normalize_uri(out_uri)
    storage.check_writable(out_uri)
    tracking = recipe.tracking or _tracking_beside(out_uri)
    clock = _Clock()
    capture_uri, shards_uri = storage.join(out_uri, "capture"), storage.join(out_uri, "shards")
    with ray_cluster():
        with clock.measure("synthesise"):
            synthesise(capture_uri, recipe.dome)
        with clock.measure("shard"):
            shards = shard(capture_uri, shards_uri, ShardRecipe(shard=recipe.shard, tracking=tracking))
        trained, evaluations = {}, {}
        for method in METHODS:
            settings = getattr(recipe, method).model_copy(update={"tracking": tracking})
            with clock.measure(f"train {method}"):
                trained[method] = train(shards_uri, storage.join(out_uri, method), settings)
        for method, summary in trained.items():
            settings = getattr(recipe, f"evaluate_{method}").model_copy(update={"tracking": tracking})
            with clock.measure(f"evaluate {method}"):
                evaluations[method] = evaluate(
                    summary.model or summary.avatar,
                    shards_uri,
                    storage.join(out_uri, f"evaluation-{method}"),
                    settings,
                    parent_run=summary.run_id,
                )
        candidate = trained["lipflow"].model
        if candidate is None:
            raise ConfigError("lipflow.register_as is null: the demo promotes a registered model; name one")
        with clock.measure("promote"):
            decision = promote_model(candidate, PromoteRecipe(tracking=tracking))
    headline = tuple(_headline(evaluations))
    overview = _overview(evaluations["lipflow"])
    storage.write_bytes(storage.join(out_uri, "overview.png"), png_bytes(overview.image))
    report_uri = storage.join(out_uri, "report.html")
    content = ReportContent(
        title="LiP-Flow demo",
        summary=_summary(evaluations),
        headline=headline,
        protocol=("expressions held out of training, seen by evenly spread training cameras without the frontal one"),
        reading=_READING,
        quadrants=_quadrants(evaluations),
        quadrants_note=(
            f"Held-out cameras have no colour parameters; 'calibrated' solves their gain and bias on segment "
            f"{evaluations['lipflow'].calibration_segment}, a training segment."
        ),
        pictures=[overview, *_photo_picture(recipe), *_pictures(evaluations)],
        training_curves=_training_curves(tracking, trained),
        fit_curves=_fit_curves(evaluations),
        facts={
            "Data": {
                "capture": "real face asset" if recipe.dome.face else "procedural head",
                "frames": ", ".join(f"{count} {split}" for split, count in shards.frames.items()),
                "cameras": f"{shards.cameras}, of which {len(shards.held_out_cameras)} held out",
                "shard set": shards.digest[:16],
            },
            "Runs": {f"{name} training": summary.run_id for name, summary in trained.items()}
            | {f"{name} evaluation": evaluation.run_id for name, evaluation in evaluations.items()}
            | {"registered model": candidate, "promotion": decision.reason},
            "Durations": {name: f"{seconds:.0f} s" for name, seconds in clock.seconds.items()},
            "Environment": {
                "code": code_version(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "CPU cores": os.cpu_count(),
                "MLflow": resolve_tracking_uri(tracking),
            },
        },
        config=recipe.model_dump(mode="json"),
    )
    render_report(report_uri, content)
    return DemoResult(report_uri, headline, candidate, decision.promoted, clock.seconds)


_READING = (
    "Every row decodes a whole face from a latent code. 'hmc', 'frontal' and 'keypoints' see only headset views, one "
    "image, or 2-D landmarks of the frame; the code is fitted to that signal under the method's prior.",
    "'dam' fits under N(0, I) from z = 0; 'lipflow' under the conditional flow prior from its mean; 'start' is that "
    "mean without any fit.",
    "The mean face is what a model that learned nothing would show. The encoder sees the full capture: a bound on "
    "what fitting can reach with this decoder.",
    "All rows are scored on the pixels that the tracked mesh covers; ranges are 95 % bootstrap intervals over frames.",
)


class _Clock:
    """Wall-clock seconds of named steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - began


def _tracking_beside(out_uri: str) -> TrackingConfig:
    """``MLFLOW_TRACKING_URI`` if it is set; else a database in a local output folder, or in the working folder."""
    if os.environ.get("MLFLOW_TRACKING_URI") or not storage.is_local(out_uri):
        return TrackingConfig()
    return TrackingConfig(uri=f"sqlite:///{storage.local_path(out_uri)}/mlflow.db")


def _measured(interval: Interval) -> Measured:
    return Measured(interval.mean, interval.low, interval.high)


def _headline_row(method: str, signal: str | None, row: EvaluationRow) -> HeadlineRow:
    return HeadlineRow(method, signal, _measured(row.psnr_db), _measured(row.geometry_rmse_mm))


def _headline(evaluations: dict[str, Evaluation]) -> Iterator[HeadlineRow]:
    for signal in DRIVING_SIGNALS:
        for method, evaluation in evaluations.items():
            if signal not in evaluation.fit_traces:
                continue
            if method != "dam":
                yield _headline_row(f"{method}, start", signal, evaluation.row(signal))
            yield _headline_row(method, signal, evaluation.row(signal, fitted=True))
    yield _headline_row(MEAN_FACE, None, next(iter(evaluations.values())).row(MEAN_FACE))
    for method, evaluation in evaluations.items():
        yield _headline_row(f"{method}, {ENCODER}", None, evaluation.row(ENCODER))


def _summary(evaluations: dict[str, Evaluation]) -> str:
    evaluation = evaluations["lipflow"]
    mean_face = evaluation.row(MEAN_FACE)
    driven = [evaluation.row(signal, fitted=True) for signal in evaluation.fit_traces]
    psnr = min(row.psnr_db.mean for row in driven)
    rmse = max(row.geometry_rmse_mm.mean for row in driven)
    return (
        f"On held-out expressions the driven LiP-Flow avatar reaches at least {psnr:.1f} dB and at most {rmse:.2f} mm, "
        f"whichever signal drives it; the mean face {mean_face.psnr_db.mean:.1f} dB and "
        f"{mean_face.geometry_rmse_mm.mean:.2f} mm."
    )


def _quadrants(evaluations: dict[str, Evaluation]) -> list[QuadrantRow]:
    return [
        QuadrantRow(
            method=f"{method}, calibrated" if row.calibrated else method,
            cameras=row.cameras,
            expressions=row.expressions,
            image_psnr_db=_measured(row.psnr_db),
            geometry_rmse_mm=_measured(row.geometry_rmse_mm),
            frames=row.frames,
            ssim=_measured(row.ssim),
        )
        for method, evaluation in evaluations.items()
        for row in evaluation.rows
        if row.latent == ENCODER
    ]


def _overview(evaluation: Evaluation) -> Picture:
    """One row a held-out frame: the photo, and the avatar driven by each signal."""
    photos = {picture.frame_id: picture.photo for picture in evaluation.pictures}
    exposure = suggested_exposure(list(photos.values()))
    signals = [signal for signal in DRIVING_SIGNALS if signal in evaluation.fit_traces]
    driven = {(picture.frame_id, picture.latent): picture.reconstruction for picture in evaluation.pictures}
    rows = [
        [expose(image, exposure) for image in (photo, *(driven[frame_id, signal] for signal in signals))]
        for frame_id, photo in photos.items()
    ]
    sheet = contact_sheet(
        rows, column_labels=("photo", *(f"driven by {signal}" for signal in signals)), colour_bar=False
    )
    return Picture(
        title="One avatar, several drivers",
        caption="Held-out expressions. Each driver sees only its own signal; the photo's camera shows none of them.",
        image=sheet,
        description="Rows of a photo and its reconstructions from headset views, a frontal image and keypoints.",
    )


def _pictures(evaluations: dict[str, Evaluation]) -> list[Picture]:
    return [
        Picture(
            title=f"Driven by {latent}" if latent != ENCODER else "Encoder",
            caption="Photo, reconstruction, and absolute error on held-out expressions.",
            image=sheet,
            description=f"Rows of photo, reconstruction and error heat map; latent codes from {latent}.",
        )
        for latent, sheet in picture_sheets(evaluations).items()
    ]


def _photo_picture(recipe: DemoRecipe) -> list[Picture]:
    """The real head against its real photo, where the face asset has one."""
    face = recipe.dome.face
    if face is None or not has_photo(face):
        return []
    check = check_photo(face)
    exposure = suggested_exposure([check.photo])
    row = comparison_row(check.photo, check.rendering, mask=check.mask, exposure=exposure)
    return [
        Picture(
            title="Photo check",
            caption=(
                f"The tracked mesh with its texture in the photo's camera, one gain and bias a channel: "
                f"{check.psnr_db:.1f} dB."
            ),
            image=contact_sheet([row], column_labels=COMPARISON_LABELS, tile_height_px=512),
            description="A real photo, the rendered head, and their difference.",
        )
    ]


def _training_curves(tracking: TrackingConfig, trained: dict[str, TrainSummary]) -> list[Chart]:
    client = open_client(tracking)

    def curves(metric: str) -> dict[str, tuple[list[float], list[float]]]:
        found = {}
        for method, summary in trained.items():
            history = sorted(client.get_metric_history(summary.run_id, metric), key=lambda point: point.step)
            found[method] = ([float(point.step) for point in history], [point.value for point in history])
        return found

    return [
        Chart("Image loss", "step", "units of the texture variance", curves("train/image"), log_y=True),
        Chart("Geometry loss", "step", "units of the vertex variance", curves("train/geometry"), log_y=True),
        Chart("Validation loss", "step", "image + geometry", curves("val/loss"), log_y=True),
    ]


def _fit_curves(evaluations: dict[str, Evaluation]) -> list[Chart]:
    charts = []
    for signal in DRIVING_SIGNALS:
        curves = {
            method: (list(range(len(trace))), trace)
            for method, evaluation in evaluations.items()
            if (trace := evaluation.fit_traces.get(signal))
        }
        if curves:
            charts.append(Chart(f"Fit to {signal}", "iteration", "observed loss, mean over frames", curves, log_y=True))
    return charts


def demo_command(
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where everything goes.")] = "demo-out",
    face: Annotated[str | None, typer.Option("--face", metavar="DIR", help="Real face asset with its KRT rig.")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Capture, shards, two trainings, evaluations, a champion and a report, in minutes, on two cores."""
    overrides = list(set_ or ())
    if face is not None:
        krt = Path(face, "KRT")
        overrides = [f"dome.face={face}", *([f"dome.krt={krt}"] if krt.is_file() else []), *overrides]
    result = demo(out, load_recipe(DemoRecipe, recipe, overrides))
    if not as_json:
        print_table(result.headline, title="Held-out expressions")
    document = {name: getattr(result, name) for name in result.__dataclass_fields__ if name != "headline"}
    command.emit(
        document | {"headline": [asdict(row) for row in result.headline]},
        as_json,
        f"report: {result.report}\nmodel:  {result.model} "
        f"({'the new champion' if result.promoted else 'not better than the champion'})\n"
        f"time:   {sum(result.seconds.values()):.0f} s",
    )


if __name__ == "__main__":
    command.run(demo_command)
