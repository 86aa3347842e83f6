"""How well drawn faces match real ones: Frechet distance, precision and recall, diversity.

Meshes are compared in the space of the principal components of real training meshes (:class:`MeshPca`), where a unit is
one mm of root mean squared vertex distance, so that distances mean the same for every topology. Everything is computed
in float64.

What few samples do
    All of these figures depend on the number of samples, so compare methods only at equal counts, of drawn and of
    real meshes, and in the same space. Two sets of the same distribution do not have a Frechet distance of 0: with n
    samples in C dimensions it is biased upwards by about tr(S) / n from each mean, and by more from the covariances,
    of which C (C + 1) / 2 numbers are estimated. Neighbourhoods grow as samples get fewer, which raises precision and
    recall. Diversity has no such bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_VARIANCE = 1e-12
"""Of a principal component, as a share of the largest; below it is rounding."""


@dataclass(frozen=True)
class MeshPca:
    """Principal components of meshes.

    Attributes:
        mean: ``(V, 3)`` float64, mm.
        components: ``(C, V, 3)`` float64, orthonormal, largest variance first.
        explained: share of the meshes' variance that they hold, 0..1.
    """

    mean: Tensor
    components: Tensor
    explained: float

    def project(self, vertices: Tensor) -> Tensor:
        """``(N, V, 3)`` mm to coefficients ``(N, C)``, whose distances are mm of RMS vertex distance."""
        if vertices.shape[1:] != self.mean.shape:
            raise ValueError(
                f"meshes {tuple(vertices.shape)} do not fit components of {tuple(self.mean.shape)}: expected "
                f"{('N', *self.mean.shape)}"
            )
        offsets = (vertices.double() - self.mean).flatten(1)
        return offsets @ self.components.flatten(1).T / len(self.mean) ** 0.5


def fit_mesh_pca(vertices: Tensor, most_components: int) -> MeshPca:
    """The principal components of real meshes.

    Args:
        vertices: ``(N, V, 3)`` mm, at least two that differ.
        most_components: C; fewer if the meshes vary in fewer directions, of which there are at most N - 1.
    """
    if vertices.ndim != 3 or len(vertices) < 2:
        raise ValueError(f"principal components need meshes (N, V, 3) of at least 2 frames, found {vertices.shape}")
    meshes = vertices.double()
    mean = meshes.mean(0)
    offsets = (meshes - mean).flatten(1)
    # N meshes have fewer frames than coordinates: the Gram matrix is the small one of the two.
    variance, left = torch.linalg.eigh(offsets @ offsets.T)
    variance, left = variance.flip(0), left.flip(1)
    kept = int((variance[:most_components] > _LEAST_VARIANCE * variance[0]).sum())
    if kept == 0:
        raise ValueError(f"{len(vertices)} meshes are all the same: there is nothing to compare a sample with")
    components = (offsets.T @ left[:, :kept] / variance[:kept].sqrt()).T
    explained = float(variance[:kept].sum() / variance.clamp(min=0).sum())
    return MeshPca(mean, components.unflatten(1, mean.shape), explained)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance between the Gaussians fitted to two sets of points, ``(N, C)`` and ``(M, C)``.

    In squared units of the points; covariances are the unbiased ones.
    """
    for points in (first, second):
        if points.ndim != 2 or len(points) < 2 or points.shape[1] != first.shape[1]:
            raise ValueError(
                f"points {tuple(first.shape)} and {tuple(second.shape)}: expected (N, C) and (M, C) of at least 2 rows"
            )
    first, second = first.double(), second.double()
    return frechet_distance_of_gaussians(first.mean(0), _covariance(first), second.mean(0), _covariance(second))


def frechet_distance_of_gaussians(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), the squared 2-Wasserstein distance.

    Dowson and Landau, 1982; as "FID" on network features: Heusel et al., 2017. Covariances may be singular.

    Args:
        mean_a: ``(C,)``.
        cov_a: ``(C, C)``.
        mean_b: ``(C,)``.
        cov_b: ``(C, C)``.
    """
    root = _root(cov_a.double())
    between = root @ cov_b.double() @ root
    cross = torch.linalg.eigvalsh((between + between.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a.double() - mean_b.double()).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares, 0..1.

    Attributes:
        precision: of the drawn points, those that lie where real ones do.
        recall: of the real points, those that lie where drawn ones do.
    """

    precision: float
    recall: float


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al., 2019, equations 1 and 2).

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour in
    the same set.

    Args:
        real: ``(N, C)``.
        drawn: ``(M, C)``; take M = N.
        neighbours: k.
    """
    if real.shape[1:] != drawn.shape[1:] or min(len(real), len(drawn)) <= neighbours:
        raise ValueError(
            f"points {tuple(real.shape)} and {tuple(drawn.shape)}: expected (N, C) and (M, C) of more than "
            f"{neighbours} rows, one more than the neighbours"
        )
    real, drawn = real.double(), drawn.double()
    between = _distances(drawn, real)
    return PrecisionRecall(
        precision=_share_within(between, _radii(real, neighbours)),
        recall=_share_within(between.T, _radii(drawn, neighbours)),
    )


def diversity_mm(vertices: Tensor) -> float:
    """Mean over pairs of meshes ``(N, V, 3)`` of their root mean squared vertex distance, in mm."""
    if vertices.ndim != 3 or len(vertices) < 2:
        raise ValueError(f"diversity needs meshes (N, V, 3) of at least 2 frames, found {tuple(vertices.shape)}")
    # Distances do not change with the origin; near it, differences of squares keep their digits.
    offsets = (vertices.double() - vertices.double().mean(0)).flatten(1)
    squares = offsets.square().sum(1)
    squared = (squares[:, None] + squares - 2 * offsets @ offsets.T).clamp(min=0)
    upper = torch.triu_indices(len(offsets), len(offsets), offset=1)
    return float((squared[upper[0], upper[1]] / vertices.shape[1]).sqrt().mean())


def _covariance(points: Tensor) -> Tensor:
    offsets = points - points.mean(0)
    return offsets.T @ offsets / (len(points) - 1)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    variance, directions = torch.linalg.eigh((covariance + covariance.T) / 2)
    return directions * variance.clamp(min=0).sqrt() @ directions.T


def _distances(first: Tensor, second: Tensor) -> Tensor:
    # Exact: a point's distance to itself has to be 0, and one on a ball's edge belongs to it.
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: Tensor, neighbours: int) -> Tensor:
    # The nearest of all is the point itself.
    return _distances(points, points).kthvalue(neighbours + 1, dim=1).values


def _share_within(distances: Tensor, radii: Tensor) -> float:
    """Share of rows that lie in one of the columns' balls."""
    return float((distances <= radii).any(1).double().mean())
