"""The first router of a student: where its rows and selection bias come from, and how large its logits are.

Shapes: S tokens, D model width, E routed experts, K of them per token, F neurons of the teacher's FFN, G of an expert.
"""

from dataclasses import dataclass

import torch

from padd_ds.moe.router import routing_weights

LOGIT_SPREAD = 0.1  # standard deviation over experts, mean over tokens; 0.1-0.3 keeps weights near equal
RIDGE = 3.0  # of the mean square of an input channel: what few channels say strongly should not decide alone
ASCENT_STEPS, ASCENT_RATE, SOFTNESS = 20, 0.1, 0.5
MIN_CONTRIBUTION, MIN_SPREAD = 1e-6, 1e-12
EVEN_STEPS, EVEN_RATE = 300, 0.1
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

    def ascend(
        self, weight_ED: torch.Tensor, intercept_E: torch.Tensor, gain_SE: torch.Tensor, top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and intercepts whose `top_k` choices collect more of `gain_SE` than those given.

        Gradient ascent on sum_te gain_te sigmoid((logit_te - threshold_t) / softness), a smooth top-k with the
        threshold between the k-th and the next logit; each gradient is fitted by the same ridge regression as the
        targets were, which preconditions it. Choice: a fixed number of steps of falling length.
        """
        x_SD = (self._x_SD + self._mean_D).float()
        for step in range(ASCENT_STEPS):
            logits_SE = x_SD @ weight_ED.T + intercept_E
            spread = logit_spread(logits_SE)
            border_S1 = logits_SE.topk(top_k + 1, dim=1).values[:, -2:].mean(dim=1, keepdim=True)
            chosen_SE = torch.sigmoid((logits_SE - border_S1) / max(SOFTNESS * spread, MIN_SPREAD))
            slope_SE = chosen_SE * (1 - chosen_SE)
            # The threshold moves with the logits, so only a gain above the mean at the border counts.
            mean_S1 = (gain_SE * slope_SE).sum(1, keepdim=True) / slope_SE.sum(1, keepdim=True).clamp(min=1e-9)
            step_ED, step_E = self.fit(slope_SE * (gain_SE - mean_S1))
            length = max(logit_spread(x_SD @ step_ED.T + step_E), MIN_SPREAD)
            rate = ASCENT_RATE * (1 - step / ASCENT_STEPS) * spread / length
            weight_ED, intercept_E = weight_ED + rate * step_ED, intercept_E + rate * step_E
        return weight_ED, intercept_E


def expert_contributions(hidden_SF: torch.Tensor, down_DF: torch.Tensor, members_EG: torch.Tensor) -> torch.Tensor:
    """[S, E]: length of what each routed expert adds to the residual stream, ||W_down[:, C_j] h_Cj||."""
    # From the Gram matrix of an expert's columns, which is far smaller than its output.
    squares = []
    for members_G in members_EG:
        down_DG, hidden_SG = down_DF[:, members_G], hidden_SF[:, members_G]
        squares.append((hidden_SG @ (down_DG.T @ down_DG) * hidden_SG).sum(dim=1))
    return torch.stack(squares, dim=1).clamp(min=0).sqrt()


@dataclass(frozen=True, kw_only=True)
class RouterData:
    """What a router is fitted to: inputs, length of each expert's output, and what choosing it is worth."""

    x_SD: torch.Tensor
    contribution_SE: torch.Tensor
    gain_SE: torch.Tensor
    top_k: int


def make_router(
    kind: str, gate_FD: torch.Tensor, members_EG: torch.Tensor, data: RouterData | None, generator: torch.Generator
) -> Router:
    """A router of `kind`, scaled so that its logits spread by LOGIT_SPREAD on the data.

    Without data the scale is that for inputs of unit variance. ValueError for `calibrated` without data.
    """
    intercept_E = torch.zeros(len(members_EG), device=gate_FD.device)
    if kind == "centroid":
        weight_ED = centroid_router(gate_FD, members_EG)
    elif kind == "random":
        weight_ED = random_router(len(members_EG), gate_FD.shape[1], generator).to(gate_FD.device)
    elif data is None:
        raise ValueError("a calibrated router needs calibration data")
    else:
        regression = CalibratedRouter(data.x_SD)
        weight_ED, intercept_E = regression.fit(data.contribution_SE.clamp(min=MIN_CONTRIBUTION).log())
        if data.top_k < len(members_EG):
            weight_ED, intercept_E = regression.ascend(weight_ED, intercept_E, data.gain_SE, data.top_k)
    spread = unit_spread(weight_ED) if data is None else logit_spread(data.x_SD.float() @ weight_ED.T)
    scale = LOGIT_SPREAD / max(spread, MIN_SPREAD)
    return Router(weight_ED=weight_ED * scale, bias_E=intercept_E * scale * SIGMOID_SLOPE)


def even_load(router: Router, x_SD: torch.Tensor, top_k: int) -> Router:
    """The router with the selection bias under which every expert gets about the same share of the data's slots.

    Steps of EVEN_RATE spreads of the scores, falling to 0, against each expert's excess load (as arXiv 2408.15664 does
    in training); the bias of the smallest excess is kept, the router's own among them.
    """
    scores_SE = torch.sigmoid(x_SD.float() @ router.weight_ED.T)
    spread, bias_E = logit_spread(scores_SE), router.bias_E
    best, least = bias_E, float("inf")
    for step in range(EVEN_STEPS):
        chosen_SK = (scores_SE + bias_E).topk(top_k, dim=1).indices
        excess_E = torch.bincount(chosen_SK.flatten(), minlength=len(bias_E)) * len(bias_E) / chosen_SK.numel() - 1
        if float(excess_E.max()) < least:
            best, least = bias_E, float(excess_E.max())
        bias_E = bias_E - EVEN_RATE * (1 - step / EVEN_STEPS) * spread * excess_E
    return Router(weight_ED=router.weight_ED, bias_E=best)


def logit_spread(logits_SE: torch.Tensor) -> float:
    """Standard deviation over experts, mean over tokens."""
    return float(logits_SE.std(dim=1, correction=0).mean())


def unit_spread(weight_ED: torch.Tensor) -> float:
    """The logit spread to expect of inputs with independent channels of unit variance."""
    return float((weight_ED - weight_ED.mean(dim=0)).square().sum(dim=1).mean().sqrt())
