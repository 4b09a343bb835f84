"""One layer of an existing MoE student: clusters of the teacher's neurons become rows of its router.

Shapes: S tokens, D model width (teacher and student may differ), F neurons of the teacher's FFN, E experts of the
student, G = F // E neurons of a cluster.
"""

from dataclasses import dataclass, replace

import torch

from padd_ds.conversion.features import contributions, hidden_activations, weight_importance
from padd_ds.conversion.layer import Ffn, LayerQuality, group, judge, neuron_features
from padd_ds.conversion.options import ConversionOptions
from padd_ds.conversion.prior import cluster_activation_means
from padd_ds.conversion.quality import variation
from padd_ds.conversion.router import (
    MIN_CONTRIBUTION,
    MIN_SPREAD,
    CalibratedRouter,
    centroid_router,
    expert_contributions,
    logit_spread,
    random_router,
    unit_spread,
)
from padd_ds.conversion.targets import LayerTargets
from padd_ds.losses.prior import expert_prior

LEFT_OUT = -1


@dataclass(frozen=True, kw_only=True)
class RoutedLayer:
    """`weight_ED` replaces the student's router, `intercept_E` belongs to its logits where the class has a slot."""

    weight_ED: torch.Tensor
    intercept_E: torch.Tensor
    targets: LayerTargets
    quality: LayerQuality


@dataclass(frozen=True, kw_only=True)
class StudentRouter:
    """A student's own router [E, D] and, with data, the inputs [S, D] of its layer on the teacher's tokens.

    has_bias: whether the class has a bias of the selection, where an intercept can go.
    """

    weight_ED: torch.Tensor
    x_SD: torch.Tensor | None
    top_k: int
    has_bias: bool


def route_layer(
    ffn: Ffn,
    teacher_x_SD: torch.Tensor | None,
    student: StudentRouter,
    options: ConversionOptions,
    generator: torch.Generator,
) -> RoutedLayer:
    """Cluster the teacher's neurons into as many groups as the student has experts; rows and p_T by METHOD.

    Choice: the F mod E neurons of least contribution belong to no cluster. Choice: the new logits spread over
    the experts as the old router's do, so that the softmax of the student keeps its sharpness.
    """
    n_experts = len(student.weight_ED)
    hidden_SF = contribution_SF = mean_E = None
    importance_F = weight_importance(ffn.gate_FD, ffn.down_DF)
    if teacher_x_SD is not None:
        hidden_SF = hidden_activations(teacher_x_SD, ffn.gate_FD, ffn.up_FD)
        contribution_SF = contributions(hidden_SF, ffn.down_DF)
        importance_F = contribution_SF.mean(dim=0)
    kept = importance_F.argsort(descending=True, stable=True)[: len(importance_F) // n_experts * n_experts]
    kept = kept.sort().values
    features_PC = neuron_features(options, ffn, contribution_SF)[kept]
    clustering = group(options, features_PC, n_experts, generator)
    assignment_F = torch.full((len(importance_F),), LEFT_OUT, dtype=torch.long, device=kept.device)
    assignment_F[kept] = clustering.assignment_P
    members_EG = kept[torch.argsort(clustering.assignment_P, stable=True)].view(n_experts, -1)
    weight_ED, intercept_E = _rows(options.router, ffn, members_EG, hidden_SF, student, generator)
    if hidden_SF is not None:
        mean_E = cluster_activation_means(hidden_SF, members_EG)
    targets = LayerTargets(
        assignment_F=assignment_F,
        centroids_EC=clustering.centroids_EC,
        activation_mean_E=mean_E,
        expert_prior_E=None if mean_E is None else expert_prior(mean_E, options.prior_temperature),
    )
    quality = judge(features_PC, clustering, generator)
    if student.x_SD is not None:
        chosen_SK = (student.x_SD @ weight_ED.T + intercept_E).topk(student.top_k, dim=1).indices
        load_E = torch.bincount(chosen_SK.flatten(), minlength=n_experts).float()
        load = (load_E / load_E.sum()).tolist()
        quality = replace(quality, load_variation=variation(load_E), expected_load=load)
    return RoutedLayer(weight_ED=weight_ED, intercept_E=intercept_E, targets=targets, quality=quality)


def _rows(
    kind: str,
    ffn: Ffn,
    members_EG: torch.Tensor,
    hidden_SF: torch.Tensor | None,
    student: StudentRouter,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [E, D] and intercepts [E] of logits that spread as those of the student's own router."""
    x_SD, old_ED = student.x_SD, student.weight_ED
    intercept_E = torch.zeros(len(old_ED), device=old_ED.device)
    if kind == "centroid":
        weight_ED = centroid_router(ffn.gate_FD, members_EG)
    elif kind == "random":
        weight_ED = random_router(len(old_ED), old_ED.shape[1], generator).to(old_ED.device)
    elif x_SD is None or hidden_SF is None:
        raise ValueError("a calibrated router needs calibration data")
    else:
        contribution_SE = expert_contributions(hidden_SF, ffn.down_DF, members_EG)
        weight_ED, intercept_E = CalibratedRouter(x_SD, student.has_bias).fit(
            contribution_SE.clamp(min=MIN_CONTRIBUTION).log()
        )
    if x_SD is None:
        scale = unit_spread(old_ED) / max(unit_spread(weight_ED), MIN_SPREAD)
    else:
        scale = logit_spread(x_SD @ old_ED.T) / max(logit_spread(x_SD @ weight_ED.T), MIN_SPREAD)
    return weight_ED * scale, intercept_E * scale
