"""Score sheets made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster.scores.sheet import FrameScore, ScoreSheet

FRAMES = ("S1/000001", "S1/000002", "S2/000001", "S2/000002")
DIGEST = "d" * 64


def scores_of(
    latent: str, iterations: int, mse: Mapping[str, float], rmse_mm: Mapping[str, float], **others: Any
) -> list[FrameScore]:
    """Rows of training cameras, one for each frame of ``mse``."""
    return [
        replace(
            FrameScore(
                frame_id=frame,
                latent=latent,
                iterations=iterations,
                cameras="train",
                calibrated=False,
                views=3,
                image_mse=value,
                ssim=0.9,
                geometry_rmse_mm=rmse_mm[frame],
            ),
            **others,
        )
        for frame, value in mse.items()
    ]


def sheet_of(name: str, scores: list[FrameScore], **changes: Any) -> ScoreSheet:
    """A sheet with four held-out frames of two segments."""
    sheet = ScoreSheet(
        name=name,
        method="lipflow",
        shards_digest=DIGEST,
        train_frames=("T/000001",),
        held_out_frames=FRAMES,
        train_cameras=("a", "b", "c"),
        held_out_cameras=("h",),
        calibration_segments=("T",),
        uncalibrated_cameras=(),
        fit={},
        scores=tuple(scores),
    )
    return replace(sheet, **changes)


def constant(value: float) -> dict[str, float]:
    """The same figure in every held-out frame."""
    return dict.fromkeys(FRAMES, value)
