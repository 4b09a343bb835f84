"""Balanced k-means: equal clusters of points, small within-cluster sum of squares.

Shapes: P points, C features of a point, E clusters, G = P / E points of a cluster.
"""

from dataclasses import dataclass, field

import torch

MAX_ITERATIONS = 50
MAX_SWEEPS = 20
SWEEPS_PER_ITERATION = 2  # the centres move before more would pay


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """A balanced partition: `assignment_P` int64 in 0..E-1, `centroids_EC`, cost after every iteration."""

    assignment_P: torch.Tensor
    centroids_EC: torch.Tensor
    costs: list[float] = field(default_factory=list)


def balanced_kmeans(
    points_PC: torch.Tensor, n_clusters: int, generator: torch.Generator, max_iterations: int = MAX_ITERATIONS
) -> Clustering:
    """min sum_j sum_{k in C_j} ||w_k - mu_j||^2 with |C_j| = P / E exactly (PADD eq. 1), a local minimum.

    Alternates means with `balanced_assignment`, then with trades that count how the means would follow
    them; a step that does not lower the cost ends the search. Starts from k-means++ centres drawn with
    `generator`. ValueError unless E divides P.
    """
    check_divides(len(points_PC), n_clusters)
    points_PC = points_PC.float()
    start_P = torch.arange(len(points_PC), device=points_PC.device) % n_clusters
    centroids_EC = kmeans_plus_plus(points_PC, n_clusters, generator)
    assignment_P = balanced_assignment(distances(points_PC, centroids_EC), start_P)
    centroids_EC = cluster_means(points_PC, assignment_P, n_clusters)
    square_sum = float(points_PC.square().sum(dtype=torch.float64))
    costs = [square_sum - _explained(centroids_EC, len(points_PC))]
    follow = False
    for _ in range(max_iterations):
        cost_PE = distances(points_PC, centroids_EC)
        if follow:
            cost_PE = following_means(cost_PE, assignment_P)
        moved_P = balanced_assignment(cost_PE, assignment_P, SWEEPS_PER_ITERATION)
        moved_EC = cluster_means(points_PC, moved_P, n_clusters)
        cost = square_sum - _explained(moved_EC, len(points_PC))
        if cost < costs[-1]:
            assignment_P, centroids_EC = moved_P, moved_EC
            costs.append(cost)
        elif follow:
            break
        else:
            follow = True
    return Clustering(assignment_P=assignment_P, centroids_EC=centroids_EC, costs=costs)


def _explained(centroids_EC: torch.Tensor, n_points: int) -> float:
    # For means of equal clusters: sum of squares = within-cluster cost + G * sum of the means' squares.
    return n_points / len(centroids_EC) * float(centroids_EC.square().sum(dtype=torch.float64))


def following_means(cost_PE: torch.Tensor, assignment_P: torch.Tensor) -> torch.Tensor:
    """Squared distances as they count when a single point moves and both means follow it (Hartigan's rule).

    A point sits nearer to the mean it is part of than to the same mean without it, most of all in many
    dimensions; plain distances therefore stop too early.
    """
    size = len(cost_PE) / cost_PE.shape[1]
    own_PE = torch.nn.functional.one_hot(assignment_P, cost_PE.shape[1]).bool()
    return torch.where(own_PE, cost_PE * size / max(size - 1, 1), cost_PE * size / (size + 1))


