"""Frechet distance, precision and recall, diversity: by hand, in closed form, and what they must not change with."""

import math

import pytest
import torch

from lipflow.sample_metrics import (
    MeshPca,
    diversity_mm,
    fit_mesh_pca,
    frechet_distance,
    frechet_distance_of_gaussians,
    precision_recall,
)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def line(*places: float) -> torch.Tensor:
    """Points in one dimension."""
    return torch.tensor(places)[:, None]


def test_frechet_distance_of_two_pairs_by_hand():
    """Means 1 and 3, unbiased variances 2 and 8: 4 + 2 + 8 - 2 sqrt(16) = 6."""
    assert frechet_distance(line(0, 2), line(1, 5)) == pytest.approx(6, abs=1e-12)


def test_frechet_distance_is_the_closed_form_for_commuting_covariances():
    """Equal eigenvectors: |m_a - m_b|^2 + sum (sqrt a_i - sqrt b_i)^2, with variances over six decades and zeros."""
    axes = rotation(5)
    a, b = torch.tensor([1e-3, 0.5, 2, 40, 1e3]).double(), torch.tensor([3, 0.1, 0, 40, 1e-2]).double()
    mean_a, mean_b = normal(5, seed=2), normal(5, seed=3)
    found = frechet_distance_of_gaussians(mean_a, axes * a @ axes.T, mean_b, axes * b @ axes.T)
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    # measured worst case over 200 rotations: 2e-9, by the rounding of the zero under its root
    assert found == pytest.approx(float(expected), rel=1e-7)


def test_frechet_distance_is_the_closed_form_of_two_by_two_covariances_that_do_not_commute():
    """tr (A B)^1/2 = sqrt(tr A B + 2 sqrt(det A B)) for 2 x 2 matrices."""
    a = torch.tensor([[4.0, 1.0], [1.0, 2.0]]).double()
    b = torch.tensor([[1.0, -0.8], [-0.8, 3.0]]).double()
    assert not torch.allclose(a @ b, b @ a)
    cross = math.sqrt((a @ b).trace() + 2 * math.sqrt(a.det() * b.det()))
    zero = torch.zeros(2)
    found = frechet_distance_of_gaussians(zero, a, zero, b)
    assert found == pytest.approx(10 - 2 * cross, abs=1e-12)
    assert frechet_distance_of_gaussians(zero, b, zero, a) == pytest.approx(found, abs=1e-12)


def test_frechet_distance_is_zero_for_the_same_points_and_grows_as_the_square_of_a_shift():
    points = normal(50, 4)
    # measured: 0
    assert frechet_distance(points, points.flip(0)) < 1e-10
    shift = torch.tensor([3.0, 0, 4, 0])
    assert frechet_distance(points, points + shift) == pytest.approx(25, rel=1e-9)


def test_frechet_distance_does_not_change_under_a_common_rotation():
    first, second, turn = normal(40, 6), 2 * normal(30, 6, seed=2) + 1, rotation(6)
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(frechet_distance(first, second), rel=1e-9)


def test_fewer_samples_of_the_same_distribution_are_farther_apart():
    """The bias that makes unequal counts incomparable: 1.07 for 50 + 50 points in 8-D, 0.05 for 1000 + 1000."""
    few, many = (
        sum(frechet_distance(normal(n, 8, seed=s), normal(n, 8, seed=s + 100)) for s in range(10)) / 10
        for n in (50, 1000)
    )
    assert few > 10 * many


@pytest.mark.parametrize(
    ("real", "drawn", "neighbours", "precision", "recall"),
    [
        # Radii of the real points: 1, 1, 2, 4, so their balls are [-1, 2], [1, 5], [3, 11]; 11 lies on the edge, 20
        # outside. Radii of the drawn ones: 5, 5, 5.5, 9; every real point lies in [-4.5, 5.5] or [0.5, 10.5].
        ((0, 1, 3, 7), (0.5, 5.5, 11, 20), 1, 3 / 4, 1),
        # All drawn from one of two modes: nothing false, half found.
        ((0, 1, 10, 11), (0.25, 0.5, 0.75, 1), 1, 1, 1 / 2),
        # One mode found, and as much drawn where nothing is.
        ((0, 1, 10, 11), (0, 1, 50, 51), 1, 1 / 2, 1 / 2),
        # Second neighbours: real radii 3, 2, 3, 6; drawn ones 2, 1, 2: balls [18, 22], [20, 22], [20, 24].
        ((0, 1, 3, 7), (20, 21, 22), 2, 0, 0),
        ((0, 1, 3, 7, 21), (20, 21, 22), 2, 1, 1 / 5),
    ],
)
def test_precision_and_recall_on_a_line_by_hand(real, drawn, neighbours, precision, recall):
    found = precision_recall(line(*real), line(*drawn), neighbours)
    assert (found.precision, found.recall) == (precision, recall)


