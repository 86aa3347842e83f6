"""The two protocols, as tables of score sheets.

``multiface`` (Wuu et al., 2022): the encoder's reconstructions on novel views, novel expressions and both, variants
side by side; what was trained on is shown apart. ``lipflow`` (Aksan et al., 2022): held-out expressions driven by one
poor signal each, after 0, 10, 50 and 200 iterations of the fit, methods side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cluster.scores.sheet import ENCODER, MEAN_FACE, ScoreSheet
from cluster.scores.tables import Cell, Column, IntervalUnit, Key, Row, Table, Variant, interval_note, variants_of
from lipflow.errors import ConfigError
from lipflow.regions import REGIONS
from lipflow.types import DRIVING_SIGNALS

Protocol = Literal["multiface", "lipflow"]

QUADRANTS = {
    "novel view": ("held-out", "train"),
    "novel expression": ("train", "held-out"),
    "both novel": ("held-out", "held-out"),
}
TRAINING_QUADRANT = {"training": ("train", "train")}

_IMAGE, _PSNR, _SSIM, _GEOMETRY, _TEXTURE = (
    Column("image MSE", 2),
    Column("PSNR, dB", 2),
    Column("SSIM", 4),
    Column("geometry, mm", 3),
    Column("texture MSE", 2),
)
_BY_REGION = tuple(
    Column(f"{region}, {unit}", digits) for unit, digits in (("MSE", 2), ("SSIM", 4), ("mm", 3)) for region in REGIONS
)
_METRIC_BY_REGION = tuple(
    f"{metric}_{region}" for metric in ("image_mse", "ssim", "geometry_rmse_mm") for region in REGIONS
)
_RATIOS = (Column("image error ratio", 3), Column("geometry error ratio", 3))


def tables(
    sheets: Sequence[ScoreSheet],
    protocol: Protocol | None = None,
    *,
    unit: IntervalUnit = "auto",
    baseline: str | None = None,
) -> list[Table]:
    """All tables of a protocol, or of both.

    Args:
        sheets: one for each variant and seed, on the same data.
        protocol: None: what the sheets hold.
        unit: what intervals resample.
        baseline: name of the variant whose errors the ratios are over; None: the first one.

    Raises:
        ConfigError: the sheets are of different data, or none is of the baseline.
    """
    variants = variants_of(sheets, unit)
    note = interval_note(sheets, unit)
    base = variants[0] if baseline is None else next((v for v in variants if v.name == baseline), None)
    if base is None:
        raise ConfigError(f"baseline {baseline!r} is none of the variants; choose from {[v.name for v in variants]}")
    found: list[Table] = []
    if protocol != "lipflow":
        found += _quadrant_tables(variants, base, note, _calibration_note(sheets))
    if protocol != "multiface":
        found += _driven_tables(variants, base, note)
    return [table for table in found if table.rows]


def _calibration_note(sheets: Sequence[ScoreSheet]) -> str:
    if not sheets[0].held_out_cameras:
        return ""
    lacking = sorted({camera for sheet in sheets for camera in sheet.uncalibrated_cameras})
    rest = f" Not calibrated, for want of views: {', '.join(lacking)}." if lacking else ""
    return (
        " Held-out cameras have no colour parameters: 'calibrated' solves gain and bias of each by least squares on "
        f"{', '.join(sheets[0].calibration_segments)} (training).{rest}"
    )


def _quadrant_tables(variants: list[Variant], base: Variant, note: str, calibration: str) -> list[Table]:
    main = (_IMAGE, _PSNR, _SSIM, _GEOMETRY, _TEXTURE)
    labels = ("quadrant", "colours", "variant")
    found = [
        Table(
            "quadrants",
            "Novel views and novel expressions",
            f"The encoder's reconstructions; nothing is fitted.{calibration} {note}",
            labels,
            main,
            tuple(_quadrant_rows(variants, QUADRANTS, _main_cells)),
        ),
        Table(
            "training-quadrant",
            "What was trained on",
            f"Training cameras and training expressions, for reference. {note}",
            labels,
            main,
            tuple(_quadrant_rows(variants, TRAINING_QUADRANT, _main_cells)),
        ),
        Table(
            "quadrant-regions",
            "Novel views and novel expressions by region",
            f"Mouth, eyes and rest of the head: errors of image, its SSIM, and of the mesh.{calibration} {note}",
            labels,
            _BY_REGION,
            tuple(_quadrant_rows(variants, QUADRANTS, _region_cells)),
        ),
    ]
    if len(variants) > 1:
        rivals = [variant for variant in variants if variant is not base]
        found.append(
            Table(
                "quadrant-ratios",
                f"Reconstruction errors over those of {base.name}",
                f"Paired by frame; below 1 is better than {base.name}. {note}",
                labels,
                _RATIOS,
                tuple(_quadrant_rows(rivals, QUADRANTS, lambda v, key: _ratio_cells(v, key, base, key))),
            )
        )
    return found


def _quadrant_rows(variants: list[Variant], quadrants: dict[str, tuple[str, str]], cells) -> list[Row]:
    rows = []
    for name, (cameras, expressions) in quadrants.items():
        for calibrated in (True, False) if cameras == "held-out" else (False,):
            key = Key(ENCODER, 0, cameras, expressions, calibrated)
            colours = "trained" if cameras == "train" else "calibrated" if calibrated else "uncalibrated"
            rows += [
                Row((name, colours, variant.name), cells(variant, key)) for variant in variants if key in variant.keys
            ]
    return rows


def _driven_tables(variants: list[Variant], base: Variant, note: str) -> list[Table]:
    keys = {
        signal: sorted({k.iterations for v in variants for k in v.keys if k.latent == signal})
        for signal in DRIVING_SIGNALS
    }
    labels = ("driven by", "method", "iterations")
    lines = [
        (variant, Key(signal, count))
        for signal, counts in keys.items()
        for variant in variants
        for count in counts
        if Key(signal, count) in variant.keys
    ]
    if not lines:
        return []
    references = [(variant, Key(ENCODER)) for variant in variants if Key(ENCODER) in variant.keys]
    # The mean face follows from the shard set; only the colours of the cameras are the avatar's.
    references += [(variant, Key(MEAN_FACE)) for variant in variants[:1] if Key(MEAN_FACE) in variant.keys]
    said = "Held-out expressions on training cameras but the frontal one, which is never scored."

    def rows(cells, chosen) -> tuple[Row, ...]:
        return tuple(Row(_driven_labels(variant, key), cells(variant, key)) for variant, key in chosen)

    found = [
        Table(
            "driven",
            "Driven by one signal",
            f"{said} The encoder sees the whole capture. Jitter is the mesh's shaking over that of the tracked mesh; "
            f"time is that of a frame, in a batch. {note}",
            labels,
            (_IMAGE, _PSNR, _SSIM, _GEOMETRY, _TEXTURE, Column("jitter, × target's", 2), Column("fit, s", 3)),
            rows(_driven_cells, lines + references),
        ),
        Table(
            "driven-regions",
            "Driven by one signal, by region",
            f"{said} {note}",
            labels,
            _BY_REGION,
            rows(_region_cells, lines + references),
        ),
    ]

    def most(signal: str) -> Key:
        return Key(signal, max((k.iterations for k in base.keys if k.latent == signal), default=0))

    against = [(v, k) for v, k in lines if most(k.latent) in base.keys and not (v is base and k == most(k.latent))]
    last = max(k.iterations for _, k in lines)
    found.append(
        Table(
            "driven-ratios",
            f"Errors over those of {base.name} after its most iterations ({last})",
            f"Paired by frame; below 1 is better. {said} {note}",
            labels,
            _RATIOS,
            rows(lambda v, key: _ratio_cells(v, key, base, most(key.latent)), against),
        )
    )
    return found


def _driven_labels(variant: Variant, key: Key) -> tuple[str, str, str]:
    if key.latent in DRIVING_SIGNALS:
        return key.latent, variant.name, str(key.iterations)
    return "reference", key.latent if key.latent == MEAN_FACE else f"{variant.name}, {key.latent}", ""


def _main_cells(variant: Variant, key: Key) -> tuple[Cell, ...]:
    return (
        variant.mean(key, "image_mse"),
        variant.psnr_db(key),
        variant.mean(key, "ssim"),
        variant.mean(key, "geometry_rmse_mm"),
        variant.mean(key, "texture_mse"),
    )


def _driven_cells(variant: Variant, key: Key) -> tuple[Cell, ...]:
    seconds = variant.seconds(key) if key.latent in DRIVING_SIGNALS else None
    return (*_main_cells(variant, key), variant.jitter(key), seconds)


def _region_cells(variant: Variant, key: Key) -> tuple[Cell, ...]:
    return tuple(variant.mean(key, metric) for metric in _METRIC_BY_REGION)


def _ratio_cells(variant: Variant, key: Key, base: Variant, base_key: Key) -> tuple[Cell, ...]:
    return tuple(variant.ratio(key, metric, base, base_key) for metric in ("image_mse", "geometry_rmse_mm"))


__all__ = ["QUADRANTS", "Protocol", "tables"]
