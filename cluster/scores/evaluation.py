"""What the evaluation of one avatar comes to, for the demo, the registry and promotion."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from cluster.reports.gallery import Failure, Picture
from cluster.scores.sheet import ENCODER, MEAN_FACE, ScoreSheet
from cluster.scores.tables import IntervalUnit, Key, Variant
from lipflow.bootstrap import BootstrapInterval
from lipflow.types import DRIVING_SIGNALS


@dataclass(frozen=True)
class EvaluationRow:
    """One line of a table.

    Attributes:
        latent: where z comes from: ``mean face``, ``encoder``, or a driving signal.
        iterations: fit iterations.
        cameras: ``train`` or ``held-out``.
        expressions: ``train`` or ``held-out``.
        calibrated: whether held-out cameras' colours were solved on the calibration segments.
        frames: how many.
        psnr_db: of the mean squared error of the images, over the pixels that the tracked mesh covers.
        ssim: of the image.
        geometry_rmse_mm: of the mesh.
    """

    latent: str
    iterations: int
    cameras: str
    expressions: str
    calibrated: bool
    frames: int
    psnr_db: BootstrapInterval
    ssim: BootstrapInterval
    geometry_rmse_mm: BootstrapInterval


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation came to.

    Attributes:
        sheet: all scores.
        rows: of both protocols, as far as they were run.
        fit_traces: driving signal -> mean observed loss at every iteration.
        fit_seconds: driving signal -> seconds of fitting a frame.
        run_id: the MLflow run.
        pictures: of the chosen frames and of the failures; kept in memory only.
        shown_frames: the chosen ones.
        failures: the worst frames.
    """

    sheet: ScoreSheet
    rows: tuple[EvaluationRow, ...]
    fit_traces: dict[str, list[float]]
    fit_seconds: dict[str, float]
    run_id: str
    pictures: tuple[Picture, ...]
    shown_frames: tuple[str, ...]
    failures: tuple[Failure, ...]

    @property
    def method(self) -> str:
        """The avatar's."""
        return self.sheet.method

    @property
    def shown(self) -> list[Picture]:
        """The pictures of the chosen frames, which are the same for every avatar."""
        return [picture for picture in self.pictures if picture.frame_id in self.shown_frames]

    def row(self, latent: str, *, fitted: bool = False) -> EvaluationRow:
        """The row of held-out expressions on training cameras: the start, or the most iterations."""
        found = [
            row
            for row in self.rows
            if row.latent == latent and row.cameras == "train" and row.expressions == "held-out"
        ]
        if not found:
            raise KeyError(f"no row for {latent!r}")
        return (max if fitted else min)(found, key=lambda row: row.iterations)

    def metrics(self) -> dict[str, float]:
        """Flat metrics for the registry and for comparing versions."""
        flat = {}
        for row in self.rows:
            kind = f"{row.cameras}-cameras.{row.expressions}-expressions" + ".calibrated" * row.calibrated
            name = f"{row.latent.replace(' ', '-')}.{row.iterations}.{kind}"
            flat[f"{name}.psnr_db"] = row.psnr_db.mean
            flat[f"{name}.geometry_rmse_mm"] = row.geometry_rmse_mm.mean
        fitted = [self.row(signal, fitted=True) for signal in self.fit_traces]
        if fitted:
            flat["fitted.psnr_db"] = sum(row.psnr_db.mean for row in fitted) / len(fitted)
            flat["fitted.geometry_rmse_mm"] = sum(row.geometry_rmse_mm.mean for row in fitted) / len(fitted)
        return flat


def evaluation_rows(sheet: ScoreSheet, unit: IntervalUnit) -> list[EvaluationRow]:
    """Means and intervals over the frames of each kind of latent, camera set and expression set."""
    variant = Variant([sheet], unit)
    order = {latent: index for index, latent in enumerate((MEAN_FACE, ENCODER, *DRIVING_SIGNALS))}

    def place(key: Key) -> tuple:
        return order[key.latent], key.iterations, key.cameras, key.expressions, key.calibrated

    rows = []
    for key in sorted(variant.keys, key=place):
        psnr_db, ssim = variant.psnr_db(key), variant.mean(key, "ssim")
        geometry = variant.mean(key, "geometry_rmse_mm")
        assert psnr_db is not None
        assert ssim is not None
        assert geometry is not None
        rows.append(
            EvaluationRow(**vars(key), frames=psnr_db.frames, psnr_db=psnr_db, ssim=ssim, geometry_rmse_mm=geometry)
        )
    return rows


def as_document(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation without its scores and pictures, for JSON."""
    sheet = evaluation.sheet
    return {
        "name": sheet.name,
        "method": sheet.method,
        "rows": [asdict(row) for row in evaluation.rows],
        "calibration_segments": sheet.calibration_segments,
        "uncalibrated_cameras": sheet.uncalibrated_cameras,
        "fit_traces": evaluation.fit_traces,
        "fit_seconds": evaluation.fit_seconds,
        "failures": [
            {"metric": failure.metric, "rank": failure.rank, "median": failure.median, "score": asdict(failure.score)}
            for failure in evaluation.failures
        ],
        "run_id": evaluation.run_id,
        "shards_digest": sheet.shards_digest,
    }


def png_bytes(image: Any) -> bytes:
    """``(H, W, 3)`` uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
