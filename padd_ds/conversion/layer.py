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
    Router,
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
    """`members_NG`: neurons of every slice, routed slices first."""

    members_NG: torch.Tensor
    router: Router
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
    """Cut an FFN into shared and routed slices. `x_SD`: its calibration inputs, None without data."""
    hidden_SF = None if x_SD is None else hidden_activations(x_SD, ffn.gate_FD, ffn.up_FD)
    contribution_SF = None if hidden_SF is None else contributions(hidden_SF, ffn.down_DF)
    importance_F = (
        weight_importance(ffn.gate_FD, ffn.down_DF) if contribution_SF is None else contribution_SF.mean(dim=0)
    )
    shared, routed = split_shared(importance_F, slicing)
    use_weights = options.cluster == "weights" or contribution_SF is None
    features_FC = ffn.gate_FD if use_weights else contribution_pattern(contribution_SF)  # type: ignore[arg-type]
    clustering = group(options.cluster, features_FC[routed], slicing.routed, generator)
    assignment_F = torch.empty(slicing.width, dtype=torch.long, device=importance_F.device)
    assignment_F[routed] = clustering.assignment_P
    assignment_F[shared] = slicing.routed + torch.arange(len(shared), device=shared.device) // slicing.slice_width
    members_NG = torch.argsort(assignment_F, stable=True).view(slicing.experts, slicing.slice_width)
    members_EG = members_NG[: slicing.routed]
    target_SE = None if hidden_SF is None else expert_contributions(hidden_SF, ffn.down_DF, members_EG)
    router = make_router(options.router, ffn.gate_FD, members_EG, x_SD, target_SE, generator)
    mean_E = None if hidden_SF is None else cluster_activation_means(hidden_SF, members_EG)
    return ConvertedLayer(
        members_NG=members_NG,
        router=router,
        targets=LayerTargets(
            assignment_F=assignment_F,
            centroids=clustering.centroids_EC,
            activation_mean_E=mean_E,
            expert_prior_E=None if mean_E is None else expert_prior(mean_E, options.prior_temperature),
        ),
        quality=LayerQuality(
            objective=within_cluster_cost(features_FC[routed], clustering.centroids_EC, clustering.assignment_P),
            silhouette=silhouette(features_FC[routed], clustering.assignment_P, generator),
            between_cluster_share=between_cluster_share(
                features_FC[routed], clustering.centroids_EC, clustering.assignment_P
            ),
            size_variation=size_variation(clustering.assignment_P, slicing.routed),
            load_variation=None if x_SD is None else load_variation(router, x_SD, slicing.top_k),
            shared_contribution=(
                None if contribution_SF is None else float(importance_F[shared].sum() / importance_F.sum())
            ),
        ),
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
    return Clustering(
        assignment_P=assignment_P, centroids_EC=cluster_means(features_PC, assignment_P, n_clusters)
    )
