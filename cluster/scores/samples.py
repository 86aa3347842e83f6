"""What a sampling comes to: figures over seeds, and sheets of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.reports.pictures import contact_sheet, expose, heat_over_face, suggested_exposure
from cluster.scores.sample_tasks import ComparedSet, OpenSpread, SpreadResult

FIGURES = ("frechet_mm2", "precision", "recall", "diversity_mm")


@dataclass(frozen=True)
class Repeated:
    """A figure over seeds.

    Attributes:
        mean: over them.
        std: standard deviation of one seed's figure; None of a single one. It holds what drawing other faces changes,
            not what training another avatar would.
    """

    mean: float
    std: float | None


@dataclass(frozen=True)
class SampleRow:
    """One set of meshes against real ones; the figures are those of :class:`cluster.scores.sample_tasks.DrawFigures`.

    Attributes:
        meshes: ``random``, ``reconstructed`` or ``real``.
        against: ``train`` or ``test`` meshes.
        count: on both sides; figures of different counts cannot be compared.
        repeats: sets.
    """

    meshes: str
    against: str
    count: int
    repeats: int
    frechet_mm2: Repeated
    precision: Repeated
    recall: Repeated
    diversity_mm: Repeated


@dataclass(frozen=True)
class Samples:
    """What a sampling came to.

    Attributes:
        method: the avatar's.
        rows: of the figures.
        components: of the mesh-PCA space.
        explained: share of the training meshes' variance that they hold.
        spreads: what signals leave open.
        camera: that the pictures show.
        run_id: the MLflow run.
        shards_digest: of the shard set.
    """

    method: str
    rows: tuple[SampleRow, ...]
    components: int
    explained: float
    spreads: tuple[OpenSpread, ...]
    camera: str
    run_id: str
    shards_digest: str

    def metrics(self) -> dict[str, float]:
        """Flat metrics for MLflow."""
        flat = {
            f"{row.meshes}.{row.against}.{figure}": getattr(row, figure).mean for row in self.rows for figure in FIGURES
        }
        for signal in dict.fromkeys(row.signal for row in self.spreads):
            of_signal = [row.spread_mm for row in self.spreads if row.signal == signal]
            flat[f"spread.{signal.replace(' ', '-')}.mm"] = sum(of_signal) / len(of_signal)
        return flat


def summarised(compared: ComparedSet) -> SampleRow:
    """Means and standard deviations over the seeds of one comparison."""
    columns = {figure: np.array([getattr(found, figure) for found in compared.figures]) for figure in FIGURES}
    repeats = len(compared.figures)
    figures = {
        name: Repeated(float(values.mean()), float(values.std(ddof=1)) if repeats > 1 else None)
        for name, values in columns.items()
    }
    return SampleRow(compared.meshes, compared.against, compared.count, repeats, **figures)


def random_sheet(photos: Sequence[np.ndarray], faces: Sequence[np.ndarray], columns: int, method: str) -> np.ndarray:
    """Photos of training frames in the first row, random faces below, ``columns`` a row."""
    exposure = suggested_exposure([*photos, *faces])
    rows = [list(photos)] if photos else []
    labels = ["training\nphotos"] if photos else []
    for first in range(0, len(faces), columns):
        rows.append(list(faces[first : first + columns]))
        labels.append("random")
    rows = [[expose(image, exposure) for image in row] for row in rows]
    title = f"{method}: random faces"
    return contact_sheet(rows, column_labels=(), row_labels=labels, title=title, colour_bar=False)


def spread_sheet(results: Sequence[SpreadResult], method: str) -> np.ndarray:
    """One row for each frame and signal: photo, the prior's mean, draws, and the spread as a heat map."""
    seen = [result.heat_mm[result.mask] for result in results if result.mask.any()]
    # Rounded up to a tenth, so that the label is exact; the few vertices beyond are as bright as that.
    largest = max((float(np.quantile(heat, 0.99)) for heat in seen), default=0.0)
    full_scale = max(0.1, np.ceil(10 * largest) / 10)
    exposure = suggested_exposure([picture for result in results for picture in (result.photo, result.start)])
    rows, labels = [], []
    for result in results:
        heat = heat_over_face(result.heat_mm, result.start, result.mask, full_scale)
        rows.append([*(expose(picture, exposure) for picture in (result.photo, result.start, *result.drawn)), heat])
        labels.append(f"{result.row.signal}\n{result.row.frame_id.replace('/', chr(10))}")
    drawn = ["drawn"] * len(results[0].drawn)
    columns = ["photo", "mean", *drawn, f"std, 0 to {full_scale:.1f} mm"]
    return contact_sheet(rows, column_labels=columns, row_labels=labels, title=f"{method}: what signals leave open")
