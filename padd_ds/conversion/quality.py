"""How good a partition of a layer's neurons is.

Shapes: P points (routed neurons), C features, E clusters, S tokens, K experts per token.
"""

import torch

from padd_ds.conversion.clustering import squared_lengths

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


def sums_of_squares(
    points_PC: torch.Tensor, centroids_EC: torch.Tensor, assignment_P: torch.Tensor
) -> tuple[float, float]:
    """(within clusters, between them): points around the mean of their cluster, and those means around that of all.

    centroids_EC: the means of the clusters. Up to rounding, about 1e-7 of the points' sum of squares.
    """
    size_E = torch.bincount(assignment_P, minlength=len(centroids_EC)).double()
    means_EC = centroids_EC.double()
    square = float(squared_lengths(points_PC.float()).sum(dtype=torch.float64))
    within = max(square - float(size_E @ means_EC.square().sum(1)), 0.0)
    mean_C = size_E @ means_EC / size_E.sum()
    return within, float(size_E @ (means_EC - mean_C).square().sum(1))


def size_variation(assignment_P: torch.Tensor, n_clusters: int) -> float:
    """Coefficient of variation of the cluster sizes; 0 when balanced."""
    return variation(torch.bincount(assignment_P, minlength=n_clusters).float())


def variation(values: torch.Tensor) -> float:
    """Population standard deviation over mean."""
    return float(values.std(correction=0) / values.mean())
