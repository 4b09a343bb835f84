"""Balanced k-means: sizes, optimality, monotone cost, seeds."""

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from padd_ds.conversion import clustering
from padd_ds.conversion.clustering import (
    balanced_assignment,
    balanced_kmeans,
    cluster_means,
    distances,
    following_means,
    kmeans_from_centres,
    kmeans_plus_plus,
    refine,
    within_cluster_cost,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def balanced_partitions(points: list[int], size: int) -> Iterator[list[tuple[int, ...]]]:
    if not points:
        yield []
        return
    first, rest = points[0], points[1:]
    for others in combinations(rest, size - 1):
        left = [point for point in rest if point not in others]
        for partition in balanced_partitions(left, size):
            yield [(first, *others), *partition]


def brute_force_cost(points_PC: torch.Tensor, n_clusters: int) -> float:
    size = len(points_PC) // n_clusters
    best = float("inf")
    for partition in balanced_partitions(list(range(len(points_PC))), size):
        cost = sum(float((points_PC[list(c)] - points_PC[list(c)].mean(0)).square().sum()) for c in partition)
        best = min(best, cost)
    return best


@pytest.mark.parametrize(("n_points", "n_clusters"), [(8, 2), (9, 3), (8, 4), (6, 1), (4, 4)])
def test_best_of_a_few_starts_is_the_brute_force_optimum(n_points: int, n_clusters: int) -> None:
    points_PC = torch.randn(n_points, 3, generator=seeded(n_points))
    costs = []
    for seed in range(12):
        found = balanced_kmeans(points_PC, n_clusters, seeded(seed))
        costs.append(within_cluster_cost(points_PC, found.centroids_EC, found.assignment_P))
    optimum = brute_force_cost(points_PC, n_clusters)
    assert min(costs) == pytest.approx(optimum, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("n_points", "n_clusters"), [(120, 12), (105, 7), (64, 64), (50, 1)])
def test_every_point_is_in_one_cluster_of_the_exact_size(n_points: int, n_clusters: int) -> None:
    found = balanced_kmeans(torch.randn(n_points, 5, generator=seeded(0)), n_clusters, seeded(1))
    sizes = torch.bincount(found.assignment_P, minlength=n_clusters)
    assert sizes.tolist() == [n_points // n_clusters] * n_clusters


def test_cost_never_rises_and_ends_at_the_final_partition() -> None:
    points_PC = torch.randn(240, 6, generator=seeded(2))
    found = balanced_kmeans(points_PC, 8, seeded(3))
    assert len(found.costs) > 1
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in zip(found.costs, found.costs[1:], strict=False))
    final = within_cluster_cost(points_PC, found.centroids_EC, found.assignment_P)
    assert final == pytest.approx(found.costs[-1], rel=1e-5)
    assert torch.allclose(found.centroids_EC, cluster_means(points_PC, found.assignment_P, 8))


def test_separated_groups_are_found() -> None:
    truth_P = torch.arange(60) % 5
    points_PC = 20 * torch.eye(5)[truth_P] + 0.1 * torch.randn(60, 5, generator=seeded(4))
    assignment_P = balanced_kmeans(points_PC, 5, seeded(5)).assignment_P
    same_truth_PP = truth_P[:, None] == truth_P
    assert torch.equal(assignment_P[:, None] == assignment_P, same_truth_PP)


@pytest.mark.parametrize("price_steps", [0, clustering.PRICE_STEPS])
@pytest.mark.parametrize(("n_points", "n_clusters"), [(192, 12), (600, 5), (64, 64), (90, 2)])
def test_assignment_to_fixed_centres_is_the_optimal_one(
    n_points: int, n_clusters: int, price_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However good the prices are that it starts from."""
    monkeypatch.setattr(clustering, "PRICE_STEPS", price_steps)
    points_PC, centres_EC = (
        torch.randn(n_points, 4, generator=seeded(6)),
        torch.randn(n_clusters, 4, generator=seeded(7)),
    )
    cost_PE = distances(points_PC, centres_EC)
    start_P = torch.arange(n_points) % n_clusters
    found_P = balanced_assignment(cost_PE, start_P)
    size = n_points // n_clusters
    _, columns = linear_sum_assignment(cost_PE.repeat_interleave(size, dim=1).numpy())
    optimum = total(cost_PE, torch.tensor(columns) // size)
    assert torch.bincount(found_P, minlength=n_clusters).tolist() == [size] * n_clusters
    assert total(cost_PE, found_P) == pytest.approx(optimum, rel=1e-6)
    assert optimum < total(cost_PE, start_P)


def test_an_assignment_with_many_ties_is_optimal_too() -> None:
    cost_PE = torch.randint(3, (240, 6), generator=seeded(9)).float()
    cost_PE[:100] = cost_PE[0]  # a hundred neurons that cannot be told apart
    found_P = balanced_assignment(cost_PE, torch.arange(240) % 6)
    _, columns = linear_sum_assignment(cost_PE.repeat_interleave(40, dim=1).numpy())
    assert total(cost_PE, found_P) == total(cost_PE, torch.tensor(columns) // 40)


def test_an_assignment_that_cannot_be_bettered_stays() -> None:
    start_P = torch.randperm(30, generator=seeded(10)) % 3
    assert torch.equal(balanced_assignment(torch.ones(30, 3), start_P), start_P)


def total(cost_PE: torch.Tensor, assignment_P: torch.Tensor) -> float:
    return float(cost_PE.gather(1, assignment_P[:, None]).sum(dtype=torch.float64))


def test_following_means_gives_what_a_single_move_costs() -> None:
    points_PC = torch.randn(12, 3, generator=seeded(11))
    assignment_P = torch.arange(12) % 3
    cost_PE = following_means(distances(points_PC, cluster_means(points_PC, assignment_P, 3)), assignment_P)
    for target in (1, 2):
        moved_P = assignment_P.clone()
        moved_P[0] = target
        rise = uneven_cost(points_PC, moved_P) - uneven_cost(points_PC, assignment_P)
        assert float(cost_PE[0, target] - cost_PE[0, 0]) == pytest.approx(rise, rel=1e-4)


def test_refining_goes_on_where_plain_distances_stop() -> None:
    points_PC = torch.randn(120, 40, generator=seeded(13))
    assignment_P = torch.arange(120) % 6
    for _ in range(50):
        plain_PE = distances(points_PC, cluster_means(points_PC, assignment_P, 6))
        settled_P, assignment_P = assignment_P, balanced_assignment(plain_PE, assignment_P)
    assert torch.equal(settled_P, assignment_P)
    found = refine(points_PC, assignment_P, 6)
    assert found.costs[-1] < found.costs[0] * 0.99


def uneven_cost(points_PC: torch.Tensor, assignment_P: torch.Tensor) -> float:
    clusters = [points_PC[assignment_P == cluster] for cluster in assignment_P.unique()]
    return sum(float((points_GC - points_GC.mean(0)).square().sum()) for points_GC in clusters)


def test_means_by_hand() -> None:
    points_PC = torch.tensor([[1.0, 0.0], [10.0, 4.0], [3.0, 2.0], [20.0, 6.0]])
    assert cluster_means(points_PC, torch.tensor([1, 0, 1, 0]), 2).tolist() == [[15.0, 5.0], [2.0, 1.0]]


def test_search_from_given_centres_is_that_of_their_seed() -> None:
    points_PC = torch.randn(96, 4, generator=seeded(8))
    drawn = balanced_kmeans(points_PC, 6, seeded(1))
    given = kmeans_from_centres(points_PC, kmeans_plus_plus(points_PC, 6, seeded(1)))
    assert torch.equal(drawn.assignment_P, given.assignment_P)


def test_restarts_keep_the_best_of_their_searches() -> None:
    points_PC = torch.randn(96, 4, generator=seeded(8))
    generator = seeded(3)
    singles = [balanced_kmeans(points_PC, 6, generator) for _ in range(5)]
    best = balanced_kmeans(points_PC, 6, seeded(3), restarts=5)
    assert best.costs[-1] == min(single.costs[-1] for single in singles) < singles[0].costs[-1]
    with pytest.raises(ValueError, match="restarts is 0"):
        balanced_kmeans(points_PC, 6, seeded(3), restarts=0)


def test_refining_starts_at_the_cost_of_its_partition() -> None:
    points_PC = torch.randn(60, 4, generator=seeded(12))
    start_P = torch.arange(60) % 5
    found = refine(points_PC, start_P, 5)
    start = within_cluster_cost(points_PC, cluster_means(points_PC, start_P, 5), start_P)
    assert found.costs[0] == pytest.approx(start, rel=1e-5)
    assert found.costs[-1] < start
    again = refine(points_PC, found.assignment_P, 5)
    assert len(again.costs) == 1 and torch.equal(again.assignment_P, found.assignment_P)


def test_undefined_features_are_refused() -> None:
    points_PC = torch.ones(8, 2)
    points_PC[3, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        kmeans_from_centres(points_PC, points_PC[:2])


def test_same_seed_same_clusters_and_another_seed_others() -> None:
    points_PC = torch.randn(96, 4, generator=seeded(8))
    first, second, other = (balanced_kmeans(points_PC, 6, seeded(seed)).assignment_P for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_identical_points_are_still_cut_evenly() -> None:
    found = balanced_kmeans(torch.ones(12, 3), 4, seeded(0))
    assert torch.bincount(found.assignment_P, minlength=4).tolist() == [3, 3, 3, 3]


def test_unequal_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="10 points cannot be cut into 3"):
        balanced_kmeans(torch.zeros(10, 2), 3, seeded(0))
