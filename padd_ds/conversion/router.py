"""The first router of a student: where its rows come from, and how large its logits are.

Shapes: S tokens, D model width, E routed experts, F neurons of the teacher's FFN, G neurons of an expert.
"""

from dataclasses import dataclass

import torch

from padd_ds.conversion.quality import variation

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


def expert_contributions(hidden_SF: torch.Tensor, down_DF: torch.Tensor, members_EG: torch.Tensor) -> torch.Tensor:
    """[S, E]: length of what each routed expert adds to the residual stream, ||W_down[:, C_j] h_Cj||."""
    lengths = [(hidden_SF[:, members_G] @ down_DF[:, members_G].T).norm(dim=1) for members_G in members_EG]
    return torch.stack(lengths, dim=1)


def make_router(
    kind: str,
    gate_FD: torch.Tensor,
    members_EG: torch.Tensor,
    x_SD: torch.Tensor | None,
    target_SE: torch.Tensor | None,
    generator: torch.Generator,
) -> Router:
    """A router of `kind` with logits scaled to LOGIT_SPREAD on `x_SD` (on unit inputs without data).

    ValueError for `calibrated` without data.
    """
    if kind == "centroid":
        router = centroid_router(gate_FD, members_EG)
    elif kind == "random":
        router = random_router(len(members_EG), gate_FD.shape[1], generator)
    elif x_SD is None or target_SE is None:
        raise ValueError("a calibrated router needs calibration data")
    else:
        router = calibrated_router(x_SD, target_SE)
    return scaled(router, x_SD)


def scaled(router: Router, x_SD: torch.Tensor | None) -> Router:
    """Scale the rows so that the logits spread by LOGIT_SPREAD; the bias keeps its place in the order.

    A score is sigmoid(logit), about 1/2 + logit / 4, so a bias on the logits is four times that on scores.
    """
    weight_ED = router.weight_ED
    spread = _unit_spread(weight_ED) if x_SD is None else logit_spread(x_SD.float() @ weight_ED.to(x_SD.device).T)
    factor = LOGIT_SPREAD / max(spread, 1e-12)
    return Router(weight_ED=weight_ED * factor, bias_E=router.bias_E * factor / 4)


def logit_spread(logits_SE: torch.Tensor) -> float:
    """Standard deviation over experts, mean over tokens."""
    return float(logits_SE.std(dim=1, correction=0).mean())


def _unit_spread(weight_ED: torch.Tensor) -> float:
    # For inputs of unit variance in every channel, as a norm with unit weights gives.
    return float((weight_ED - weight_ED.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def load_variation(router: Router, x_SD: torch.Tensor, top_k: int) -> float:
    """Coefficient of variation over experts of the number of tokens that choose them; 0 when even."""
    scores_SE = torch.sigmoid(x_SD.float() @ router.weight_ED.to(x_SD.device).T) + router.bias_E.to(x_SD.device)
    chosen = scores_SE.topk(top_k, dim=1).indices
    return variation(torch.bincount(chosen.flatten(), minlength=scores_SE.shape[1]).float())
