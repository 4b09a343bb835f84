"""Over-clustering: many small equal clusters, merged by average linkage into fewer equal ones.

Shapes: P points, C features of a point, M small clusters, E clusters, R = M / E small clusters of a cluster.
"""

import numpy as np
import torch

from padd_ds.conversion.clustering import MAX_ITERATIONS, Clustering, balanced_kmeans, check_divides, refine

RATIO = 4


def over_clustered_kmeans(
    points_PC: torch.Tensor,
    n_clusters: int,
    generator: torch.Generator,
    *,
    ratio: int = RATIO,
    max_iterations: int = MAX_ITERATIONS,
    restarts: int = 1,
) -> Clustering:
    """Balanced k-means into M = `ratio` * E clusters, merged to E equal ones, then refined while the cost falls.

    `costs` begins with that of the merged clusters. ValueError unless `ratio` * E divides P.
    """
    if ratio < 1:
        raise ValueError(f"ratio is {ratio}, but a cluster is made of at least one small one")
    check_divides(len(points_PC), ratio * n_clusters)
    small = balanced_kmeans(points_PC, ratio * n_clusters, generator, max_iterations, restarts)
    merged_M = merge_equally(small.centroids_EC, n_clusters)
    return refine(points_PC, merged_M[small.assignment_P], n_clusters, max_iterations)


def merge_equally(centroids_MC: torch.Tensor, n_clusters: int) -> torch.Tensor:
    """[M] int64: the cluster of every small cluster, each cluster made of exactly R; on the centroids' device.

    UPGMA on the Euclidean distances of the centroids: the two clusters at the least mean distance merge, among
    the pairs after which the sizes can still be packed into E clusters of R. Clusters are numbered by their first
    small one. ValueError unless E divides M.
    """
    n_small = len(centroids_MC)
    check_divides(n_small, n_clusters)
    distance_MM = torch.cdist(centroids_MC.double(), centroids_MC.double()).cpu().numpy()
    np.fill_diagonal(distance_MM, np.inf)
    size_M = np.ones(n_small, dtype=np.int64)  # 0 once merged into another
    merged_M = np.arange(n_small)
    for _ in range(n_small - n_clusters):
        kept, gone = _closest_pair(distance_MM, size_M, n_clusters)
        merged_M[merged_M == gone] = kept
        mean_M = np.average(distance_MM[[kept, gone]], axis=0, weights=size_M[[kept, gone]])
        distance_MM[kept], distance_MM[:, kept] = mean_M, mean_M
        distance_MM[gone], distance_MM[:, gone] = np.inf, np.inf
        size_M[kept], size_M[gone] = size_M[kept] + size_M[gone], 0
    return torch.from_numpy(np.unique(merged_M, return_inverse=True)[1]).to(centroids_MC.device)


def _closest_pair(distance_MM: np.ndarray, size_M: np.ndarray, n_clusters: int) -> tuple[int, int]:
    """(lower, higher) index of the nearest two clusters that may merge."""
    full = len(size_M) // n_clusters
    size_R = np.arange(full + 1)
    barred_RR = size_R[:, None] + size_R > full
    while True:
        open_MM = np.where(barred_RR[size_M[:, None], size_M], np.inf, distance_MM)
        first, second = sorted(int(index) for index in np.unravel_index(open_MM.argmin(), open_MM.shape))
        sizes = size_M[first], size_M[second]
        left = np.delete(size_M, [first, second])
        if packable([*left.tolist(), int(sum(sizes))], n_clusters, full):
            return first, second
        barred_RR[sizes], barred_RR[sizes[::-1]] = True, True


def packable(sizes: list[int], n_bins: int, room: int) -> bool:
    """Whether first-fit-decreasing packs the sizes, each of at most `room`, into bins of that room.

    Where it does and the bins come out full, it still does after the largest size that does not fill a bin merges
    with the next one in its bin, so a search that keeps to it never gets stuck.
    """
    rooms = [room] * n_bins
    for size in range(room, 0, -1):
        count = sizes.count(size)
        for index, left in enumerate(rooms):
            placed = min(count, left // size)
            rooms[index] -= placed * size
            count -= placed
        if count:
            return False
    return True
