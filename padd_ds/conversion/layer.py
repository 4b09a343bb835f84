"""One layer of a conversion: a teacher's FFN becomes slices, a router and targets.

Shapes: S tokens, D model width, F neurons of the FFN, N slices of G = F / N neurons, E routed ones, C features.
"""

from dataclasses import dataclass, replace

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
from padd_ds.conversion.quality import between_cluster_share, silhouette, size_variation, variation
from padd_ds.conversion.refit import neuron_weights, reconstruction_error, refit_down
from padd_ds.conversion.regroup import regroup
from padd_ds.conversion.router import CalibratedRouter, Router, expert_contributions, make_router
from padd_ds.conversion.targets import LayerTargets
from padd_ds.losses.prior import expert_prior

REGROUPED = ("activations",)


@dataclass(frozen=True, kw_only=True)
class LayerQuality:
    """What to judge a layer by; all but the first four need calibration data.

    objective: the balanced k-means cost (PADD eq. 1) in the space of the features.
    between_cluster_share: of the variance of the features.
    size_variation: coefficient of variation of the sizes, 0 when balanced.
    load_variation: coefficient of variation of the experts' loads under the router.
    expected_load: share of the routed slots that go to each routed expert, summing to 1.
    shared_contribution: share of the FFN's contribution that the shared slices give.
    reconstruction_error: squared error of the student's FFN output over the square of the teacher's, both on the
        student's inputs.
    """

    objective: float
    silhouette: float
    between_cluster_share: float
    size_variation: float
    load_variation: float | None = None
    expected_load: list[float] | None = None
    shared_contribution: float | None = None
    reconstruction_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class ConvertedLayer:
    """A layer's slices and router.

    members_NG: neurons of every slice, routed slices first. refitted_down_DF: down_proj of the student's neurons
    where it was refitted, otherwise None.
    """

    members_NG: torch.Tensor
    router: Router
    refitted_down_DF: torch.Tensor | None
    targets: LayerTargets
    quality: LayerQuality


@dataclass(frozen=True, kw_only=True)
class Ffn:
    """A gated FFN's matrices in fp32."""

    gate_FD: torch.Tensor
    up_FD: torch.Tensor
    down_DF: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """Inputs of a layer's FFN on the calibration tokens, in fp32: those that the teacher gives and the student's own.

    Choice: p_T is the teacher's (PADD eq. 2); slices, router and refit are made for what the student will see.
    """

    teacher_SD: torch.Tensor
    student_SD: torch.Tensor


def convert_layer(
    ffn: Ffn, inputs: LayerInputs | None, slicing: Slicing, options: ConversionOptions, generator: torch.Generator
) -> ConvertedLayer:
    """Cut an FFN into shared and routed slices. `inputs` is None without data."""
    if inputs is None:
        return _convert_without_data(ffn, slicing, options, generator)
    x_SD = inputs.student_SD
    hidden_SF = hidden_activations(x_SD, ffn.gate_FD, ffn.up_FD)
    contribution_SF = contributions(hidden_SF, ffn.down_DF)
    importance_F = contribution_SF.mean(dim=0)
    features_FC = neuron_features(options, ffn, contribution_SF)
    shared, routed = split_shared(importance_F, slicing)
    clustering = group(options, features_FC[routed], slicing.routed, generator)
    if options.cluster in REGROUPED and options.regroup_rounds:
        clustering = _regrouped(clustering, features_FC[routed], contribution_SF[:, routed], x_SD, slicing, options)
    assignment_F, members_NG = _slices(clustering.assignment_P, shared, routed, slicing)
    members_EG = members_NG[: slicing.routed]
    contribution_SE = None
    if options.router == "calibrated":
        contribution_SE = expert_contributions(hidden_SF, ffn.down_DF, members_EG)
    router = make_router(options.router, ffn.gate_FD, members_EG, x_SD, contribution_SE, generator)

    weight_SE = router.weights(x_SD, slicing.top_k)
    target_SD = hidden_SF @ ffn.down_DF.T
    active_SF = hidden_SF.mul_(neuron_weights(weight_SE, members_NG, slicing.width))
    refitted_down_DF = refit_down(active_SF, target_SD, ffn.down_DF) if options.refit else None
    output_SD = active_SF @ (ffn.down_DF if refitted_down_DF is None else refitted_down_DF).T
    load_E = (weight_SE > 0).float().sum(dim=0)
    quality = replace(
        judge(features_FC[routed], clustering, generator),
        load_variation=variation(load_E),
        expected_load=(load_E / load_E.sum()).tolist(),
        shared_contribution=float(importance_F[shared].sum() / importance_F.sum()),
        reconstruction_error=reconstruction_error(target_SD, output_SD),
    )
    mean_E = cluster_activation_means(hidden_activations(inputs.teacher_SD, ffn.gate_FD, ffn.up_FD), members_EG)
    targets = LayerTargets(
        assignment_F=assignment_F,
        centroids_EC=clustering.centroids_EC,
        activation_mean_E=mean_E,
        expert_prior_E=expert_prior(mean_E, options.prior_temperature),
    )
    return ConvertedLayer(
        members_NG=members_NG, router=router, refitted_down_DF=refitted_down_DF, targets=targets, quality=quality
    )


