"""What the science study found: rows of frames, choices on validation frames, and what it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """What validation frames chose for a method and signal.

    Attributes:
        fit: the settings.
        tried: (settings, score) of all that was tried, the best first.
    """

    fit: dict[str, float]
    tried: tuple[tuple[dict[str, Any], float], ...]


@dataclass
class Findings:
    """All rows; each has the frame, the method or variant, and the seed.

    Attributes:
        latent_weights: method -> weight of its latent term that validation frames chose, of the DAM and LiP-Flow.
        choices: (method, signal) -> settings of its fits.
        fits: driven held-out frames, by signal and iterations.
        ambiguous_fits: the same of avatars that see the ambiguous signals alone.
        encoders: reconstructions of held-out frames by each method's encoder, and the mean face.
        reconstructions: the variants' encoders', in all four quadrants.
        uncertainty: of p(z | h).
        densities: of frozen codes.
        samples: of the priors, one row for each method and seed.
        cpu_s: (kind, name) of every task -> CPU seconds.
        portrayed: method -> its avatar of the first seed, for pictures of random faces.
        data: what the shard set holds.
        complete: whether everything was done.
    """

    data: dict[str, Any]
    latent_weights: dict[str, float] = field(default_factory=dict)
    choices: dict[tuple[str, str], Choice] = field(default_factory=dict)
    fits: list[Row] = field(default_factory=list)
    ambiguous_fits: list[Row] = field(default_factory=list)
    encoders: list[Row] = field(default_factory=list)
    reconstructions: list[Row] = field(default_factory=list)
    uncertainty: list[Row] = field(default_factory=list)
    densities: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    cpu_s: dict[tuple[str, str], float] = field(default_factory=dict)
    portrayed: dict[str, str] = field(default_factory=dict)
    complete: bool = False
