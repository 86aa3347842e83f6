"""The scores of an evaluation: one row a frame, latent and camera set, and all that tables need besides.

``scores.json`` of an evaluation is a :class:`ScoreSheet`: tables are computed from sheets alone, so several
evaluations, or several seeds of one method, can be put side by side later without running anything again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lipflow.errors import ConfigError
from pipeline import storage

MEAN_FACE = "mean face"
ENCODER = "encoder"
SCORES_FILE = "scores.json"
SCORES_FORMAT = 1


@dataclass(frozen=True)
class FrameScore:
    """One frame under one kind of latent, on one set of cameras.

    Attributes:
        frame_id: ``"SEGMENT/FRAME"``.
        latent: where z comes from: ``mean face``, ``encoder``, or a driving signal.
        iterations: fit iterations; 0: the start.
        cameras: ``train`` or ``held-out``.
        calibrated: whether held-out cameras' gain and bias were solved on the calibration segments.
        views: how many of those cameras saw the frame.
        image_mse: mean over views of the masked mean squared error, 0..255 squared.
        ssim: mean over views.
        geometry_rmse_mm: vertices against the tracked mesh.
        texture_mse: mean of the views' decoded textures, as their cameras see them, against the frame's average
            texture, 0..255 squared; None for held-out cameras.
        image_mse_mouth: over the region's pixels in all views together; None where no view sees it. Likewise ``_eyes``
            and ``_rest``, and those of ``ssim``.
        geometry_rmse_mm_mouth: over the region's vertices; None if it has none. Likewise ``_eyes`` and ``_rest``.
        jitter_mm: how much the mesh shakes between the frames before and after; None where one of them was not scored.
        target_jitter_mm: how much the tracked mesh does.
        fit_seconds: of the fit so far, its batch's time shared by the batch's frames.
    """

    frame_id: str
    latent: str
    iterations: int
    cameras: str
    calibrated: bool
    views: int
    image_mse: float
    ssim: float
    geometry_rmse_mm: float
    texture_mse: float | None = None
    image_mse_mouth: float | None = None
    image_mse_eyes: float | None = None
    image_mse_rest: float | None = None
    ssim_mouth: float | None = None
    ssim_eyes: float | None = None
    ssim_rest: float | None = None
    geometry_rmse_mm_mouth: float | None = None
    geometry_rmse_mm_eyes: float | None = None
    geometry_rmse_mm_rest: float | None = None
    jitter_mm: float | None = None
    target_jitter_mm: float | None = None
    fit_seconds: float = 0.0


@dataclass(frozen=True)
class ScoreSheet:
    """All scores of one avatar on one choice of frames and cameras.

    Attributes:
        name: of the variant; sheets of one name are seeds of it.
        method: the avatar's.
        shards_digest: of the shard set.
        train_frames: scored ones of the training segments.
        held_out_frames: scored ones of held-out segments.
        train_cameras: scored training cameras.
        held_out_cameras: scored held-out cameras.
        calibration_segments: training segments on which held-out cameras' colours were solved.
        uncalibrated_cameras: held-out cameras that no calibration frame shows; they keep their colours in all rows.
        fit: the settings of the fits.
        scores: rows.
    """

    name: str
    method: str
    shards_digest: str
    train_frames: tuple[str, ...]
    held_out_frames: tuple[str, ...]
    train_cameras: tuple[str, ...]
    held_out_cameras: tuple[str, ...]
    calibration_segments: tuple[str, ...]
    uncalibrated_cameras: tuple[str, ...]
    fit: dict[str, Any]
    scores: tuple[FrameScore, ...]

    def expressions(self, frame_id: str) -> str:
        """``train`` or ``held-out``."""
        return "held-out" if frame_id in self.held_out_frames else "train"

    def to_json(self) -> str:
        """The document that :func:`read_scores` reads back to an equal sheet."""
        return json.dumps({"format": SCORES_FORMAT} | asdict(self))


def read_scores(uri: str, name: str | None = None) -> ScoreSheet:
    """The sheet of an evaluation, by its folder or its ``scores.json``, as a path or URI.

    Args:
        uri: where it lies.
        name: instead of the sheet's own.

    Raises:
        StorageError: it cannot be read.
        ConfigError: it is no such document.
    """
    path = uri if uri.endswith(".json") else storage.join(storage.normalize_uri(uri), SCORES_FILE)
    return parse_scores(storage.read_text(path), path, name)


def parse_scores(text: str, place: str, name: str | None = None) -> ScoreSheet:
    """The sheet that :meth:`ScoreSheet.to_json` wrote as ``text``.

    Args:
        text: the document.
        place: where it was found, for errors.
        name: instead of the sheet's own.

    Raises:
        ConfigError: it is no such document.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != SCORES_FORMAT:
        raise ConfigError(f"{place}: expected scores of format {SCORES_FORMAT}: evaluate the avatar again")
    try:
        values = {item.name: document[item.name] for item in fields(ScoreSheet)}
        scores = tuple(FrameScore(**row) for row in values.pop("scores"))
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        sheet = ScoreSheet(**(values | lists), scores=scores)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{place}: a field is missing or unknown ({error}): evaluate the avatar again") from error
    return sheet if name is None else replace(sheet, name=name)


_ALIKE = {
    "shards_digest": "shard sets",
    "train_frames": "training frames",
    "held_out_frames": "held-out frames",
    "train_cameras": "training cameras",
    "held_out_cameras": "held-out cameras",
    "calibration_segments": "calibration segments",
}


def require_comparable(sheets: Sequence[ScoreSheet]) -> None:
    """Refuse sheets whose numbers are of different data.

    Raises:
        ConfigError: no sheets, or some of other frames, cameras or shard sets than the first one's.
    """
    if not sheets:
        raise ConfigError("no scores to compare: name at least one evaluation")
    first = sheets[0]
    for sheet in sheets[1:]:
        for key, what in _ALIKE.items():
            ours, theirs = getattr(first, key), getattr(sheet, key)
            if ours != theirs:
                raise ConfigError(
                    f"{first.name} and {sheet.name} were scored on different {what} ({_short(ours)} and "
                    f"{_short(theirs)}): evaluate them again with one recipe on one shard set"
                )


def _short(value: str | tuple[str, ...]) -> str:
    return value[:12] if isinstance(value, str) else f"{len(value)}: {', '.join(value[:2])}…"


__all__ = [
    "ENCODER",
    "MEAN_FACE",
    "SCORES_FILE",
    "FrameScore",
    "ScoreSheet",
    "parse_scores",
    "read_scores",
    "require_comparable",
]
