"""What the tasks of ``lipflow sample`` compute: figures of drawn meshes, and pictures of drawn faces.

Drawn and real meshes are compared at equal counts, in the principal components of the same training meshes; see
:mod:`lipflow.sample_metrics` for what few samples do to the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cluster.scores.scene import open_scene
from lipflow.config import RenderConfig
from lipflow.metrics import geometry_rmse_mm
from lipflow.model.avatar import Avatar
from lipflow.render.renderer import Renderer, RenderOutput
from lipflow.render.vertex_values import vertex_values_seen
from lipflow.sample_metrics import (
    MeshPca,
    diversity_mm,
    fit_mesh_pca,
    frechet_distance,
    precision_recall,
)
from lipflow.sampling import decode_meshes, draw_driven_latents, draw_latents, vertex_std_mm
from lipflow.types import FrameBatch
from pipeline.loading.loader import ShardSet

RANDOM, RECONSTRUCTED, REAL = "random", "reconstructed", "real"
NO_SIGNAL = "no signal"

PICTURE_HEIGHT_PX = 448
"""Of all pictures, whatever the size of the photos: twice that of a sheet's tiles."""

_FRAMES_AT_ONCE = 16
"""Read and encoded together: their average textures are in memory only so long."""


@dataclass(frozen=True)
class DrawFigures:
    """One set of meshes compared with real ones.

    Attributes:
        frechet_mm2: Frechet distance in mesh-PCA space, squared mm of RMS vertex distance.
        precision: share of the set that lies where real meshes do.
        recall: share of real meshes that lie where the set does.
        diversity_mm: mean RMS vertex distance between two of the set.
    """

    frechet_mm2: float
    precision: float
    recall: float
    diversity_mm: float


@dataclass(frozen=True)
class ComparedSet:
    """Meshes of one origin, compared with real ones, once or under several seeds.

    Attributes:
        meshes: ``random`` (drawn without a signal), ``reconstructed`` (the decoder at the encoder's mean of the real
            ones: what a perfect prior would reach at best) or ``real``.
        against: the split of the real meshes: ``train`` or ``test``.
        count: meshes on both sides.
        figures: one for each seed.
    """

    meshes: str
    against: str
    count: int
    figures: tuple[DrawFigures, ...]


@dataclass(frozen=True)
class MetricsResult:
    """All comparisons.

    Attributes:
        sets: one for each origin and split.
        components: of the mesh-PCA space.
        explained: share of the training meshes' variance that they hold.
    """

    sets: tuple[ComparedSet, ...]
    components: int
    explained: float


@dataclass(frozen=True)
class OpenSpread:
    """What a signal leaves open in one frame.

    Attributes:
        signal: that the faces were drawn under, or ``no signal``.
        frame_id: ``"SEGMENT/FRAME"``.
        draws: how many.
        spread_mm: root mean square over vertices of their standard deviation over the draws.
        error_mm: RMS vertex distance of the prior's start f^-1(mean) from the tracked mesh; None without a signal.
    """

    signal: str
    frame_id: str
    draws: int
    spread_mm: float
    error_mm: float | None


@dataclass(frozen=True)
class SpreadResult:
    """One frame under one signal: figures, and pictures of any size but for those of equal ``(h, w)``.

    Attributes:
        row: its figures.
        photo: ``(H, W, 3)`` uint8.
        start: ``(h, w, 3)`` uint8, the face of f^-1(mean).
        drawn: ``(h, w, 3)`` uint8, some of the drawn faces.
        heat_mm: ``(h, w)`` standard deviation over the draws of the vertices that the start shows.
        mask: ``(h, w)`` bool, where it shows any.
    """

    row: OpenSpread
    photo: np.ndarray
    start: np.ndarray
    drawn: list[np.ndarray]
    heat_mm: np.ndarray
    mask: np.ndarray


def compare(real: Tensor, meshes: Tensor, space: MeshPca, neighbours: int) -> DrawFigures:
    """Figures of ``meshes (N, V, 3)`` against as many ``real (N, V, 3)``, in mm.

    Raises:
        ValueError: the counts differ, or there are no more meshes than neighbours.
    """
    if len(real) != len(meshes):
        raise ValueError(f"{len(meshes)} meshes and {len(real)} real ones: these figures need equal counts")
    there, here = space.project(real), space.project(meshes)
    found = precision_recall(there, here, neighbours)
    return DrawFigures(frechet_distance(there, here), found.precision, found.recall, diversity_mm(meshes))


def compare_sets(
    avatar_uri: str,
    shards_uri: str,
    train_ids: Sequence[str],
    test_ids: Sequence[str],
    seeds: Sequence[int],
    components: int,
    neighbours: int,
) -> MetricsResult:
    """Drawn, reconstructed and held-out meshes against the real ones of ``train_ids`` and ``test_ids``.

    A split of no more frames than ``neighbours`` is left out.

    Args:
        avatar_uri: the avatar.
        shards_uri: the shard set.
        train_ids: training frames; as many faces are drawn.
        test_ids: held-out frames, at most as many.
        seeds: one set of draws each.
        components: at most, of the mesh-PCA space, which is that of the training frames.
        neighbours: of precision and recall.
    """
    scene = open_scene(avatar_uri, shards_uri, RenderConfig())
    avatar, shards = scene.avatar, scene.shards
    train, reconstructed = _meshes(avatar, shards, train_ids)
    space = fit_mesh_pca(train, components)

    def repeated(real: Tensor) -> tuple[DrawFigures, ...]:
        drawn = (decode_meshes(avatar, draw_latents(avatar, len(real), _seeded(seed))) for seed in seeds)
        return tuple(compare(real, meshes, space, neighbours) for meshes in drawn)

    sets = [
        ComparedSet(RANDOM, "train", len(train), repeated(train)),
        ComparedSet(RECONSTRUCTED, "train", len(train), (compare(train, reconstructed, space, neighbours),)),
    ]
    if len(test_ids) > neighbours:
        test, reconstructed = _meshes(avatar, shards, test_ids)
        # Evenly spread, as they were chosen.
        few = train[torch.linspace(0, len(train) - 1, len(test)).round().long()]
        sets += [
            ComparedSet(RANDOM, "test", len(test), repeated(test)),
            ComparedSet(RECONSTRUCTED, "test", len(test), (compare(test, reconstructed, space, neighbours),)),
            ComparedSet(REAL, "test", len(test), (compare(test, few, space, neighbours),)),
        ]
    return MetricsResult(tuple(sets), len(space.components), space.explained)


