"""Balanced k-means: equal clusters of points, small within-cluster sum of squares.

Shapes: P points, C features of a point, E clusters, G = P / E points of a cluster.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

MAX_ITERATIONS = 50
TOLERANCE = 1e-5  # a step that lowers the cost by a smaller share of it is the last one
ROWS = 2048  # points whose distances are computed at a time
PRICE_STEPS = 12
PRICE_DAMPING = 0.8  # of the step that would balance a cluster if all others stood still; at 1 the prices can oscillate
PRICED_EXCESS = 0.005  # share of the points that may be in excess of the cluster sizes when the prices are good enough


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """A balanced partition: `assignment_P` int64 in 0..E-1, the means `centroids_EC`, cost before and after each step.

    costs: up to rounding, about 1e-7 of the points' sum of squares.
    """

    assignment_P: torch.Tensor
    centroids_EC: torch.Tensor
    costs: list[float] = field(default_factory=list)


def balanced_kmeans(
    points_PC: torch.Tensor,
    n_clusters: int,
    generator: torch.Generator,
    max_iterations: int = MAX_ITERATIONS,
    restarts: int = 1,
) -> Clustering:
    """min sum_j sum_{k in C_j} ||w_k - mu_j||^2 with |C_j| = P / E exactly (PADD eq. 1), a local minimum.

    The best of `restarts` searches, each from its own k-means++ centres drawn with `generator`, the first of equals.
    ValueError unless E divides P and there is a search.
    """
    check_divides(len(points_PC), n_clusters)
    if restarts < 1:
        raise ValueError(f"restarts is {restarts}, but at least one search is needed")
    points_PC = points_PC.float()
    searches = (
        kmeans_from_centres(points_PC, kmeans_plus_plus(points_PC, n_clusters, generator), max_iterations)
        for _ in range(restarts)
    )
    return min(searches, key=lambda found: found.costs[-1])


def kmeans_from_centres(
    points_PC: torch.Tensor, start_EC: torch.Tensor, max_iterations: int = MAX_ITERATIONS
) -> Clustering:
    """Balanced k-means from given centres: one assignment to them, then `refine`. ValueError unless E divides P."""
    check_divides(len(points_PC), len(start_EC))
    points_PC = points_PC.float()
    dealt_P = torch.arange(len(points_PC), device=points_PC.device) % len(start_EC)
    assignment_P = balanced_assignment(distances(points_PC, start_EC), dealt_P)
    return refine(points_PC, assignment_P, len(start_EC), max_iterations)


def refine(
    points_PC: torch.Tensor, assignment_P: torch.Tensor, n_clusters: int, max_iterations: int = MAX_ITERATIONS
) -> Clustering:
    """Lower the within-cluster cost of a balanced partition step by step; sizes stay and the cost never rises.

    Each step assigns the points to the means, counting how the means would follow them. Where that does not lower the
    cost, it assigns them to the means as they stand; where that does not either, the search ends, as it does after a
    step that gains less than TOLERANCE.
    """
    points_PC = points_PC.float()
    square_P = squared_lengths(points_PC)
    square_sum = float(square_P.sum(dtype=torch.float64))
    centroids_EC = cluster_means(points_PC, assignment_P, n_clusters)
    costs = [square_sum - _explained(centroids_EC, len(points_PC))]
    price_E = np.zeros(n_clusters)
    for _ in range(max_iterations):
        plain_PE = distances(points_PC, centroids_EC, square_P)
        for cost_PE in (following_means(plain_PE, assignment_P), plain_PE):
            moved_P, price_E = _assign(cost_PE, assignment_P, price_E)
            moved_EC = cluster_means(points_PC, moved_P, n_clusters)
            cost = square_sum - _explained(moved_EC, len(points_PC))
            if cost < costs[-1]:
                break
        else:
            break
        assignment_P, centroids_EC = moved_P, moved_EC
        costs.append(cost)
        if costs[-2] - cost < TOLERANCE * cost:
            break
    return Clustering(assignment_P=assignment_P, centroids_EC=centroids_EC, costs=costs)


def _explained(centroids_EC: torch.Tensor, n_points: int) -> float:
    # For means of equal clusters: sum of squares = within-cluster cost + G * sum of the means' squares.
    return n_points / len(centroids_EC) * float(centroids_EC.square().sum(dtype=torch.float64))


def following_means(cost_PE: torch.Tensor, assignment_P: torch.Tensor) -> torch.Tensor:
    """[P, E] squared distances as they count when a single point moves and both means follow it (Hartigan's rule).

    A point sits nearer to the mean it is part of than to the same mean without it, most of all in many
    dimensions; plain distances therefore stop too early.
    """
    size = len(cost_PE) / cost_PE.shape[1]
    own_P1 = assignment_P[:, None]
    return (cost_PE * (size / (size + 1))).scatter_(1, own_P1, cost_PE.gather(1, own_P1) * (size / max(size - 1, 1)))


def balanced_assignment(cost_PE: torch.Tensor, start_P: torch.Tensor) -> torch.Tensor:
    """[P] int64: the balanced assignment of the least total cost, to rounding; `start_P` where that is no dearer.

    ValueError unless the costs are finite.
    """
    return _assign(cost_PE, start_P, np.zeros(cost_PE.shape[1]))[0]


def _assign(cost_PE: torch.Tensor, start_P: torch.Tensor, price_E: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """(`balanced_assignment`, the prices under which every point is in its cheapest cluster), from guessed prices.

    On the CPU: the costs are few beside the features, and the steps are many and small.
    """
    if not cost_PE.isfinite().all():
        raise ValueError("the costs of an assignment are not finite: the points have infinite or undefined features")
    rows_PE = cost_PE.contiguous().cpu().numpy()
    cost_EP = np.ascontiguousarray(rows_PE.T)
    labels_P, price_E = _settle(rows_PE, *_nearly_balanced(cost_EP, price_E))
    better = _total(cost_EP, labels_P) < _total(cost_EP, start_P.cpu().numpy())
    return torch.from_numpy(labels_P).to(start_P.device) if better else start_P, price_E


def _total(cost_EP: np.ndarray, labels_P: np.ndarray) -> float:
    return float(cost_EP[labels_P, np.arange(len(labels_P))].sum(dtype=np.float64))


def _nearly_balanced(cost_EP: np.ndarray, guess_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels_P, price_E): every point's cheapest cluster under prices that nearly balance the clusters.

    Ascends the dual of the assignment problem from the guess: every price moves towards the one at which exactly G
    points would take the cluster at the others' prices.
    """
    n_clusters, n_points = cost_EP.shape
    size = n_points // n_clusters
    points_P = np.arange(n_points)
    price_E = guess_E.astype(cost_EP.dtype)
    for step in range(PRICE_STEPS + 1):
        offer_EP = cost_EP + price_E[:, None]
        cheapest_P, labels_P = _cheapest(offer_EP)
        if step == PRICE_STEPS or _excess(labels_P, n_clusters) <= PRICED_EXCESS * n_points:
            break
        offer_EP[labels_P, points_P] = np.inf
        bid_EP = cheapest_P - cost_EP
        bid_EP[labels_P, points_P] = offer_EP.min(axis=0) - cost_EP[labels_P, points_P]
        balanced_E = np.partition(bid_EP, n_points - size, axis=1)[:, n_points - size]
        price_E = price_E + PRICE_DAMPING * (balanced_E - price_E)
    return labels_P, price_E


def _cheapest(offer_EP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cheapest offer to every point, the first cluster that makes it), each [P]."""
    cheapest_P = offer_EP.min(axis=0)
    return cheapest_P, (offer_EP == cheapest_P).argmax(axis=0)  # faster than argmin along the first axis


def _excess(labels_P: np.ndarray, n_clusters: int) -> int:
    """Points that are too many in their clusters."""
    return int((np.bincount(labels_P, minlength=n_clusters) - len(labels_P) // n_clusters).clip(min=0).sum())


def _settle(cost_PE: np.ndarray, labels_P: np.ndarray, price_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cluster of every point, prices): balanced, and every point in its cheapest cluster, so of least total cost.

    Starts from `labels_P`, the cheapest clusters under `price_E`. Points in excess leave along the cheapest way to a
    cluster with room, each cluster on the way passing on the point that loses least (successive shortest paths).
    """
    n_points, n_clusters = cost_PE.shape
    labels_P, price_E = labels_P.copy(), price_E.astype(np.float64)
    surplus_E = np.bincount(labels_P, minlength=n_clusters) - n_points // n_clusters
    step_EE = np.full((n_clusters, n_clusters), np.inf)
    stale = list(range(n_clusters))
    while surplus_E.any():
        for cluster in stale:
            step_EE[cluster] = _least_step(cost_PE, labels_P, cluster)
        far_E, before_E = _ways(np.maximum(step_EE + price_E - price_E[:, None], 0), surplus_E > 0)
        way = _way_to(int(np.where(surplus_E < 0, far_E, np.inf).argmin()), before_E)
        price_E = price_E - np.minimum(far_E, far_E[way[-1]])
        moved = _pass_on(cost_PE, labels_P, way, min(surplus_E[way[0]], -surplus_E[way[-1]]))
        surplus_E[way[0]] -= moved
        surplus_E[way[-1]] += moved
        stale = way
    return labels_P, price_E


def _least_step(cost_PE: np.ndarray, labels_P: np.ndarray, cluster: int) -> np.ndarray:
    """[E]: what it costs that point of the cluster to go to each other one that it costs least; inf if it has none."""
    cost_GE = cost_PE[np.flatnonzero(labels_P == cluster)]
    return (cost_GE - cost_GE[:, cluster : cluster + 1]).min(axis=0, initial=np.inf)


def _ways(length_EE: np.ndarray, source_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(length of the shortest way from any source, cluster before on that way or -1), each [E] (Bellman-Ford)."""
    far_E = np.where(source_E, 0.0, np.inf)
    before_E = np.full(len(far_E), -1)
    while True:
        through_EE = far_E[:, None] + length_EE
        last_E = through_EE.argmin(axis=0)
        reached_E = through_EE[last_E, np.arange(len(far_E))]
        nearer_E = reached_E < far_E
        if not nearer_E.any():
            return far_E, before_E
        far_E = np.where(nearer_E, reached_E, far_E)
        before_E = np.where(nearer_E, last_E, before_E)


def _way_to(cluster: int, before_E: np.ndarray) -> list[int]:
    way = [cluster]
    while before_E[way[-1]] >= 0:
        way.append(int(before_E[way[-1]]))
    return way[::-1]


def _pass_on(cost_PE: np.ndarray, labels_P: np.ndarray, way: list[int], at_most: int) -> int:
    """Move points along a way, in place; how many to each next cluster: one, or more where as many are equally near."""
    leaving = []
    for here, there in pairwise(way):
        members = np.flatnonzero(labels_P == here)
        step_G = cost_PE[members, there] - cost_PE[members, here]
        leaving.append(members[step_G == step_G.min()])
    moved = min(at_most, *map(len, leaving))
    for points, there in zip(leaving, way[1:], strict=True):
        labels_P[points[:moved]] = there
    return moved


def kmeans_plus_plus(points_PC: torch.Tensor, n_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """[E, C] starting centres: points drawn with probability proportional to the squared distance so far."""
    chosen = [int(torch.randint(len(points_PC), (1,), generator=generator))]
    square_P = squared_lengths(points_PC)
    nearest_P = distances(points_PC, points_PC[chosen], square_P)[:, 0]
    for _ in range(n_clusters - 1):
        weights_P = nearest_P.clamp(min=0).double().cpu()
        weights_P[chosen] = 0
        if weights_P.sum() == 0:  # fewer different points than clusters
            weights_P = torch.ones_like(weights_P).index_fill(0, torch.tensor(chosen), 0)
        cumulative_P = weights_P.cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative_P[-1]
        chosen.append(int(torch.searchsorted(cumulative_P, draw, right=True).clamp(max=len(points_PC) - 1)))
        nearest_P = torch.minimum(nearest_P, distances(points_PC, points_PC[chosen[-1:]], square_P)[:, 0])
    return points_PC[chosen]


def squared_lengths(points_PC: torch.Tensor) -> torch.Tensor:
    """[P] squared Euclidean length of every point."""
    return torch.linalg.vector_norm(points_PC, dim=1).square()


def distances(
    points_PC: torch.Tensor, centroids_EC: torch.Tensor, square_P: torch.Tensor | None = None
) -> torch.Tensor:
    """[P, E] squared Euclidean distances, up to rounding. `square_P`: `squared_lengths` of the points, if at hand."""
    if square_P is None:
        square_P = squared_lengths(points_PC)
    # In pieces, which the processor's cache likes better than the whole.
    cross_PE = torch.cat([part_RC @ centroids_EC.T for part_RC in points_PC.split(ROWS)])
    return cross_PE.mul_(-2).add_(square_P[:, None]).add_(squared_lengths(centroids_EC))


def cluster_means(points_PC: torch.Tensor, assignment_P: torch.Tensor, n_clusters: int) -> torch.Tensor:
    """[E, C] mean of the points of every cluster (all clusters of equal size)."""
    members_EG = torch.argsort(assignment_P, stable=True).view(n_clusters, -1)
    return torch.nn.functional.embedding_bag(members_EG, points_PC, mode="mean")  # sums the rows where they lie


def within_cluster_cost(points_PC: torch.Tensor, centroids_EC: torch.Tensor, assignment_P: torch.Tensor) -> float:
    """Sum over points of the squared distance to the centroid of their cluster."""
    return float((points_PC - centroids_EC[assignment_P]).square().sum(dtype=torch.float64))


def check_divides(n_points: int, n_clusters: int) -> None:
    """ValueError unless the clusters can be equal."""
    if n_clusters < 1 or n_points % n_clusters:
        raise ValueError(f"{n_points} points cannot be cut into {n_clusters} equal clusters")
