"""One layer of a conversion: a teacher's FFN becomes slices, a router and targets.

Shapes: S tokens, D model width, F neurons of the FFN, N slices of G = F / N neurons, E routed ones, C features.
"""

from dataclasses import asdict, dataclass

import torch

from padd_ds.conversion.clustering import (
    Clustering,
    balanced_kmeans,
    cluster_means,
    within_cluster_cost,
)
from padd_ds.conversion.features import (
    contribution_pattern,
    contributions,
    hidden_activations,
    weight_importance,
)
from padd_ds.conversion.options import ConversionOptions, Slicing
from padd_ds.conversion.prior import cluster_activation_means
from padd_ds.conversion.quality import between_cluster_share, silhouette, size_variation
from padd_ds.conversion.router import (
    expert_contributions,
    load_variation,
    make_router,
)
from padd_ds.conversion.targets import LayerTargets
from padd_ds.losses.prior import expert_prior


@dataclass(frozen=True, kw_only=True)
class LayerQuality:
    """What to judge a layer's partition by; the last two need calibration data.

    objective: the balanced k-means cost (PADD eq. 1) in the space of the features.
    between_cluster_share: of the variance of the features.
    size_variation: coefficient of variation of the sizes, 0 when balanced.
    load_variation: coefficient of variation of the experts' loads under the router.
    shared_contribution: share of the FFN's contribution that the shared slices give.
    """

    objective: float
    silhouette: float
    between_cluster_share: float
    size_variation: float
    load_variation: float | None
    shared_contribution: float | None


@dataclass(frozen=True, kw_only=True)
class ConvertedLayer:
    """`members_NG`: neurons of every slice, routed slices first; `router_ED`: rows of the router."""

    members_NG: torch.Tensor
    router_ED: torch.Tensor
    targets: LayerTargets
    quality: LayerQuality

    def report(self) -> dict[str, float | None]:
        """The quality as plain numbers."""
        return asdict(self.quality)


@dataclass(frozen=True, kw_only=True)
class Ffn:
    """A gated FFN's matrices in fp32."""

    gate_FD: torch.Tensor
    up_FD: torch.Tensor
    down_DF: torch.Tensor


def convert_layer(
    ffn: Ffn, x_SD: torch.Tensor | None, slicing: Slicing, options: ConversionOptions, generator: torch.Generator
) -> ConvertedLayer:
    """Cut an FFN into shared and routed slices. `x_SD`: its calibration inputs in fp32, None without data."""
    importance_F, features_FC, hidden_SF = describe_neurons(ffn, x_SD, options.cluster)
    shared, routed = split_shared(importance_F, slicing)
    clustering = group(options.cluster, features_FC[routed], slicing.routed, generator)
    assignment_F = torch.empty(slicing.width, dtype=torch.long, device=importance_F.device)
    assignment_F[routed] = clustering.assignment_P
    assignment_F[shared] = slicing.routed + torch.arange(len(shared), device=shared.device) // slicing.slice_width
    members_NG = torch.argsort(assignment_F, stable=True).view(slicing.experts, slicing.slice_width)
    members_EG = members_NG[: slicing.routed]

    contribution_SE = mean_E = load = shared_share = None
    if x_SD is not None and hidden_SF is not None:
        if options.router == "calibrated":
            contribution_SE = expert_contributions(hidden_SF, ffn.down_DF, members_EG)
        mean_E = cluster_activation_means(hidden_SF, members_EG)
        shared_share = float(importance_F[shared].sum() / importance_F.sum())
    router_ED = make_router(options.router, ffn.gate_FD, members_EG, x_SD, contribution_SE, generator)
    if x_SD is not None:
        load = load_variation(router_ED, x_SD, slicing.top_k)
    targets = LayerTargets(
        assignment_F=assignment_F,
        centroids_EC=clustering.centroids_EC,
        activation_mean_E=mean_E,
        expert_prior_E=None if mean_E is None else expert_prior(mean_E, options.prior_temperature),
    )
    quality = judge(features_FC[routed], clustering, generator, load, shared_share)
    return ConvertedLayer(members_NG=members_NG, router_ED=router_ED, targets=targets, quality=quality)


def describe_neurons(
    ffn: Ffn, x_SD: torch.Tensor | None, cluster: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Importance [F], features [F, C] and, with data, activations [S, F] of the neurons.

    Features are the contribution patterns, or the gate rows for `weights` and wherever there is no data.
    """
    if x_SD is None:
        return weight_importance(ffn.gate_FD, ffn.down_DF), ffn.gate_FD, None
    hidden_SF = hidden_activations(x_SD, ffn.gate_FD, ffn.up_FD)
    contribution_SF = contributions(hidden_SF, ffn.down_DF)
    features_FC = ffn.gate_FD if cluster == "weights" else contribution_pattern(contribution_SF)
    return contribution_SF.mean(dim=0), features_FC, hidden_SF


def judge(
    features_PC: torch.Tensor,
    clustering: Clustering,
    generator: torch.Generator,
    load: float | None,
    shared_contribution: float | None,
) -> LayerQuality:
    """The quality of a grouping of the routed neurons."""
    assignment_P, centroids_EC = clustering.assignment_P, clustering.centroids_EC
    return LayerQuality(
        objective=within_cluster_cost(features_PC, centroids_EC, assignment_P),
        silhouette=silhouette(features_PC, assignment_P, generator),
        between_cluster_share=between_cluster_share(features_PC, centroids_EC, assignment_P),
        size_variation=size_variation(assignment_P, len(centroids_EC)),
        load_variation=load,
        shared_contribution=shared_contribution,
    )


def split_shared(importance_F: torch.Tensor, slicing: Slicing) -> tuple[torch.Tensor, torch.Tensor]:
    """(shared, routed) neurons: the S * G most important ones, strongest first, and the others in order.

    Choice: the importance is the mean contribution on the calibration data, or the product of the
    weight norms without data. It is the same for every way of grouping, so that `random` and
    `contiguous` differ from the others in the grouping of the routed neurons alone.
    """
    order_F = torch.argsort(importance_F, descending=True, stable=True)
    n_shared = slicing.shared * slicing.slice_width
    return order_F[:n_shared], order_F[n_shared:].sort().values


def group(kind: str, features_PC: torch.Tensor, n_clusters: int, generator: torch.Generator) -> Clustering:
    """Group the routed neurons: by balanced k-means of their features, at random, or as they stand in the teacher."""
    n_points = len(features_PC)
    if kind in ("activations", "weights"):
        return balanced_kmeans(features_PC, n_clusters, generator)
    if kind == "random":
        assignment_P = torch.randperm(n_points, generator=generator) % n_clusters
    else:
        assignment_P = torch.arange(n_points) // (n_points // n_clusters)
    assignment_P = assignment_P.to(features_PC.device)
    return Clustering(assignment_P=assignment_P, centroids_EC=cluster_means(features_PC, assignment_P, n_clusters))
