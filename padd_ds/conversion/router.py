"""The first router of a student: where its rows come from, and how large its logits are.

Shapes: S tokens, D model width, E routed experts, F neurons of the teacher's FFN, G neurons of an expert.
"""

import torch

from padd_ds.conversion.quality import variation

LOGIT_SPREAD = 0.2  # standard deviation over experts, mean over tokens; 0.1-0.3 keeps weights near equal
RIDGE = 1e-3  # of the mean square of an input channel
MIN_CONTRIBUTION, MIN_SPREAD = 1e-6, 1e-12


def centroid_router(gate_FD: torch.Tensor, members_EG: torch.Tensor) -> torch.Tensor:
    """[E, D]: the mean gate rows of the clusters, their centroids mu_j in weight space (PADD, Stage I)."""
    return torch.stack([gate_FD[members_G].float().mean(dim=0) for members_G in members_EG])


def random_router(n_experts: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """[E, D] drawn from a normal distribution: the control."""
    return torch.randn(n_experts, width, generator=generator)


def calibrated_router(x_SD: torch.Tensor, contribution_SE: torch.Tensor) -> torch.Tensor:
    """[E, D]: ridge regression from the FFN's input to the logarithm of each expert's contribution.

    Choice: the logarithm, centred over experts, because only the order within a token matters; no
    intercept, because the router has none and the selection bias is left to the load balancing.
    """
    x_SD = x_SD.double()
    target_SE = contribution_SE.double().clamp(min=MIN_CONTRIBUTION).log()
    target_SE = target_SE - target_SE.mean(dim=1, keepdim=True)
    moment_DD = x_SD.T @ x_SD
    moment_DD.diagonal().add_(RIDGE * moment_DD.diagonal().mean())
    return torch.linalg.solve(moment_DD, x_SD.T @ target_SE).T.float()


def expert_contributions(hidden_SF: torch.Tensor, down_DF: torch.Tensor, members_EG: torch.Tensor) -> torch.Tensor:
    """[S, E]: length of what each routed expert adds to the residual stream, ||W_down[:, C_j] h_Cj||."""
    lengths = [(hidden_SF[:, members_G] @ down_DF[:, members_G].T).norm(dim=1) for members_G in members_EG]
    return torch.stack(lengths, dim=1)


def make_router(
    kind: str,
    gate_FD: torch.Tensor,
    members_EG: torch.Tensor,
    x_SD: torch.Tensor | None,
    contribution_SE: torch.Tensor | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """[E, D] fp32 rows of `kind`, scaled so that the logits spread by LOGIT_SPREAD on `x_SD`.

    Without data the scale is that for inputs of unit variance. ValueError for `calibrated` without data.
    """
    if kind == "centroid":
        weight_ED = centroid_router(gate_FD, members_EG)
    elif kind == "random":
        weight_ED = random_router(len(members_EG), gate_FD.shape[1], generator).to(gate_FD.device)
    elif x_SD is None or contribution_SE is None:
        raise ValueError("a calibrated router needs calibration data")
    else:
        weight_ED = calibrated_router(x_SD, contribution_SE)
    spread = unit_spread(weight_ED) if x_SD is None else logit_spread(x_SD.float() @ weight_ED.T)
    return weight_ED * (LOGIT_SPREAD / max(spread, MIN_SPREAD))


def logit_spread(logits_SE: torch.Tensor) -> float:
    """Standard deviation over experts, mean over tokens."""
    return float(logits_SE.std(dim=1, correction=0).mean())


def unit_spread(weight_ED: torch.Tensor) -> float:
    """The logit spread to expect of inputs with independent channels of unit variance."""
    return float((weight_ED - weight_ED.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def load_variation(weight_ED: torch.Tensor, x_SD: torch.Tensor, top_k: int) -> float:
    """Coefficient of variation over experts of the number of tokens that choose them; 0 when even."""
    chosen_SK = (x_SD.float() @ weight_ED.T).topk(top_k, dim=1).indices
    return variation(torch.bincount(chosen_SK.flatten(), minlength=len(weight_ED)).float())
