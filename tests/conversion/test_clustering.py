"""Balanced k-means: sizes, optimality, monotone cost, seeds."""

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from padd_ds.conversion.clustering import (
    balanced_assignment,
    balanced_kmeans,
    cluster_means,
    distances,
    tournament,
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


def test_assignment_to_fixed_centres_is_close_to_the_optimal_one() -> None:
    cost_PE = distances(torch.randn(192, 4, generator=seeded(6)), torch.randn(12, 4, generator=seeded(7)))
    start_P = torch.arange(192) % 12
    found_P = balanced_assignment(cost_PE, start_P)
    rows, columns = linear_sum_assignment(cost_PE.repeat_interleave(16, dim=1).numpy())
    optimum = float(cost_PE[torch.tensor(rows), torch.tensor(columns) // 16].sum())
    cost = float(cost_PE[torch.arange(192), found_P].sum())
    assert optimum <= cost * (1 + 1e-6) <= optimum * 1.01
    assert cost < float(cost_PE[torch.arange(192), start_P].sum())


def test_same_seed_same_clusters_and_another_seed_others() -> None:
    points_PC = torch.randn(96, 4, generator=seeded(8))
    first, second, other = (balanced_kmeans(points_PC, 6, seeded(seed)).assignment_P for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_identical_points_are_still_cut_evenly() -> None:
    found = balanced_kmeans(torch.ones(12, 3), 4, seeded(0))
    assert torch.bincount(found.assignment_P, minlength=4).tolist() == [3, 3, 3, 3]


def test_every_two_clusters_meet_once_in_a_tournament() -> None:
    for n_clusters in (2, 5, 8):
        met = []
        for first, second in tournament(n_clusters, torch.device("cpu")):
            pairs = list(zip(first.tolist(), second.tolist(), strict=True))
            assert len({cluster for pair in pairs for cluster in pair}) == 2 * len(pairs)
            met += [tuple(sorted(pair)) for pair in pairs]
        assert sorted(met) == list(combinations(range(n_clusters), 2))


def test_unequal_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="10 points cannot be cut into 3"):
        balanced_kmeans(torch.zeros(10, 2), 3, seeded(0))
