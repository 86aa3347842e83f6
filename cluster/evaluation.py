"""What an evaluation comes to: rows with intervals, and sheets of pictures."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

from cluster.pictures import comparison_row, contact_sheet, suggested_exposure
from cluster.scoring import ENCODER, MEAN_FACE, FrameScore, Picture
from lipflow.metrics import bootstrap_interval
from lipflow.types import DRIVING_SIGNALS


@dataclass(frozen=True)
class Interval:
    """A mean over frames with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class EvaluationRow:
    """One line of a table.

    Attributes:
        latent: where z comes from: ``mean face``, ``encoder``, or a driving signal.
        iterations: fit iterations.
        cameras: ``train`` or ``held-out``.
        expressions: ``train`` or ``held-out``.
        calibrated: whether held-out cameras' colours were solved on the calibration segment.
        frames: how many.
        psnr_db: of the image, over the pixels that the tracked mesh covers.
        ssim: of the image.
        geometry_rmse_mm: of the mesh.
    """

    latent: str
    iterations: int
    cameras: str
    expressions: str
    calibrated: bool
    frames: int
    psnr_db: Interval
    ssim: Interval
    geometry_rmse_mm: Interval


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation came to.

    Attributes:
        method: the avatar's.
        rows: of both tables.
        calibration_segment: on which held-out cameras' colours were solved.
        fit_traces: driving signal -> mean observed loss at every iteration.
        fit_seconds: driving signal -> seconds of fitting a frame.
        run_id: the MLflow run.
        shards_digest: of the shard set.
        pictures: kept in memory only.
    """

    method: str
    rows: tuple[EvaluationRow, ...]
    calibration_segment: str
    fit_traces: dict[str, list[float]]
    fit_seconds: dict[str, float]
    run_id: str
    shards_digest: str
    pictures: tuple[Picture, ...]

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


def table_rows(scores: Iterable[FrameScore], held_out: set[str]) -> list[EvaluationRow]:
    """Means and intervals over the frames of each kind of latent, camera set and expression set."""
    groups: dict[tuple, list[FrameScore]] = {}
    for score in scores:
        expressions = "held-out" if score.frame_id in held_out else "train"
        key = (score.latent, score.iterations, score.cameras, expressions, score.calibrated)
        groups.setdefault(key, []).append(score)
    order = {latent: index for index, latent in enumerate((MEAN_FACE, ENCODER, *DRIVING_SIGNALS))}
    rows = []
    for key in sorted(groups, key=lambda key: (order[key[0]], *key[1:])):
        group = groups[key]
        rows.append(
            EvaluationRow(
                *key,
                frames=len(group),
                psnr_db=_interval([score.psnr_db for score in group]),
                ssim=_interval([score.ssim for score in group]),
                geometry_rmse_mm=_interval([score.geometry_rmse_mm for score in group]),
            )
        )
    return rows


def _interval(values: list[float]) -> Interval:
    found = bootstrap_interval(torch.tensor(values))
    return Interval(found.mean, found.low, found.high)


def as_document(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation without its pictures, for JSON."""
    document = {name: getattr(evaluation, name) for name in evaluation.__dataclass_fields__ if name != "pictures"}
    return document | {"rows": [asdict(row) for row in evaluation.rows]}


def picture_sheets(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """For each driving signal (and the encoder) one sheet of photo | reconstruction | error rows.

    Args:
        evaluations: method -> its evaluation, on the same frames; rows of several methods stand below each other.
    """
    everything = [picture for evaluation in evaluations.values() for picture in evaluation.pictures]
    if not everything:
        return {}
    exposure = suggested_exposure([picture.photo for picture in everything])
    sheets = {}
    for latent in dict.fromkeys(picture.latent for picture in everything):
        rows, labels = [], []
        for frame_id in dict.fromkeys(picture.frame_id for picture in everything):
            for method, evaluation in evaluations.items():
                for picture in evaluation.pictures:
                    if (picture.latent, picture.frame_id) == (latent, frame_id):
                        mask = picture.reconstruction.max(-1)
                        rows.append(comparison_row(picture.photo, picture.reconstruction, mask=mask, exposure=exposure))
                        labels.append(f"{method}\n{frame_id.replace('/', chr(10))}")
        sheets[latent] = contact_sheet(rows, row_labels=labels, title=latent)
    return sheets


def png_bytes(image: Any) -> bytes:
    """``(H, W, 3)`` uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
