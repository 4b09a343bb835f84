"""The PADD router: top-k routing that a run can steer and observe.

Legend: S tokens, D model width, E routed experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from padd_ds.seeds import derive_seed

RoutingMode = Literal["routed", "sample", "dense"]


@dataclass
class RoutingRecord:
    """What the routers of one forward pass did, by layer; later passes overwrite earlier ones.

    Overwriting, not appending, keeps the record right when activation checkpointing runs a layer twice.
    """

    scores_SE: dict[int, torch.Tensor] = field(default_factory=dict)
    """fp32 router scores without noise and selection bias; a logit bias is part of them. Detached, unless the control
    keeps their graph."""
    selected_SK: dict[int, torch.Tensor] = field(default_factory=dict)
    """Chosen experts."""
    activity_E: dict[int, torch.Tensor] = field(default_factory=dict)
    """Mean activity of every expert on the control's sample of tokens, with a gradient to this rank's experts."""


@dataclass
class RoutingControl:
    """How all routers of one model behave now; one instance is shared by its layers."""

    mode: RoutingMode = "routed"
    """`routed`: the K best scores. `sample`: K distinct experts drawn uniformly, equal weights. `dense`: all."""
    noise: float = 0.0
    """Standard deviation of normal noise on the selection, in spreads of the token's scores."""
    seed: int = 0
    """Draws and noise follow from it and the layer alone, so that activation checkpointing repeats them."""
    record: RoutingRecord | None = None
    """Where to report; None keeps nothing."""
    keep_graph: bool = False
    """Whether recorded scores carry gradients to the router."""
    sample_S: torch.Tensor | None = None
    """Tokens on which layers measure the activity of all experts for the record; None: they do not. It has to stand
    as long as the pass may be run again, by activation checkpointing."""
    replay: dict[int, torch.Tensor] | None = None
    """[S, K] experts by layer that `routed` takes instead of its own choice, which stays where they are below 0;
    weights are still the scores' own."""
    trace: list[dict[int, torch.Tensor]] | None = None
    """Where every forward pass adds the chosen experts [S, K] by layer; None keeps nothing."""


def score_spread(scores_SE: torch.Tensor) -> torch.Tensor:
    """[S]: standard deviation over experts (the unit of noise; its mean over tokens is that of the bias)."""
    return scores_SE.float().std(dim=-1, unbiased=False)


def routing_weights(
    scores_SE: torch.Tensor, selected_SK: torch.Tensor, *, normalise: bool, scale: float
) -> torch.Tensor:
    """[S, K] mixture weights: the chosen scores, divided by their sum if `normalise`, times `scale`."""
    weights_SK = scores_SE.gather(1, selected_SK)
    if normalise:
        weights_SK = weights_SK / (weights_SK.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_SK * scale


SCORE_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits_SE: torch.softmax(logits_SE, dim=-1),
}


class PaddRouter(nn.Module):
    """Takes the place of an expert-parallel layer's router and keeps its interface.

    Scores are computed in fp32 from the layer's input, as the Hugging Face class does, whatever the
    model's precision. `e_score_correction_bias` [E] enters the selection only and stands in the
    checkpoint format; `logit_bias` [E] is added to the logits (the paper's form) and does not.
    """

    e_score_correction_bias: torch.Tensor
    logit_bias: torch.Tensor

    def __init__(
        self,
        gate: nn.Linear,
        selection_bias_E: torch.Tensor,
        *,
        layer: int,
        top_k: int,
        score_function: str,
        normalise: bool,
        scale: float,
        control: RoutingControl,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.register_buffer("e_score_correction_bias", selection_bias_E.detach().float().clone())
        self.register_buffer("logit_bias", torch.zeros_like(self.e_score_correction_bias))
        self.layer = layer
        self.top_k = top_k
        self.score_function = score_function
        self.normalise = normalise
        self.scale = scale
        self.control = control

    @property
    def num_experts(self) -> int:
        return self.gate.out_features

    def forward(
        self, x_SD: torch.Tensor, expert_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights [S, K], experts [S, K], tokens per expert [E] (int32). `expert_bias` must be None."""
        if expert_bias is not None:
            raise ValueError("the PADD router keeps its own bias; do not set load_balance_coeff")
        logits_SE = F.linear(x_SD.float(), self.gate.weight.float()) + self.logit_bias
        scores_SE = SCORE_FUNCTIONS[self.score_function](logits_SE)
        selected_SK = self._select(scores_SE.detach())
        weights_SK = self._weights(scores_SE, selected_SK)
        self._report(scores_SE, selected_SK)
        counts_E = torch.bincount(selected_SK.flatten(), minlength=self.num_experts).to(torch.int32)
        return weights_SK, selected_SK, counts_E

    def _select(self, scores_SE: torch.Tensor) -> torch.Tensor:
        control = self.control
        if control.mode == "dense":
            return torch.arange(self.num_experts, device=scores_SE.device).expand_as(scores_SE).contiguous()
        device = scores_SE.device
        generator = torch.Generator(device).manual_seed(derive_seed(control.seed, self.layer))
        if control.mode == "sample":
            draws_SE = torch.rand(scores_SE.shape, generator=generator, device=device)
            return draws_SE.topk(self.top_k, dim=-1).indices
        choice_SE = scores_SE + self.e_score_correction_bias
        if control.noise > 0:
            noise_SE = torch.randn(scores_SE.shape, generator=generator, device=device)
            choice_SE = choice_SE + control.noise * score_spread(scores_SE)[:, None] * noise_SE
        selected_SK = choice_SE.topk(self.top_k, dim=-1, sorted=False).indices
        if control.replay is None:
            return selected_SK
        replayed_SK = control.replay[self.layer]
        return torch.where(replayed_SK < 0, selected_SK, replayed_SK)

    def _weights(self, scores_SE: torch.Tensor, selected_SK: torch.Tensor) -> torch.Tensor:
        if self.control.mode == "routed":
            return routing_weights(scores_SE, selected_SK, normalise=self.normalise, scale=self.scale)
        chosen = selected_SK.shape[1]
        # Experts that were cut from one FFN add up with weight 1 each (scale == top_k); others average.
        total = chosen if self.scale == self.top_k else self.scale
        return torch.full(selected_SK.shape, total / chosen, device=scores_SE.device, dtype=scores_SE.dtype)

    def _report(self, scores_SE: torch.Tensor, selected_SK: torch.Tensor) -> None:
        if self.control.trace is not None:
            if self.layer == 0:
                self.control.trace.append({})
            self.control.trace[-1][self.layer] = selected_SK
        record = self.control.record
        if record is None:
            return
        record.scores_SE[self.layer] = scores_SE if self.control.keep_graph else scores_SE.detach()
        record.selected_SK[self.layer] = selected_SK