def test_precision_and_recall_change_places_with_their_sets():
    real, drawn = normal(60, 3), 0.3 * normal(60, 3, seed=2) + 0.5
    forth, back = precision_recall(real, drawn), precision_recall(drawn, real)
    assert (forth.precision, forth.recall) == (back.recall, back.precision)
    assert forth.recall < 0.7 < forth.precision


def test_diversity_of_three_meshes_by_hand():
    """RMS distances of two vertices: 3 and 5 mm apart give sqrt(17), 5 and 0 sqrt(12.5); the third pair sqrt(2)."""
    first = torch.zeros(2, 3)
    second = torch.tensor([[3.0, 0, 0], [0, 3, 4]])
    third = torch.tensor([[3.0, 0, 0], [0, 3, 2]])
    expected = (math.sqrt(17) + math.sqrt(11) + math.sqrt(2)) / 3
    assert diversity_mm(torch.stack([first, second, third])) == pytest.approx(expected, abs=1e-12)
    # Far from the origin, as faces are, it is the same; measured: 2e-12.
    far = torch.stack([first, second, third]).double() + 1000
    assert diversity_mm(far) == pytest.approx(expected, abs=1e-9)
    assert diversity_mm(first.expand(4, -1, -1)) == 0


def low_rank_meshes(count: int, vertices: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Meshes on a plane of two unequal directions, and those directions ``(2, V, 3)``."""
    directions = rotation(3 * vertices)[:2].unflatten(1, (vertices, 3))
    weights = normal(count, 2, seed=seed) * torch.tensor([10.0, 1.0])
    return 100 + torch.einsum("nk,kvx->nvx", weights, directions), directions


def test_principal_components_find_the_directions_of_the_meshes():
    meshes, directions = low_rank_meshes(200, 7)
    pca = fit_mesh_pca(meshes, most_components=5)
    assert pca.components.shape == (2, 7, 3)
    assert pca.explained == pytest.approx(1, abs=1e-12)
    flat = pca.components.flatten(1)
    # measured: 1e-14
    torch.testing.assert_close(flat @ flat.T, torch.eye(2).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(pca.mean, meshes.mean(0))
    alignment = (flat @ directions.flatten(1).T).abs()
    assert alignment.diagonal().min() > 0.99
    assert 0.95 < fit_mesh_pca(meshes, most_components=1).explained < 1


def test_projected_distances_are_rms_vertex_distances_in_mm():
    meshes, _ = low_rank_meshes(20, 7)
    coefficients = fit_mesh_pca(meshes, most_components=2).project(meshes)
    pairs = torch.combinations(torch.arange(20))
    expected = (meshes[pairs[:, 0]] - meshes[pairs[:, 1]]).square().sum(-1).mean(-1).sqrt()
    found = (coefficients[pairs[:, 0]] - coefficients[pairs[:, 1]]).norm(dim=-1)
    # measured: 1e-13
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert diversity_mm(meshes) == pytest.approx(float(expected.mean()), abs=1e-9)


def test_no_more_components_than_the_meshes_have():
    assert len(fit_mesh_pca(normal(4, 5, 3), most_components=16).components) == 3


def test_unfit_sets_are_refused():
    with pytest.raises(ValueError, match="all the same"):
        fit_mesh_pca(torch.ones(3, 4, 3), 2)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(line(1), line(1, 2))
    with pytest.raises(ValueError, match="more than 3 rows"):
        precision_recall(line(1, 2, 3), line(1, 2, 3, 4))
    with pytest.raises(ValueError, match="at least 2 frames"):
        diversity_mm(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="do not fit"):
        MeshPca(torch.zeros(4, 3), torch.zeros(1, 4, 3), 1.0).project(torch.zeros(2, 5, 3))
