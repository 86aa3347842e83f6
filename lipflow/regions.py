"""Which part of a face a vertex or a pixel belongs to: ``mouth``, ``eyes`` or ``rest``.

Errors of a whole head hide those of its mouth and eyes, which are small and which people look at. The regions follow
from the topology's landmarks and a capture's mean mesh, for every topology by the same rule, and are stored nowhere:

    a vertex belongs to its nearest landmark; if that is one of the lips (eyes, without the brows) and not farther than
    ``REACH`` times the distance of the outer corners of the eyes, the vertex is of the mouth (eyes), else of the rest.

So brows, nose and chin bound the regions, which reach about 15 mm around lips and lids on a head of natural size, and
into the mouth. A triangle belongs to the region of at least two of its vertices, a pixel to that of the triangle it
sees.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lipflow.types import Topology

REGIONS = ("mouth", "eyes", "rest")
"""Names of the labels 0, 1, 2."""

REACH = 0.16
"""Of the distance of the eyes' outer corners, 94 mm on the real head."""

_MOUTH, _EYES, _REST = range(3)
_PREFIXES = {"lip_": _MOUTH, "eye_": _EYES}
_OUTER_CORNERS = ("eye_left_outer", "eye_right_outer")


def vertex_regions(topology: Topology, vertices_mean: np.ndarray) -> np.ndarray:
    """``(V,)`` int64 labels, indices into ``REGIONS``.

    All are ``rest`` where the topology lacks the outer corners of the eyes, from which the reach is measured.

    Args:
        topology: with landmarks named as in :mod:`lipflow.types`, ``lip_*`` and ``eye_*`` among them.
        vertices_mean: ``(V, 3)`` mm, the capture's mean mesh.
    """
    labels = np.full(topology.num_vertices, _REST, np.int64)
    if any(name not in topology.landmarks for name in _OUTER_CORNERS):
        return labels
    left, right = (vertices_mean[topology.landmarks[name]] for name in _OUTER_CORNERS)
    reach_mm = REACH * float(np.linalg.norm(left - right))
    names = list(topology.landmarks)
    region = np.array([next((_PREFIXES[p] for p in _PREFIXES if name.startswith(p)), _REST) for name in names])
    places = vertices_mean[[int(topology.landmarks[name]) for name in names]]
    distance = np.linalg.norm(vertices_mean[:, None] - places[None], axis=-1)
    nearest = distance.argmin(1)
    near = distance[np.arange(len(distance)), nearest] <= reach_mm
    labels[near] = region[nearest[near]]
    return labels


def face_regions(topology: Topology, labels: np.ndarray) -> np.ndarray:
    """``(F,)`` int64 label of every triangle: that of two of its vertices, or ``rest`` if all three differ.

    Args:
        topology: the triangles.
        labels: ``(V,)`` of :func:`vertex_regions`.
    """
    corners = np.sort(labels[topology.faces], axis=1)
    agreed = (corners[:, 0] == corners[:, 1]) | (corners[:, 1] == corners[:, 2])
    return np.where(agreed, corners[:, 1], _REST)


def pixel_regions(triangle_id: Tensor, face_labels: Tensor) -> Tensor:
    """Label of every pixel, -1 where nothing is seen.

    Args:
        triangle_id: ``(...)`` int32 of :class:`lipflow.render.renderer.RenderOutput`, of the *tracked* mesh, so that
            all methods are compared on the same pixels.
        face_labels: ``(F,)`` int64 of :func:`face_regions`.
    """
    label = face_labels[triangle_id.clamp(min=0).long()]
    return torch.where(triangle_id >= 0, label, torch.full_like(label, -1))


def region_means(values: Tensor, labels: Tensor) -> Tensor:
    """``(3,)`` float64 means of ``values`` over all places of each region, NaN for a region without any.

    Args:
        values: any shape.
        labels: the same shape; -1 belongs nowhere.
    """
    if values.shape != labels.shape:
        raise ValueError(f"values {tuple(values.shape)} and labels {tuple(labels.shape)} differ in shape")
    member = labels.flatten() >= 0
    places = labels.flatten()[member]
    sums = torch.zeros(len(REGIONS), dtype=torch.float64, device=values.device)
    sums.index_add_(0, places, values.flatten()[member].double())
    return sums / torch.bincount(places, minlength=len(REGIONS))


__all__ = ["REACH", "REGIONS", "face_regions", "pixel_regions", "region_means", "vertex_regions"]
