"""How good a partition of a layer's neurons is.

Shapes: P points (routed neurons), C features, E clusters, S tokens, K experts per token.
"""

import torch

SILHOUETTE_SAMPLE = 1024


def silhouette(
    points_PC: torch.Tensor, assignment_P: torch.Tensor, generator: torch.Generator, sample: int = SILHOUETTE_SAMPLE
) -> float:
    """Mean silhouette coefficient, in -1..1, over at most `sample` points against each other.

    A point alone in its cluster counts 0, and so does a partition of one cluster.
    """
    chosen = torch.randperm(len(points_PC), generator=generator)[:sample].to(points_PC.device)
    points_PC, assignment_P = points_PC[chosen].float(), assignment_P[chosen]
    one_hot_PE = torch.nn.functional.one_hot(assignment_P).float()
    one_hot_PE = one_hot_PE[:, one_hot_PE.sum(0) > 0]
    if one_hot_PE.shape[1] < 2:
        return 0.0
    sizes_E = one_hot_PE.sum(0)
    distance_sum_PE = torch.cdist(points_PC, points_PC) @ one_hot_PE
    own_size_P = one_hot_PE @ sizes_E
    inside_P = (distance_sum_PE * one_hot_PE).sum(1) / (own_size_P - 1).clamp(min=1)
    outside_P = (distance_sum_PE / sizes_E).masked_fill(one_hot_PE.bool(), torch.inf).amin(1)
    score_P = (outside_P - inside_P) / torch.maximum(inside_P, outside_P).clamp(min=1e-12)
    return float(score_P.masked_fill(own_size_P == 1, 0.0).mean())


def between_cluster_share(points_PC: torch.Tensor, centroids_EC: torch.Tensor, assignment_P: torch.Tensor) -> float:
    """Between-cluster variance as a share of the total variance of the points, in 0..1."""
    points_PC, centroids_EC = points_PC.float(), centroids_EC.float()
    mean_C = points_PC.mean(0)
    total = (points_PC - mean_C).square().sum()
    between = (centroids_EC[assignment_P] - mean_C).square().sum()
    return float(between / total) if total > 0 else 0.0


def size_variation(assignment_P: torch.Tensor, n_clusters: int) -> float:
    """Coefficient of variation of the cluster sizes; 0 when balanced."""
    return variation(torch.bincount(assignment_P, minlength=n_clusters).float())


def variation(values: torch.Tensor) -> float:
    """Population standard deviation over mean."""
    return float(values.std(correction=0) / values.mean())