def draw_faces(
    avatar_uri: str, shards_uri: str, render: RenderConfig, frame_id: str, camera_id: str, count: int, seed: int
) -> list[np.ndarray]:
    """``count`` random faces, each ``(h, w, 3)`` uint8, as ``camera_id`` would see them in the pose of ``frame_id``."""
    scene = open_scene(avatar_uri, shards_uri, render)
    avatar, renderer, shards = scene.avatar, scene.renderer, scene.shards
    batch = shards.frames([frame_id], [camera_id], signals=())
    latents = draw_latents(avatar, count, _seeded(seed))
    return [_shown(_render(avatar, renderer, batch, z)) for z in latents.split(1)]


def open_spread(
    avatar_uri: str,
    shards_uri: str,
    render: RenderConfig,
    frame_id: str,
    signal: str,
    camera_id: str,
    draws: int,
    drawn_pictures: int,
    seed: int,
) -> SpreadResult:
    """How far the faces that one frame's signal allows differ, vertex by vertex.

    Args:
        avatar_uri: the avatar.
        shards_uri: the shard set.
        render: how pictures are drawn.
        frame_id: whose signal.
        signal: a driving signal that the avatar has a driver for, or :data:`NO_SIGNAL`.
        camera_id: that the pictures show.
        draws: from the prior, at least 2.
        drawn_pictures: how many of them are pictured.
        seed: of the draws.
    """
    scene = open_scene(avatar_uri, shards_uri, render)
    avatar, renderer, shards = scene.avatar, scene.renderer, scene.shards
    batch = shards.frames([frame_id], [camera_id])
    with torch.no_grad():
        if signal == NO_SIGNAL:
            latents = draw_latents(avatar, draws, _seeded(seed))
            start = avatar.start(avatar.prior_without_signal(1))
        else:
            latents = draw_driven_latents(avatar, (signal,), batch.driving, draws, _seeded(seed))[:, 0]
            start = avatar.start_from((signal,), batch.driving)
        error = geometry_rmse_mm(avatar.decode_vertices(start), batch.vertices).item()
    std = vertex_std_mm(decode_meshes(avatar, latents))
    rendered = _render(avatar, renderer, batch, start)
    heat = vertex_values_seen(renderer, rendered, std[None])[0, 0]
    return SpreadResult(
        row=OpenSpread(
            signal,
            frame_id,
            draws,
            spread_mm=std.square().mean().sqrt().item(),
            error_mm=None if signal == NO_SIGNAL else error,
        ),
        photo=batch.images[0, 0].permute(1, 2, 0).numpy(),
        start=_shown(rendered),
        drawn=[_shown(_render(avatar, renderer, batch, z)) for z in latents[:drawn_pictures].split(1)],
        heat_mm=heat.float().numpy(),
        mask=rendered.mask[0, 0].numpy(),
    )


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def _meshes(avatar: Avatar, shards: ShardSet, frame_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tracked meshes and what the encoder's means decode to, both ``(N, V, 3)`` mm."""
    tracked, reconstructed = [], []
    for start in range(0, len(frame_ids), _FRAMES_AT_ONCE):
        batch = shards.frames(list(frame_ids[start : start + _FRAMES_AT_ONCE]), shards.train_camera_ids[:1], signals=())
        tracked.append(batch.vertices)
        z = avatar.encode(batch.vertices, batch.average_texture).mean
        reconstructed.append(avatar.decode_vertices(z))
    return torch.cat(tracked), torch.cat(reconstructed)


@torch.no_grad()
def _render(avatar: Avatar, renderer: Renderer, batch: FrameBatch, z: Tensor) -> RenderOutput:
    """The face ``z (1, D)`` in the only view of the batch's only frame, at the size of pictures."""
    height, width = batch.images.shape[-2:]
    size = (PICTURE_HEIGHT_PX, max(1, round(width * PICTURE_HEIGHT_PX / height)))
    scale = batch.vertices.new_tensor([size[1] / width, size[0] / height, 1.0])
    cameras = replace(batch.cameras, intrinsics=batch.cameras.intrinsics * scale[:, None])
    decoded = avatar.decode(z, cameras.view_vectors())
    textures = avatar.correct_color(decoded.textures, batch.camera_index)
    return renderer.render(decoded.vertices, textures, cameras, size)


def _shown(rendered: RenderOutput) -> np.ndarray:
    return rendered.image[0, 0].permute(1, 2, 0).clamp(0, 255).round().to(torch.uint8).numpy()
