"""The first router of a student: where its rows and selection bias come from, and how large its logits are.

Shapes: S tokens, D model width, E routed experts, K of them per token, F neurons of the teacher's FFN, G of an expert.
"""

from dataclasses import dataclass

import torch

from padd_ds.moe.router import routing_weights

LOGIT_SPREAD = 0.2  # standard deviation over experts, mean over tokens; 0.1-0.3 keeps weights near equal
RIDGE = 1e-3  # of the mean square of an input channel
MIN_CONTRIBUTION, MIN_SPREAD = 1e-6, 1e-12
SIGMOID_SLOPE = 0.25  # at 0, where the logits of a new student are


@dataclass(frozen=True, kw_only=True)
class Router:
    """`weight_ED` gives the logits; `bias_E` is added to their sigmoids, for the selection alone."""

    weight_ED: torch.Tensor
    bias_E: torch.Tensor

    def weights(self, x_SD: torch.Tensor, top_k: int) -> torch.Tensor:
        """[S, E]: what each expert's output is multiplied with, 0 for those not chosen; sums to `top_k`."""
        scores_SE = torch.sigmoid(x_SD.float() @ self.weight_ED.T)
        chosen_SK = (scores_SE + self.bias_E).topk(top_k, dim=1).indices
        weights_SK = routing_weights(scores_SE, chosen_SK, normalise=True, scale=float(top_k))
        return torch.zeros_like(scores_SE).scatter(1, chosen_SK, weights_SK)


def centroid_router(gate_FD: torch.Tensor, members_EG: torch.Tensor) -> torch.Tensor:
    """[E, D]: the mean gate rows of the clusters, their centroids mu_j in weight space (PADD, Stage I)."""
    return torch.stack([gate_FD[members_G].float().mean(dim=0) for members_G in members_EG])


def random_router(n_experts: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """[E, D] drawn from a normal distribution: the control."""
    return torch.randn(n_experts, width, generator=generator)


class CalibratedRouter:
    """Ridge regression from the FFN's input to what each expert contributes.

    Choice: targets are centred over the experts of a token, because only their order matters. With `intercept`
    the regression has one, which a router expresses as selection bias; without, the mean input has to serve.
    """

    def __init__(self, x_SD: torch.Tensor, intercept: bool = True) -> None:
        x_SD = x_SD.double()
        self._mean_D = x_SD.mean(dim=0) if intercept else torch.zeros_like(x_SD[0])
        self._intercept = intercept
        self._x_SD = x_SD - self._mean_D
        moment_DD = self._x_SD.T @ self._x_SD
        moment_DD.diagonal().add_(RIDGE * moment_DD.diagonal().mean())
        self._factor_DD = torch.linalg.cholesky(moment_DD)

    def fit(self, target_SE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [E, D] and intercepts [E] in fp32 that predict the centred `target_SE`."""
        target_SE = target_SE.double()
        target_SE = target_SE - target_SE.mean(dim=1, keepdim=True)
        mean_E = target_SE.mean(dim=0) if self._intercept else torch.zeros_like(target_SE[0])
        weight_DE = torch.cholesky_solve(self._x_SD.T @ (target_SE - mean_E), self._factor_DD)
        return weight_DE.T.float(), (mean_E - self._mean_D @ weight_DE).float()


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
) -> Router:
    """A router of `kind`, scaled so that its logits spread by LOGIT_SPREAD on `x_SD`.

    Without data the scale is that for inputs of unit variance. ValueError for `calibrated` without data.
    """
    intercept_E = torch.zeros(len(members_EG), device=gate_FD.device)
    if kind == "centroid":
        weight_ED = centroid_router(gate_FD, members_EG)
    elif kind == "random":
        weight_ED = random_router(len(members_EG), gate_FD.shape[1], generator).to(gate_FD.device)
    elif x_SD is None or contribution_SE is None:
        raise ValueError("a calibrated router needs calibration data")
    else:
        target_SE = contribution_SE.clamp(min=MIN_CONTRIBUTION).log()
        weight_ED, intercept_E = CalibratedRouter(x_SD).fit(target_SE)
    spread = unit_spread(weight_ED) if x_SD is None else logit_spread(x_SD.float() @ weight_ED.T)
    scale = LOGIT_SPREAD / max(spread, MIN_SPREAD)
    return Router(weight_ED=weight_ED * scale, bias_E=intercept_E * scale * SIGMOID_SLOPE)


def logit_spread(logits_SE: torch.Tensor) -> float:
    """Standard deviation over experts, mean over tokens."""
    return float(logits_SE.std(dim=1, correction=0).mean())


def unit_spread(weight_ED: torch.Tensor) -> float:
    """The logit spread to expect of inputs with independent channels of unit variance."""
    return float((weight_ED - weight_ED.mean(dim=0)).square().sum(dim=1).mean().sqrt())
