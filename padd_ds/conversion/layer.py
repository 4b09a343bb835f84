"""One layer of a conversion: a teacher's FFN becomes slices, a router and targets.

Shapes: S tokens, D model width, F neurons of the FFN, N slices of G = F / N neurons, E routed ones, C features.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from padd_ds.conversion.clustering import (
    Clustering,
    balanced_kmeans,
    cluster_means,
)
from padd_ds.conversion.copies import route_copies
from padd_ds.conversion.features import (
    contribution_pattern,
    contributions,
    hidden_activations,
    mixed_features,
    weight_features,
    weight_importance,
)
from padd_ds.conversion.merging import over_clustered_kmeans
from padd_ds.conversion.options import ConversionOptions, Slicing
from padd_ds.conversion.prior import cluster_activation_means
from padd_ds.conversion.quality import silhouette, size_variation, sums_of_squares, variation
from padd_ds.conversion.refit import neuron_weights, reconstruction_error, refit_down, token_weights
from padd_ds.conversion.regroup import regroup
from padd_ds.conversion.router import Router, RouterData, even_load, expert_contributions, make_router
from padd_ds.conversion.targets import LayerTargets
from padd_ds.losses.prior import expert_prior

KMEANS = ("activations", "weights", "mixed")
REGROUPED = ("activations", "mixed")


@dataclass(frozen=True, kw_only=True)
class LayerQuality:
    """What to judge a layer by; all but the first four need calibration data.

    objective: the balanced k-means cost (PADD eq. 1) in the space of the features.
    iterations: of the k-means that gave the groups, 0 where there was none.
    between_cluster_share: of the variance of the features.
    size_variation: coefficient of variation of the sizes, 0 when balanced.
    load_variation: coefficient of variation of the experts' loads under the router.
    expected_load: share of the routed slots that go to each routed expert, summing to 1.
    shared_contribution: share of the neurons' squared contributions that the shared slices give.
    reconstruction_error: squared error of the student's FFN output over the square of the teacher's, both on the
        student's inputs, tokens weighted by `token_weights`.
    """

    objective: float
    iterations: int
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

    stream_SD: the student's residual stream that the FFN's output is added to.
    Choice: p_T is the teacher's (PADD eq. 2); slices, router and refit are made for what the student will see.
    """

    teacher_SD: torch.Tensor
    student_SD: torch.Tensor
    stream_SD: torch.Tensor


def convert_layer(
    ffn: Ffn, inputs: LayerInputs | None, slicing: Slicing, options: ConversionOptions, generator: torch.Generator
) -> ConvertedLayer:
    """Cut an FFN into shared and routed slices. `inputs` is None without data."""
    if inputs is None:
        return _convert_without_data(ffn, slicing, options, generator)
    x_SD = inputs.student_SD
    hidden_SF = hidden_activations(x_SD, ffn.gate_FD, ffn.up_FD)
    target_SD = hidden_SF @ ffn.down_DF.T
    weight_S = token_weights(inputs.stream_SD + target_SD)
    contribution_SF = contributions(hidden_SF, ffn.down_DF)
    energy_SF = contribution_SF.square() * weight_S[:, None]
    features_FC = neuron_features(options, ffn, contribution_SF)
    slice_F, clustering = _group_all(features_FC, energy_SF, x_SD, slicing, options, generator)
    members_NG = _members(slice_F, slicing)
    members_EG = members_NG[: slicing.groups]
    data = None
    if options.router == "calibrated":
        energy_SE = energy_SF @ functional.one_hot(slice_F, slicing.experts)[:, : slicing.groups].float()
        data = RouterData(
            x_SD=x_SD,
            contribution_SE=expert_contributions(hidden_SF, ffn.down_DF, members_EG),
            gain_SE=energy_SE,
            top_k=slicing.top_k,
        )
    router = make_router(options.router, ffn.gate_FD, members_EG, data, generator)
    router = route_copies(router, x_SD, slicing.copies, generator)
    if options.even_load:
        router = even_load(router, x_SD, slicing.top_k)
    members_NG = _copied(members_NG, slicing)

    weight_SE = router.weights(x_SD, slicing.top_k)
    active_SF = hidden_SF.mul_(neuron_weights(weight_SE, members_NG, slicing.width))
    refitted_down_DF = refit_down(active_SF, target_SD, ffn.down_DF, weight_S) if options.refit else None
    output_SD = active_SF @ (ffn.down_DF if refitted_down_DF is None else refitted_down_DF).T
    load_E = (weight_SE > 0).float().sum(dim=0)
    quality = replace(
        judge(features_FC[slice_F < slicing.groups], clustering, generator),
        load_variation=variation(load_E),
        expected_load=(load_E / load_E.sum()).tolist(),
        shared_contribution=float(energy_SF[:, slice_F >= slicing.groups].sum() / energy_SF.sum()),
        reconstruction_error=reconstruction_error(target_SD, output_SD, weight_S),
    )
    teacher_SF = hidden_activations(inputs.teacher_SD, ffn.gate_FD, ffn.up_FD)
    mean_E = cluster_activation_means(teacher_SF, members_NG[: slicing.routed])
    targets = _targets(slice_F, clustering, mean_E, slicing, options)
    return ConvertedLayer(
        members_NG=members_NG, router=router, refitted_down_DF=refitted_down_DF, targets=targets, quality=quality
    )


