"""The tables of the science study, in markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from science_findings import Findings, Row
from torch import Tensor

from lipflow.bootstrap import bootstrap_ratio
from lipflow.metrics import psnr
from lipflow.types import DRIVING_SIGNALS

_BASELINE = "dam"
_ERRORS = ("image_mse", "geometry_rmse_mm")
_ABLATIONS = (
    ("prior-sample reconstruction", "conditional+prior-rec", "conditional"),
    ("flow", "lipflow", "conditional+prior-rec"),
    ("drivers", "dam-regressor", "dam"),
)


def all_tables(found: Findings, baseline_iterations: int) -> str:
    """All tables, one below the other."""
    tables = (
        choices_table(found),
        driven_table(found, baseline_iterations),
        encoders_table(found),
        ablations_table("Ablations on held-out expressions", found.fits),
        fitting_table(found),
        regions_table(found, baseline_iterations),
        variants_table(found),
        ambiguous_table(found),
        ablations_table("Ablations on ambiguous signals", found.ambiguous_fits),
        samples_table(found),
        uncertainty_table(found),
        densities_table(found),
        costs_table(found),
    )
    missing = [] if found.complete else ["**Incomplete**: the time was over; rows and tables are missing."]
    return "\n\n".join([*missing, *tables])


def choices_table(found: Findings) -> str:
    """What validation frames chose."""
    rows = [
        (method, signal, _named(choice.fit), "; ".join(f"{_named(fit)}: {score:.3f}" for fit, score in choice.tried))
        for (method, signal), choice in found.choices.items()
    ]
    weights = ", ".join(f"{method} {weight:g}" for method, weight in found.latent_weights.items())
    title = f"Chosen on validation frames; weight of the latent term: {weights}"
    return _table(title, ("method", "signal", "fit", "tried: log error"), rows)


def _named(settings: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def driven_table(found: Findings, baseline_iterations: int) -> str:
    """Method x signal x iterations on held-out expressions, with ratios to the tuned DAM at its most iterations."""
    rows = []
    for signal in DRIVING_SIGNALS:
        for method in in_order(row["method"] for row in found.fits):
            for count in in_order(row["iterations"] for row in found.fits):
                chosen = where(found.fits, method=method, latent=signal, iterations=count)
                if not chosen:
                    continue
                base = where(found.fits, method=_BASELINE, latent=signal, iterations=baseline_iterations)
                image, geometry = by_seed(chosen, "image_mse"), by_seed(chosen, "geometry_rmse_mm")
                ratios = [_ratio(chosen, base, key) for key in _ERRORS]
                rows.append(
                    (
                        *(signal, method, str(count), f"{image.mean():.2f}", f"{psnr(image).mean():.2f}"),
                        *(f"{geometry.mean():.3f}", *ratios),
                    )
                )
    columns = ("signal", "method", "it", "image MSE", "PSNR dB", "geometry mm", "image / DAM", "geometry / DAM")
    return _table(f"Held-out expressions; ratios to the tuned DAM at {baseline_iterations} iterations", columns, rows)


def encoders_table(found: Findings) -> str:
    """What the decoders can do where the encoder sees the whole face, and the mean face."""
    title = "Held-out expressions as the encoders have them"
    return _grouped(title, found.encoders, ("latent", "method"), _ERRORS)


def ablations_table(title: str, fits: Sequence[Row]) -> str:
    """One method against another that lacks one part of it: ratios of errors."""
    rows = [
        (signal, f"{name}: {with_it} / {without}", str(count), *(_ratio(above, below, key) for key in _ERRORS))
        for signal in in_order(row["latent"] for row in fits)
        for name, with_it, without in _ABLATIONS
        for count in sorted({row["iterations"] for row in fits})
        if (above := where(fits, latent=signal, method=with_it, iterations=count))
        if (below := where(fits, latent=signal, method=without, iterations=count))
    ]
    return _table(title, ("signal", "part", "it", "image", "geometry"), rows)


def fitting_table(found: Findings) -> str:
    """What the fit adds to its own start."""
    rows = []
    for signal in DRIVING_SIGNALS:
        for method in in_order(row["method"] for row in found.fits):
            start = where(found.fits, method=method, latent=signal, iterations=0)
            for count in sorted({row["iterations"] for row in where(found.fits, method=method)} - {0}):
                chosen = where(found.fits, method=method, latent=signal, iterations=count)
                if not chosen:
                    continue
                ratios = [_ratio(chosen, start, key) for key in _ERRORS]
                rows.append((signal, method, str(count), *ratios))
    return _table("Fits against their own starts", ("signal", "method", "it", "image", "geometry"), rows)


def regions_table(found: Findings, baseline_iterations: int) -> str:
    """Mouth and eyes apart."""
    columns = [f"{error}_{region}" for region in ("mouth", "eyes") for error in _ERRORS]
    rows = []
    for signal in DRIVING_SIGNALS:
        base = where(found.fits, method=_BASELINE, latent=signal, iterations=baseline_iterations)
        for method in in_order(row["method"] for row in found.fits):
            for count in in_order(row["iterations"] for row in where(found.fits, method=method)):
                chosen = where(found.fits, method=method, latent=signal, iterations=count)
                rows.append((signal, method, str(count), *(_ratio(chosen, base, key) for key in columns)))
    title = f"Regions: ratios to the tuned DAM at {baseline_iterations} iterations"
    return _table(title, ("signal", "method", "it", *columns), rows)


def variants_table(found: Findings) -> str:
    """Variant x three quadrants, image MSE and ratio to the first variant."""
    held_out = set(found.data["frames"]["test"])
    quadrants = (("held-out", False, "novel view"), ("train", True, "novel expression"), ("held-out", True, "both"))
    names = in_order(row["variant"] for row in found.reconstructions)
    rows = []
    for name in names:
        cells = []
        for cameras, novel, _ in quadrants:
            # Held-out cameras have no colours of their own: theirs were solved on training segments.
            wanted = {"cameras": cameras, "latent": "encoder", "calibrated": cameras == "held-out"}
            kept = [row for row in found.reconstructions if (row["frame_id"] in held_out) == novel]
            ours, first = (where(kept, variant=variant, **wanted) for variant in (name, names[0]))
            cells += [f"{by_seed(ours, 'image_mse').mean():.2f}", _ratio(ours, first, "image_mse")]
        rows.append((name, *cells))
    columns = [part for _, _, title in quadrants for part in (title, f"/ {names[0]}")] if names else []
    return _table("Variants of the DAM: image MSE of the encoder's reconstructions", ("variant", *columns), rows)


def ambiguous_table(found: Findings) -> str:
    """Avatars that see little: eyes alone, or five landmarks."""
    title = "Held-out expressions driven by ambiguous signals"
    return _grouped(title, found.ambiguous_fits, ("latent", "method", "iterations"), _ERRORS)


def samples_table(found: Findings) -> str:
    """Random samples of the priors."""
    keys = (
        *("frechet_mm2", "held_out_frechet_mm2", "real_frechet_mm2"),
        *("precision", "recall", "diversity_mm", "real_diversity_mm"),
    )
    rows = []
    for method in in_order(row["method"] for row in found.samples):
        of, base = where(found.samples, method=method), where(found.samples, method=_BASELINE)
        ratio = f"{_mean(of, keys[0]) / _mean(base, keys[0]):.3f}" if base else "-"
        rows.append((method, ratio, *(", ".join(f"{row[key]:.3f}" for row in of) for key in keys)))
    return _table("Random samples without any signal, seed by seed", ("method", "frechet / DAM", *keys), rows)


def _mean(rows: Sequence[Row], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def uncertainty_table(found: Findings) -> str:
    """p(z | h) as a distribution."""
    keys = ("gap_nats", "calibration_rms", "energy_mm", "spread_mm")
    return _grouped("What a signal leaves open", found.uncertainty, ("shown", "signal", "method"), keys)


def densities_table(found: Findings) -> str:
    """Flow or none on frozen codes."""
    keys = ("nats", "calibration_rms")
    return _grouped(
        "-log p(z | h) per dimension of a frozen DAM's codes", found.densities, ("shown", "signal", "flow"), keys
    )


def costs_table(found: Findings) -> str:
    """What it took."""
    totals: dict[str, list[float]] = {}
    for (kind, _), seconds in found.cpu_s.items():
        totals.setdefault(kind, []).append(seconds)
    rows = [(kind, str(len(seconds)), f"{sum(seconds):.0f}", f"{max(seconds):.0f}") for kind, seconds in totals.items()]
    return _table("CPU seconds by kind of task", ("kind", "tasks", "all", "longest"), rows)


def _ratio(above: Sequence[Row], below: Sequence[Row], key: str) -> str:
    """``ratio [low, high]``, 95 %, of the means of two methods on the same frames; ``-`` while one is missing.

    Whole segments and seeds are resampled: frames of one segment are not independent.
    """
    if not above or not below:
        return "-"
    segments = [frame.split("/")[0] for frame in sorted({row["frame_id"] for row in above})]
    found = bootstrap_ratio(by_seed(above, key), by_seed(below, key), blocks=segments)
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _grouped(title: str, rows: Sequence[Row], group: tuple[str, ...], keys: tuple[str, ...]) -> str:
    """Means over frames and seeds, and over the seeds apart."""
    lines = []
    for values in in_order(tuple(row[name] for name in group) for row in rows):
        grids = [by_seed(where(rows, **dict(zip(group, values, strict=True))), key) for key in keys]
        seeds = [" / ".join(f"{mean:.3f}" for mean in grid.mean(1).tolist()) for grid in grids]
        lines.append(
            (*map(str, values), *(f"{grid.mean():.3f} ({apart})" for grid, apart in zip(grids, seeds, strict=True)))
        )
    return _table(f"{title}, mean (seed by seed)", (*group, *keys), lines)


def where(rows: Iterable[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def by_seed(rows: Sequence[Row], key: str) -> Tensor:
    """``(seeds, frames)`` float64, frames in the same order for all."""
    seeds, frames = sorted({row["seed"] for row in rows}), sorted({row["frame_id"] for row in rows})
    values = {(row["seed"], row["frame_id"]): row[key] for row in rows}
    return torch.tensor([[values[seed, frame] for frame in frames] for seed in seeds], dtype=torch.float64)


def in_order(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return "\n".join([f"### {title}", "", line(columns), line(["---"] * len(columns)), *map(line, rows)])