def balanced_assignment(cost_PE: torch.Tensor, start_P: torch.Tensor, max_sweeps: int = MAX_SWEEPS) -> torch.Tensor:
    """Improve the balanced assignment `start_P` until no two clusters can trade points for less cost.

    Every pair of clusters is split anew in the best way (the half of their points that is relatively
    nearest goes to the first), E / 2 disjoint pairs at a time as in a round-robin tournament.
    Cluster sizes never change and the cost never rises. Stops after `max_sweeps` rounds of all pairs.
    """
    n_points, n_clusters = cost_PE.shape
    members_EG = torch.argsort(start_P, stable=True).view(n_clusters, n_points // n_clusters)
    for _ in range(max_sweeps if n_clusters > 1 else 0):
        changed = False
        for first, second in tournament(n_clusters, cost_PE.device):
            changed |= _split_pairs(cost_PE, members_EG, first, second)
        if not changed:
            break
    assignment_P = torch.empty_like(start_P)
    clusters_E = torch.arange(n_clusters, device=start_P.device)
    assignment_P[members_EG.flatten()] = clusters_E.repeat_interleave(members_EG.shape[1])
    return assignment_P


def _split_pairs(cost_PE: torch.Tensor, members_EG: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> bool:
    pool = torch.cat([members_EG[first], members_EG[second]], dim=1)
    preference = cost_PE[pool, first[:, None]] - cost_PE[pool, second[:, None]]
    group = members_EG.shape[1]
    # A stable sort keeps ties where they are, so that a settled pair does not change for ever.
    order = torch.argsort(preference, dim=1, stable=True)
    changed = bool((order[:, :group] >= group).any())
    if changed:
        pool = pool.gather(1, order)
        members_EG[first], members_EG[second] = pool[:, :group], pool[:, group:]
    return changed


def tournament(n_clusters: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rounds of disjoint pairs (first, second) in which every two clusters meet exactly once."""
    seats = list(range(n_clusters + n_clusters % 2))  # an odd count gets an empty seat, met by whoever rests
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        met = [pair for pair in pairs if max(pair) < n_clusters]
        first, second = torch.tensor(met, device=device).T
        rounds.append((first, second))
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def kmeans_plus_plus(points_PC: torch.Tensor, n_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """[E, C] starting centres: points drawn with probability proportional to the squared distance so far."""
    chosen = [int(torch.randint(len(points_PC), (1,), generator=generator))]
    nearest_P = distances(points_PC, points_PC[chosen])[:, 0]
    for _ in range(n_clusters - 1):
        weights_P = nearest_P.clamp(min=0).double().cpu()
        weights_P[chosen] = 0
        if weights_P.sum() == 0:  # fewer different points than clusters
            weights_P = torch.ones_like(weights_P).index_fill(0, torch.tensor(chosen), 0)
        cumulative_P = weights_P.cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative_P[-1]
        chosen.append(int(torch.searchsorted(cumulative_P, draw, right=True).clamp(max=len(points_PC) - 1)))
        nearest_P = torch.minimum(nearest_P, distances(points_PC, points_PC[chosen[-1:]])[:, 0])
    return points_PC[chosen]


def distances(points_PC: torch.Tensor, centroids_EC: torch.Tensor) -> torch.Tensor:
    """[P, E] squared Euclidean distances, up to rounding."""
    cross_PE = points_PC @ centroids_EC.T
    return points_PC.square().sum(1, keepdim=True) - 2 * cross_PE + centroids_EC.square().sum(1)


def cluster_means(points_PC: torch.Tensor, assignment_P: torch.Tensor, n_clusters: int) -> torch.Tensor:
    """[E, C] mean of the points of every cluster (all clusters of equal size)."""
    members_EG = torch.argsort(assignment_P, stable=True).view(n_clusters, -1)
    return torch.stack([points_PC[members_G].mean(dim=0) for members_G in members_EG])


def within_cluster_cost(points_PC: torch.Tensor, centroids_EC: torch.Tensor, assignment_P: torch.Tensor) -> float:
    """Sum over points of the squared distance to the centroid of their cluster."""
    return float((points_PC - centroids_EC[assignment_P]).square().sum(dtype=torch.float64))


def check_divides(n_points: int, n_clusters: int) -> None:
    """ValueError unless the clusters can be equal."""
    if n_clusters < 1 or n_points % n_clusters:
        raise ValueError(f"{n_points} points cannot be cut into {n_clusters} equal clusters")
