"""What the demonstration shows: its headline table, its overview picture and the content of its report."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cluster.records.code_version import code_version
from cluster.records.promotion import PromotionDecision
from cluster.records.tracking import TrackingConfig, open_client, resolve_tracking_uri
from cluster.reports.charts import Chart
from cluster.reports.gallery import picture_sheets
from cluster.reports.page import HeadlineRow, Measured, Picture, QuadrantRow, ReportContent
from cluster.reports.pictures import COMPARISON_LABELS, comparison_row, contact_sheet, expose, suggested_exposure
from cluster.scores.evaluation import Evaluation, EvaluationRow
from cluster.scores.sheet import ENCODER, MEAN_FACE
from cluster.shard import ShardSummary
from cluster.train import TrainSummary
from lipflow.bootstrap import BootstrapInterval
from lipflow.types import DRIVING_SIGNALS
from pipeline.dome.photo import check_photo, has_photo

_READING = (
    "Every row decodes a whole face from a latent code. 'hmc', 'frontal' and 'keypoints' see only headset views, one "
    "image, or 2-D landmarks of the frame; the code is fitted to that signal under the method's prior.",
    "'dam' fits under N(0, I) from z = 0; 'lipflow' under the conditional flow prior from its mean; 'start' is that "
    "mean without any fit.",
    "The mean face is what a model that learned nothing would show. The encoder sees the full capture: a bound on "
    "what fitting can reach with this decoder.",
    "All rows are scored on the pixels that the tracked mesh covers; ranges are 95 % bootstrap intervals over frames.",
)


@dataclass(frozen=True)
class DemoOutcome:
    """What the jobs came to.

    Attributes:
        face: folder of the real face asset; None for the procedural head.
        shards: the shard set.
        trained: method -> its training.
        evaluations: method -> its evaluation.
        decision: of the promotion.
        seconds: step -> wall-clock time.
        tracking: the MLflow store.
    """

    face: str | None
    shards: ShardSummary
    trained: dict[str, TrainSummary]
    evaluations: dict[str, Evaluation]
    decision: PromotionDecision
    seconds: dict[str, float]
    tracking: TrackingConfig


def report_content(outcome: DemoOutcome, overview: Picture, config: dict[str, Any]) -> ReportContent:
    """The report, with ``overview`` as its first picture and ``config`` as its settings."""
    evaluations, shards = outcome.evaluations, outcome.shards
    return ReportContent(
        title="LiP-Flow demo",
        summary=_summary(evaluations),
        headline=tuple(headline_rows(evaluations)),
        protocol="expressions held out of training, seen by evenly spread training cameras without the frontal one",
        reading=_READING,
        quadrants=_quadrants(evaluations),
        quadrants_note=(
            f"Held-out cameras have no colour parameters; 'calibrated' solves their gain and bias on "
            f"{', '.join(evaluations['lipflow'].sheet.calibration_segments)}, of the training segments."
        ),
        pictures=[overview, *_photo_picture(outcome.face), *_pictures(evaluations)],
        training_curves=_training_curves(outcome.tracking, outcome.trained),
        fit_curves=_fit_curves(evaluations),
        facts={
            "Data": {
                "capture": "real face asset" if outcome.face else "procedural head",
                "frames": ", ".join(f"{count} {split}" for split, count in shards.frames.items()),
                "cameras": f"{shards.cameras}, of which {len(shards.held_out_cameras)} held out",
                "shard set": shards.digest[:16],
            },
            "Runs": {f"{name} training": summary.run_id for name, summary in outcome.trained.items()}
            | {f"{name} evaluation": evaluation.run_id for name, evaluation in evaluations.items()}
            | {"registered model": outcome.trained["lipflow"].model, "promotion": outcome.decision.reason},
            "Durations": {name: f"{seconds:.0f} s" for name, seconds in outcome.seconds.items()},
            "Environment": {
                "code": code_version(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "CPU cores": os.cpu_count(),
                "MLflow": resolve_tracking_uri(outcome.tracking),
            },
        },
        config=config,
    )


def _measured(interval: BootstrapInterval) -> Measured:
    return Measured(interval.mean, interval.low, interval.high)


def _headline_row(method: str, signal: str | None, row: EvaluationRow) -> HeadlineRow:
    return HeadlineRow(method, signal, _measured(row.psnr_db), _measured(row.geometry_rmse_mm))


def headline_rows(evaluations: dict[str, Evaluation]) -> Iterator[HeadlineRow]:
    """Method x driving signal on held-out expressions, then the references."""
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


def driven_side_by_side(evaluation: Evaluation) -> Picture:
    """One row a held-out frame: the photo, and the avatar driven by each signal."""
    photos = {picture.frame_id: picture.photo for picture in evaluation.shown}
    exposure = suggested_exposure(list(photos.values()))
    signals = [signal for signal in DRIVING_SIGNALS if signal in evaluation.fit_traces]
    driven = {(picture.frame_id, picture.latent): picture.reconstruction for picture in evaluation.shown}
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
        for latent, sheet in picture_sheets(
            {name: evaluation.shown for name, evaluation in evaluations.items()}
        ).items()
    ]


def _photo_picture(face: str | None) -> list[Picture]:
    """The real head against its real photo, where the face asset has one."""
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
