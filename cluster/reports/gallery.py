"""Pictures of an evaluation: chosen frames for each latent, and its failures, the worst frames by each metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.reports.pictures import comparison_row, contact_sheet, suggested_exposure
from cluster.scores.area_sampling import render_area
from cluster.scores.scene import open_scene
from cluster.scores.scoring import image_size, picture_camera
from cluster.scores.sheet import MEAN_FACE, FrameScore
from lipflow.config import RenderConfig

PICTURE_SAMPLES = 3
"""Samples along each axis of a pixel in the pictures that are shown."""

FAILURE_METRICS = ("image_mse", "geometry_rmse_mm")


@dataclass(frozen=True)
class Picture:
    """A photo and its reconstruction, both ``(H, W, 3)`` uint8; outside the head the reconstruction is black."""

    frame_id: str
    camera_id: str
    latent: str
    photo: np.ndarray
    reconstruction: np.ndarray


@dataclass(frozen=True)
class Failure:
    """One of the worst frames of a latent.

    Attributes:
        metric: by which it is among the worst, of ``FAILURE_METRICS``.
        rank: 1 is the worst.
        score: its figures, over all scored cameras.
        median: of the metric over all frames of the same kind.
    """

    metric: str
    rank: int
    score: FrameScore
    median: float


def worst_frames(scores: Sequence[FrameScore], held_out: Sequence[str], count: int) -> list[Failure]:
    """The ``count`` worst held-out frames of each latent by each metric, after the most iterations.

    Seen by training cameras. The mean face, which follows nothing, has no failures.
    """
    chosen: dict[str, list[FrameScore]] = {}
    kept = set(held_out)
    for score in scores:
        if score.frame_id in kept and score.cameras == "train" and score.latent != MEAN_FACE:
            chosen.setdefault(score.latent, []).append(score)
    failures = []
    for group in chosen.values():
        most = max(score.iterations for score in group)
        final = [score for score in group if score.iterations == most]
        for metric in FAILURE_METRICS:
            median = float(np.median([getattr(score, metric) for score in final]))
            ranked = sorted(final, key=lambda score: (-getattr(score, metric), score.frame_id))
            failures += [Failure(metric, rank + 1, score, median) for rank, score in enumerate(ranked[:count])]
    return failures


def draw_pictures(
    avatar_uri: str, shards_uri: str, render: RenderConfig, latent: str, codes: Mapping[str, Sequence[float]]
) -> list[Picture]:
    """One picture of each frame, by the camera that looks most like the frontal one.

    Args:
        avatar_uri: the avatar.
        shards_uri: the shard set.
        render: how images are drawn.
        latent: where the codes come from.
        codes: frame id -> z.
    """
    scene = open_scene(avatar_uri, shards_uri, render)
    camera_id = picture_camera(scene.shards)
    pictures = []
    with torch.no_grad():
        for frame_id, z in codes.items():
            batch = scene.shards.frames([frame_id], [camera_id], signals=())
            decoded = scene.avatar.decode(torch.tensor([z]), batch.cameras.view_vectors())
            textures = scene.avatar.correct_color(decoded.textures, batch.camera_index)
            size = image_size(batch)
            image = render_area(scene.renderer, decoded.vertices, textures, batch.cameras, size, PICTURE_SAMPLES).image
            pictures.append(
                Picture(
                    frame_id=frame_id,
                    camera_id=camera_id,
                    latent=latent,
                    photo=batch.images[0, 0].permute(1, 2, 0).numpy(),
                    reconstruction=image[0].permute(1, 2, 0).clamp(0, 255).round().to(torch.uint8).numpy(),
                )
            )
    return pictures


def picture_sheets(pictures_of: Mapping[str, Sequence[Picture]]) -> dict[str, np.ndarray]:
    """For each driving signal (and the encoder) one sheet of photo | reconstruction | error rows.

    Args:
        pictures_of: variant -> its pictures, of the same frames; rows of several variants stand below each other.
    """
    everything = [picture for pictures in pictures_of.values() for picture in pictures]
    if not everything:
        return {}
    exposure = suggested_exposure([picture.photo for picture in everything])
    sheets = {}
    for latent in dict.fromkeys(picture.latent for picture in everything):
        rows, labels = [], []
        for frame_id in dict.fromkeys(picture.frame_id for picture in everything):
            for variant, pictures in pictures_of.items():
                for picture in pictures:
                    if (picture.latent, picture.frame_id) == (latent, frame_id):
                        rows.append(_row(picture, exposure))
                        labels.append(f"{variant}\n{_on_two_lines(frame_id)}")
        sheets[latent] = contact_sheet(rows, row_labels=labels, title=latent)
    return sheets


def failure_sheets(failures: Sequence[Failure], pictures: Sequence[Picture]) -> dict[str, np.ndarray]:
    """For each latent and metric one sheet: the worst frames with their figures, worst first.

    Args:
        failures: of one avatar.
        pictures: of their frames, at least.
    """
    picture_of = {(picture.latent, picture.frame_id): picture for picture in pictures}
    if not failures:
        return {}
    exposure = suggested_exposure([picture.photo for picture in pictures])
    sheets = {}
    for latent, metric in dict.fromkeys((failure.score.latent, failure.metric) for failure in failures):
        group = [failure for failure in failures if (failure.score.latent, failure.metric) == (latent, metric)]
        rows = [_row(picture_of[latent, failure.score.frame_id], exposure) for failure in group]
        labels = [
            f"{failure.rank}. {_on_two_lines(failure.score.frame_id)}\n"
            f"image MSE {failure.score.image_mse:.1f}\nRMSE {failure.score.geometry_rmse_mm:.2f} mm"
            for failure in group
        ]
        unit = "image MSE" if metric == "image_mse" else "geometry RMSE, mm"
        title = f"{latent}: worst by {unit} (median {group[0].median:.2f})"
        sheets[f"{latent}-{metric}"] = contact_sheet(rows, row_labels=labels, title=title)
    return sheets


def _row(picture: Picture, exposure: float) -> list[np.ndarray]:
    mask = picture.reconstruction.max(-1)
    return comparison_row(picture.photo, picture.reconstruction, mask=mask, exposure=exposure)


def _on_two_lines(frame_id: str) -> str:
    return frame_id.replace("/", "\n")
