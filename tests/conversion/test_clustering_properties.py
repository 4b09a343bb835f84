"""Balanced k-means on any points: a partition of exact sizes, a cost that never rises, no order that matters.

Sizes are small and costs have no ties, except where ties are the subject.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from padd_ds.conversion.clustering import (
    balanced_assignment,
    balanced_kmeans,
    cluster_means,
    kmeans_from_centres,
    refine,
    within_cluster_cost,
)
from padd_ds.conversion.merging import over_clustered_kmeans

# The same examples in every run: a test that fails now and then tells less than one that always does.
small = settings(max_examples=60, deadline=None, derandomize=True)

seeds = st.integers(0, 2**32 - 1)
cluster_counts = st.integers(1, 9)
cluster_sizes = st.integers(1, 12)
widths = st.integers(1, 6)
scales = st.sampled_from([1e-3, 1.0, 1e3])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distinct(n_points: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n_points, width, generator=seeded(seed))


def tied(n_points: int, width: int, seed: int) -> torch.Tensor:
    return torch.randint(3, (n_points, width), generator=seeded(seed)).float()


points = st.sampled_from([distinct, tied])


def permutation(n_points: int, seed: int) -> torch.Tensor:
    return torch.randperm(n_points, generator=seeded(seed))


def assert_balanced(assignment_P: torch.Tensor, n_points: int, n_clusters: int) -> None:
    """Every point has one cluster, and every cluster has its exact size."""
    assert assignment_P.shape == (n_points,) and assignment_P.dtype == torch.long
    assert torch.bincount(assignment_P, minlength=n_clusters).tolist() == [n_points // n_clusters] * n_clusters


@small
@given(points, cluster_counts, cluster_sizes, widths, scales, seeds)
def test_clusters_are_a_partition_of_exact_sizes_with_their_means(make, n_clusters, size, width, scale, seed) -> None:
    points_PC = scale * make(n_clusters * size, width, seed)
    found = balanced_kmeans(points_PC, n_clusters, seeded(seed))
    assert_balanced(found.assignment_P, len(points_PC), n_clusters)
    for cluster in range(n_clusters):
        mean_C = points_PC[found.assignment_P == cluster].double().mean(0)
        assert torch.allclose(found.centroids_EC[cluster].double(), mean_C, rtol=1e-4, atol=1e-5 * scale)


@small
@given(points, cluster_counts, cluster_sizes, st.sampled_from([1, 2, 3]), seeds)
def test_merged_clusters_are_a_partition_of_exact_sizes(make, n_clusters, size, ratio, seed) -> None:
    points_PC = make(n_clusters * size * ratio, 3, seed)
    found = over_clustered_kmeans(points_PC, n_clusters, seeded(seed), ratio=ratio)
    assert_balanced(found.assignment_P, len(points_PC), n_clusters)


@small
@given(points, cluster_counts, cluster_sizes, seeds)
def test_an_assignment_keeps_sizes_and_is_never_dearer_than_its_start(make, n_clusters, size, seed) -> None:
    cost_PE = make(n_clusters * size, n_clusters, seed)
    start_P = permutation(n_clusters * size, seed) % n_clusters
    found_P = balanced_assignment(cost_PE, start_P)
    assert_balanced(found_P, len(cost_PE), n_clusters)
    start, found = (cost_PE.double().gather(1, labels_P[:, None]).sum() for labels_P in (start_P, found_P))
    assert found <= start + 1e-5 * start.abs()


@small
@given(points, cluster_counts, cluster_sizes, widths, seeds)
def test_refinement_never_raises_the_cost(make, n_clusters, size, width, seed) -> None:
    """Both the reported cost and the one computed anew from the points, the latter up to rounding."""
    points_PC = make(n_clusters * size, width, seed)
    assignment_P = permutation(len(points_PC), seed) % n_clusters
    rounding = 1e-6 * float(points_PC.square().sum())
    before = measured(points_PC, assignment_P, n_clusters)
    for _ in range(6):
        found = refine(points_PC, assignment_P, n_clusters, max_iterations=1)
        assert all(later < earlier for earlier, later in zip(found.costs, found.costs[1:], strict=False))
        after = measured(points_PC, found.assignment_P, n_clusters)
        assert abs(found.costs[-1] - after) <= rounding
        assert after <= before + rounding
        before, assignment_P = after, found.assignment_P


def measured(points_PC: torch.Tensor, assignment_P: torch.Tensor, n_clusters: int) -> float:
    points_PC = points_PC.double()
    return within_cluster_cost(points_PC, cluster_means(points_PC, assignment_P, n_clusters), assignment_P)


@small
@given(cluster_counts, cluster_sizes, seeds)
def test_the_order_of_the_points_does_not_change_an_assignment(n_clusters, size, seed) -> None:
    """Promised where one assignment is the cheapest: permuted costs give it permuted, whatever the start."""
    cost_PE = distinct(n_clusters * size, n_clusters, seed)
    order_P = permutation(len(cost_PE), seed + 1)
    start_P = torch.arange(len(cost_PE)) % n_clusters
    plain_P, permuted_P = balanced_assignment(cost_PE, start_P), balanced_assignment(cost_PE[order_P], start_P)
    assert torch.equal(permuted_P, plain_P[order_P])


@small
@given(cluster_counts, cluster_sizes, widths, seeds)
def test_the_order_of_the_points_does_not_change_the_clusters(n_clusters, size, width, seed) -> None:
    """Promised from given start centres and without ties: permuted points give the permuted assignment.

    Not promised from a seed, whose draws are of places in the order, nor where two partitions are equally good up to
    the rounding of sums, which the order does change.
    """
    points_PC = distinct(n_clusters * size, width, seed)
    order_P = permutation(len(points_PC), seed + 1)
    start_EC = distinct(n_clusters, width, seed + 2)
    plain, permuted = kmeans_from_centres(points_PC, start_EC), kmeans_from_centres(points_PC[order_P], start_EC)
    assert torch.equal(permuted.assignment_P, plain.assignment_P[order_P])


@small
@given(cluster_counts, cluster_sizes, seeds)
def test_the_order_of_the_centres_only_renames_the_clusters(n_clusters, size, seed) -> None:
    """Promised as for the order of the points."""
    points_PC, start_EC = distinct(n_clusters * size, 3, seed), distinct(n_clusters, 3, seed + 2)
    order_E = permutation(n_clusters, seed + 1)
    plain, renamed = kmeans_from_centres(points_PC, start_EC), kmeans_from_centres(points_PC, start_EC[order_E])
    assert torch.equal(order_E[renamed.assignment_P], plain.assignment_P)


@small
@given(points, cluster_counts, cluster_sizes, st.integers(1, 3), seeds)
def test_same_seed_same_clusters(make, n_clusters, size, restarts, seed) -> None:
    points_PC = make(n_clusters * size, 3, seed)
    first, second = (balanced_kmeans(points_PC, n_clusters, seeded(seed), restarts=restarts) for _ in range(2))
    assert torch.equal(first.assignment_P, second.assignment_P)
    assert first.costs == second.costs
