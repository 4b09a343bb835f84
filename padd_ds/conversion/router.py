"""The first router of a student: where its rows come from, and how large its logits are.

Shapes: S tokens, D model width, E routed experts, F neurons of the teacher's FFN, G neurons of an expert.
"""

from dataclasses import dataclass

import torch

LOGIT_SPREAD = 0.2  # standard deviation over experts, mean over tokens; 0.1-0.3 keeps weights near equal
RIDGE = 1e-3  # of the mean variance of an input channel


@dataclass(frozen=True, kw_only=True)
class Router:
    """A sigmoid router with a selection bias: `weight_ED`, `bias_E`, both fp32."""

    weight_ED: torch.Tensor
    bias_E: torch.Tensor


def centroid_router(w_gate_FD: torch.Tensor, members_EG: torch.Tensor) -> Router:
    """Rows are the mean gate rows of the clusters: the centroids mu_j in weight space (PADD, Stage I)."""
    weight_ED = torch.stack([w_gate_FD[members_G].float().mean(dim=0) for members_G in members_EG])
    return Router(weight_ED=weight_ED, bias_E=weight_ED.new_zeros(len(weight_ED)))


def random_router(n_experts: int, width: int, generator: torch.Generator) -> Router:
    """Rows drawn from a normal distribution: the control."""
    weight_ED = torch.randn(n_experts, width, generator=generator)
    return Router(weight_ED=weight_ED, bias_E=torch.zeros(n_experts))


def calibrated_router(x_SD: torch.Tensor, target_SE: torch.Tensor) -> Router:
    """Ridge regression from the FFN's input to each expert's contribution `target_SE`.

    Choice: the target is centred over experts, since only its order within a token matters. The
    intercept goes to the selection bias, which does not touch the mixture weights.
    """
    x_SD = x_SD.double()
    target_SE = target_SE.double()
    target_SE = target_SE - target_SE.mean(dim=1, keepdim=True)
    x_mean_D, target_mean_E = x_SD.mean(0), target_SE.mean(0)
    centred_SD = x_SD - x_mean_D
    covariance_DD = centred_SD.T @ centred_SD / len(x_SD)
    covariance_DD.diagonal().add_(RIDGE * covariance_DD.diagonal().mean())
    cross_DE = centred_SD.T @ (target_SE - target_mean_E) / len(x_SD)
    weight_ED = torch.linalg.solve(covariance_DD, cross_DE).T
    return Router(weight_ED=weight_ED.float(), bias_E=(target_mean_E - weight_ED @ x_mean_D).float())