def _group_all(
    features_FC: torch.Tensor,
    energy_SF: torch.Tensor,
    x_SD: torch.Tensor,
    slicing: Slicing,
    options: ConversionOptions,
    generator: torch.Generator,
) -> tuple[torch.Tensor, Clustering]:
    """Slice of every neuron [F], and the clustering of the routed ones, which stand in the order of the neurons."""
    shared, routed = split_shared(energy_SF.mean(dim=0), slicing)
    clustering = group(options, features_FC[routed], slicing.groups, generator)
    slice_F = _slice_of(clustering.assignment_P, shared, routed, slicing)
    if options.cluster not in REGROUPED or not options.regroup_rounds:
        return slice_F, clustering
    slice_F = regroup(
        energy_SF,
        slice_F,
        x_SD,
        n_routed=slicing.groups,
        n_slices=slicing.experts,
        top_k=slicing.top_k,
        rounds=options.regroup_rounds,
    )
    routed_F = slice_F < slicing.groups
    centroids_EC = cluster_means(features_FC[routed_F], slice_F[routed_F], slicing.groups)
    return slice_F, replace(clustering, assignment_P=slice_F[routed_F], centroids_EC=centroids_EC)


def _convert_without_data(
    ffn: Ffn, slicing: Slicing, options: ConversionOptions, generator: torch.Generator
) -> ConvertedLayer:
    features_FC = neuron_features(options, ffn, None)
    shared, routed = split_shared(weight_importance(ffn.gate_FD, ffn.down_DF), slicing)
    clustering = group(options, features_FC[routed], slicing.groups, generator)
    slice_F = _slice_of(clustering.assignment_P, shared, routed, slicing)
    members_NG = _members(slice_F, slicing)
    return ConvertedLayer(
        members_NG=members_NG,
        router=make_router(options.router, ffn.gate_FD, members_NG[: slicing.groups], None, generator),
        refitted_down_DF=None,
        targets=_targets(slice_F, clustering, None, slicing, options),
        quality=judge(features_FC[routed], clustering, generator),
    )


def _targets(
    slice_F: torch.Tensor,
    clustering: Clustering,
    mean_E: torch.Tensor | None,
    slicing: Slicing,
    options: ConversionOptions,
) -> LayerTargets:
    """What training needs; shared slices are numbered behind all copies of the routed ones."""
    behind = slicing.routed - slicing.groups
    return LayerTargets(
        assignment_F=torch.where(slice_F < slicing.groups, slice_F, slice_F + behind),
        centroids_EC=clustering.centroids_EC.repeat(slicing.copies, 1),
        activation_mean_E=mean_E,
        expert_prior_E=None if mean_E is None else expert_prior(mean_E, options.prior_temperature),
    )


def neuron_features(options: ConversionOptions, ffn: Ffn, contribution_SF: torch.Tensor | None) -> torch.Tensor:
    """[F, C]: contribution patterns, weights or both, as `cluster` says; weights wherever there is no data."""
    parts = options.weight_features.split("+")
    if options.cluster == "weights" or contribution_SF is None:
        return weight_features(ffn.gate_FD, ffn.up_FD, ffn.down_DF, parts)
    pattern_FC = contribution_pattern(contribution_SF)
    if options.cluster != "mixed":
        return pattern_FC
    return mixed_features(pattern_FC, weight_features(ffn.gate_FD, ffn.up_FD, ffn.down_DF, parts))


def _slice_of(assignment_P: torch.Tensor, shared: torch.Tensor, routed: torch.Tensor, slicing: Slicing) -> torch.Tensor:
    """[F]: slice of every neuron, the routed slices first."""
    slice_F = torch.empty(slicing.width, dtype=torch.long, device=assignment_P.device)
    slice_F[routed] = assignment_P
    slice_F[shared] = slicing.groups + torch.arange(len(shared), device=shared.device) // slicing.slice_width
    return slice_F


def _members(slice_F: torch.Tensor, slicing: Slicing) -> torch.Tensor:
    """[N, G]: neurons of every slice."""
    return torch.argsort(slice_F, stable=True).view(slicing.experts, slicing.slice_width)


def _copied(members_NG: torch.Tensor, slicing: Slicing) -> torch.Tensor:
    """The routed slices as often as there are copies, then the shared ones."""
    groups, shared = members_NG.split([slicing.groups, slicing.shared])
    return torch.cat([groups.repeat(slicing.copies, 1), shared])


def judge(features_PC: torch.Tensor, clustering: Clustering, generator: torch.Generator) -> LayerQuality:
    """The quality of a grouping of the routed neurons, as far as their features tell it."""
    assignment_P, centroids_EC = clustering.assignment_P, clustering.centroids_EC
    within, between = sums_of_squares(features_PC, centroids_EC, assignment_P)
    return LayerQuality(
        objective=within,
        iterations=max(len(clustering.costs) - 1, 0),
        silhouette=silhouette(features_PC, assignment_P, generator),
        between_cluster_share=between / (within + between) if within + between > 0 else 0.0,
        size_variation=size_variation(assignment_P, len(centroids_EC)),
    )


def split_shared(importance_F: torch.Tensor, slicing: Slicing) -> tuple[torch.Tensor, torch.Tensor]:
    """(shared, routed) neurons: the S * G most important ones, strongest first, and the others in order.

    Choice: the importance is the mean square of the contribution on the calibration data, or the product of the
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
    if kind in KMEANS:
        if options.overcluster > 1:
            return over_clustered_kmeans(
                features_PC, n_clusters, generator, ratio=options.overcluster, restarts=options.restarts
            )
        return balanced_kmeans(features_PC, n_clusters, generator, restarts=options.restarts)
    if kind == "random":
        assignment_P = torch.randperm(n_points, generator=generator) % n_clusters
    else:
        assignment_P = torch.arange(n_points) // (n_points // n_clusters)
    assignment_P = assignment_P.to(features_PC.device)
    return Clustering(assignment_P=assignment_P, centroids_EC=cluster_means(features_PC, assignment_P, n_clusters))