def _convert_without_data(
    ffn: Ffn, slicing: Slicing, options: ConversionOptions, generator: torch.Generator
) -> ConvertedLayer:
    features_FC = neuron_features(options, ffn, None)
    shared, routed = split_shared(weight_importance(ffn.gate_FD, ffn.down_DF), slicing)
    clustering = group(options, features_FC[routed], slicing.routed, generator)
    assignment_F, members_NG = _slices(clustering.assignment_P, shared, routed, slicing)
    router = make_router(options.router, ffn.gate_FD, members_NG[: slicing.routed], None, None, generator)
    targets = LayerTargets(
        assignment_F=assignment_F,
        centroids_EC=clustering.centroids_EC,
        activation_mean_E=None,
        expert_prior_E=None,
    )
    quality = judge(features_FC[routed], clustering, generator)
    return ConvertedLayer(members_NG=members_NG, router=router, refitted_down_DF=None, targets=targets, quality=quality)


def neuron_features(options: ConversionOptions, ffn: Ffn, contribution_SF: torch.Tensor | None) -> torch.Tensor:
    """[F, C]: contribution patterns, or the gate rows for `weights` and wherever there is no data."""
    if options.cluster == "weights" or contribution_SF is None:
        return ffn.gate_FD
    return contribution_pattern(contribution_SF)


def _slices(
    assignment_P: torch.Tensor, shared: torch.Tensor, routed: torch.Tensor, slicing: Slicing
) -> tuple[torch.Tensor, torch.Tensor]:
    """(slice of every neuron [F], neurons of every slice [N, G]): routed slices first, then the shared ones."""
    assignment_F = torch.empty(slicing.width, dtype=torch.long, device=assignment_P.device)
    assignment_F[routed] = assignment_P
    assignment_F[shared] = slicing.routed + torch.arange(len(shared), device=shared.device) // slicing.slice_width
    return assignment_F, torch.argsort(assignment_F, stable=True).view(slicing.experts, slicing.slice_width)


def _regrouped(
    clustering: Clustering,
    features_PC: torch.Tensor,
    contribution_SP: torch.Tensor,
    x_SD: torch.Tensor,
    slicing: Slicing,
    options: ConversionOptions,
) -> Clustering:
    assignment_P = regroup(
        contribution_SP,
        clustering.assignment_P,
        CalibratedRouter(x_SD),
        x_SD,
        n_experts=slicing.routed,
        top_k=slicing.top_k,
        rounds=options.regroup_rounds,
    )
    return Clustering(assignment_P=assignment_P, centroids_EC=cluster_means(features_PC, assignment_P, slicing.routed))


def judge(features_PC: torch.Tensor, clustering: Clustering, generator: torch.Generator) -> LayerQuality:
    """The quality of a grouping of the routed neurons, as far as their features tell it."""
    assignment_P, centroids_EC = clustering.assignment_P, clustering.centroids_EC
    return LayerQuality(
        objective=within_cluster_cost(features_PC, centroids_EC, assignment_P),
        silhouette=silhouette(features_PC, assignment_P, generator),
        between_cluster_share=between_cluster_share(features_PC, centroids_EC, assignment_P),
        size_variation=size_variation(assignment_P, len(centroids_EC)),
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


def group(
    options: ConversionOptions, features_PC: torch.Tensor, n_clusters: int, generator: torch.Generator
) -> Clustering:
    """Group the routed neurons: by balanced k-means of their features, at random, or as they stand in the teacher."""
    n_points = len(features_PC)
    kind = options.cluster
    if kind in ("activations", "weights"):
        return balanced_kmeans(features_PC, n_clusters, generator)
    if kind == "random":
        assignment_P = torch.randperm(n_points, generator=generator) % n_clusters
    else:
        assignment_P = torch.arange(n_points) // (n_points // n_clusters)
    assignment_P = assignment_P.to(features_PC.device)
    return Clustering(assignment_P=assignment_P, centroids_EC=cluster_means(features_PC, assignment_P, n_clusters))
