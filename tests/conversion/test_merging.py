"""Over-clustering: average linkage under exact sizes. Features by which to cluster: equal weight of their blocks."""

from itertools import pairwise

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from padd_ds.conversion.clustering import balanced_kmeans, cluster_means, within_cluster_cost
from padd_ds.conversion.features import mixed_features, side_by_side, weight_features
from padd_ds.conversion.merging import merge_equally, over_clustered_kmeans, packable


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_group(labels: torch.Tensor) -> torch.Tensor:
    return labels[:, None] == labels


def test_merging_equals_scipy_where_its_clusters_are_equal() -> None:
    centre_EC = 5 * torch.randn(6, 3, generator=seeded(0))
    small_MC = centre_EC[torch.arange(24) % 6] + 0.3 * torch.randn(24, 3, generator=seeded(1))
    expected = fcluster(linkage(small_MC.numpy(), "average"), 6, "maxclust")
    found_M = merge_equally(small_MC, 6)
    assert torch.bincount(found_M).tolist() == [4] * 6
    assert torch.equal(same_group(found_M), same_group(torch.tensor(expected)))


def test_mean_distances_decide_and_neither_the_nearest_nor_the_farthest_ones() -> None:
    # 0 and 2 merge. Then 4.1 is at 2.1, 3.1 and 4.1 from them as the nearest, the mean and the farthest distance.
    assert merge_equally(torch.tensor([[0.0], [2.0], [4.1], [6.7], [-4.0], [11.0]]), 2).tolist() == [0, 0, 1, 1, 0, 1]
    assert merge_equally(torch.tensor([[0.0], [2.0], [4.1], [7.7], [-5.0], [13.0]]), 2).tolist() == [0, 0, 0, 1, 1, 1]


def test_every_small_cluster_counts_alike_in_a_mean_distance() -> None:
    # 6.0 is at (6 + 5 + 3.4) / 3 = 4.8 from {0, 1, 2.6}, further than from 10.6; if 2.6 counted twice, at 4.45.
    places = [0.0, 1.0, 2.6, 6.0, 10.6, -9.0, 20.0, 24.5]
    assert merge_equally(torch.tensor(places)[:, None], 2).tolist() == [0, 0, 0, 1, 1, 0, 1, 1]


def test_sizes_forbid_what_is_nearest() -> None:
    # Four near 0 and two near 9: the fourth has to go with those.
    found = merge_equally(torch.tensor([[0.0], [0.1], [0.2], [9.0], [0.4], [9.5]]), 2)
    assert found.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("n_clusters", "ratio"), [(7, 3), (5, 7), (4, 6), (9, 1), (1, 9)])
def test_merging_never_gets_stuck(n_clusters: int, ratio: int) -> None:
    for seed in range(20):
        found_M = merge_equally(torch.randn(n_clusters * ratio, 2, generator=seeded(seed)), n_clusters)
        assert torch.bincount(found_M).tolist() == [ratio] * n_clusters


def test_packable_by_hand() -> None:
    assert packable([2, 2, 1, 1], 2, 3)
    assert not packable([2, 2, 2], 2, 3)
    assert packable([3, 3, 2, 2, 2], 2, 6)
    assert not packable([3, 3, 3], 2, 5)


def test_merged_clusters_are_refined_without_a_rise() -> None:
    points_PC = torch.randn(240, 5, generator=seeded(2))
    found = over_clustered_kmeans(points_PC, 6, seeded(3), ratio=4)
    assert torch.bincount(found.assignment_P).tolist() == [40] * 6
    assert len(found.costs) > 1 and all(later < earlier for earlier, later in pairwise(found.costs))
    means_EC = cluster_means(points_PC, found.assignment_P, 6)
    assert torch.equal(means_EC, found.centroids_EC)
    assert within_cluster_cost(points_PC, means_EC, found.assignment_P) == pytest.approx(found.costs[-1], rel=1e-5)


def test_merging_finds_groups_that_a_poor_start_misses() -> None:
    truth_P = torch.arange(96) % 6
    points_PC = 20 * torch.eye(6)[truth_P] + 0.1 * torch.randn(96, 6, generator=seeded(4))
    found = over_clustered_kmeans(points_PC, 6, seeded(5), ratio=4, max_iterations=20)
    assert torch.equal(same_group(found.assignment_P), same_group(truth_P))


def test_ratio_one_is_balanced_kmeans() -> None:
    points_PC = torch.randn(60, 3, generator=seeded(6))
    plain = balanced_kmeans(points_PC, 5, seeded(7), max_iterations=500)
    merged = over_clustered_kmeans(points_PC, 5, seeded(7), ratio=1, max_iterations=500)
    assert torch.equal(same_group(plain.assignment_P), same_group(merged.assignment_P))


def test_sizes_that_do_not_come_out_are_refused() -> None:
    with pytest.raises(ValueError, match="60 points cannot be cut into 40"):
        over_clustered_kmeans(torch.zeros(60, 2), 10, seeded(0), ratio=4)
    with pytest.raises(ValueError, match="ratio is 0"):
        over_clustered_kmeans(torch.zeros(60, 2), 10, seeded(0), ratio=0)


def total_variance(block_FC: torch.Tensor) -> float:
    return float(block_FC.var(dim=0, correction=0).sum())


def test_weight_features_stand_in_their_order_at_equal_weight() -> None:
    gate_FD, up_FD = torch.randn(40, 8, generator=seeded(1)), 100 * torch.randn(40, 8, generator=seeded(2))
    down_DF = 7 + 0.01 * torch.randn(8, 40, generator=seeded(3))
    assert torch.equal(weight_features(gate_FD, up_FD, down_DF), gate_FD)
    assert torch.equal(weight_features(gate_FD, up_FD, down_DF, ["down"]), down_DF.T)
    features_FC = weight_features(gate_FD, up_FD, down_DF, ["down", "gate", "up"])
    assert features_FC.shape == (40, 24)
    for block_FD, source_FD in zip(features_FC.split(8, dim=1), (gate_FD, up_FD, down_DF.T), strict=True):
        assert total_variance(block_FD) == pytest.approx(1 / 3, rel=1e-4)
        assert torch.allclose(
            torch.pdist(block_FD) / torch.pdist(source_FD), torch.ones(1) * spread(block_FD, source_FD)
        )


def spread(block_FD: torch.Tensor, source_FD: torch.Tensor) -> float:
    return (total_variance(block_FD) / total_variance(source_FD)) ** 0.5


@pytest.mark.parametrize("parts", [[], ["gates"], ["gate", "gate"]])
def test_unknown_parts_are_refused(parts: list[str]) -> None:
    with pytest.raises(ValueError, match="parts are"):
        weight_features(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, 2), parts)


def test_mixed_features_weigh_patterns_and_weights_alike() -> None:
    pattern_FS, weights_FC = torch.rand(30, 50, generator=seeded(1)), 9 * torch.randn(30, 4, generator=seeded(2))
    features_FC = mixed_features(pattern_FS, weights_FC)
    assert features_FC.shape == (30, 54)
    assert total_variance(features_FC[:, :50]) == pytest.approx(0.5, rel=1e-4)
    assert total_variance(features_FC[:, 50:]) == pytest.approx(0.5, rel=1e-4)


def test_a_block_that_tells_nothing_apart_adds_nothing() -> None:
    block_FC = torch.randn(6, 2, generator=seeded(1))
    features_FC = side_by_side([block_FC, torch.full((6, 3), 0.1)])
    assert features_FC.isfinite().all() and not features_FC[:, 2:].any()
    assert total_variance(features_FC[:, :2]) == pytest.approx(0.5, rel=1e-4)
