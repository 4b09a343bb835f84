"""The routers of any mixture of experts that transformers loads, and what they do in a forward pass.

Shapes: S flattened tokens, D model width, E experts, K experts per token, N sampled tokens.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from padd_ds.errors import UserError

_NAMES = ("gate", "router")
_SCORES = {"softmax": lambda logits_SE: logits_SE.softmax(-1), "sigmoid": torch.sigmoid}
_PROPORTIONAL = 0.05
"""Largest range of log(weight / score) within a token, median over tokens; rounding to bf16 leaves 0.01."""


@dataclass(frozen=True, kw_only=True)
class Router:
    """One layer's router and the experts that it chooses from."""

    layer: int
    gate: Any
    experts: Any
    n_experts: int


@dataclass(kw_only=True)
class Routed:
    """What one layer did with the tokens of a forward pass."""

    logits_SE: Tensor
    chosen_SK: Tensor
    weights_SK: Tensor
    inputs_ND: Tensor
    """What the experts were given of the sampled tokens."""


def find_routers(model: Any) -> list[Router]:
    """The routers in the order of the layers. UserError where there are none, or layers differ in their experts.

    A router is the module `gate` or `router` beside a module `experts`, as in all classes of transformers 5 whose
    experts are given their inputs, the chosen experts and their weights.
    """
    routers: list[Router] = []
    for name, module in model.named_modules():
        parts = dict(module.named_children())
        gate = next((parts[key] for key in _NAMES if key in parts), None)
        n_experts = getattr(parts.get("experts"), "num_experts", None)
        if gate is not None and n_experts:
            layer = int((re.findall(r"\d+", name) or [len(routers)])[0])
            routers.append(Router(layer=layer, gate=gate, experts=parts["experts"], n_experts=n_experts))
    family = model.config.model_type
    if not routers:
        raise UserError(f"the routing of a {family} cannot be measured: there is no router beside its experts")
    if len({router.n_experts for router in routers}) > 1:
        raise UserError(f"the routing of this {family} cannot be measured: its layers differ in their experts")
    return routers


@contextmanager
def watching(routers: Sequence[Router], sampled_N: Tensor | None = None) -> Iterator[list[Routed]]:
    """The list holds what each layer did in the one forward pass that is made inside the block, when that ends.

    `sampled_N`: flattened positions whose inputs are kept. UserError where the choices cannot be read.
    """
    seen: list[Routed] = []
    logits: dict[int, Tensor] = {}
    given: dict[int, tuple[Any, ...]] = {}

    def keep_logits(place: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            logits[place] = _logits_of(output, routers[place].n_experts)

        return hook

    def keep_choice(place: int) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            given[place] = _sampled(inputs, sampled_N)

        return hook

    handles = [router.gate.register_forward_hook(keep_logits(place)) for place, router in enumerate(routers)]
    handles += [router.experts.register_forward_pre_hook(keep_choice(place)) for place, router in enumerate(routers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    for place in range(len(routers)):
        inputs_ND, chosen_SK, weights_SK = given[place]
        seen.append(Routed(logits_SE=logits[place], chosen_SK=chosen_SK, weights_SK=weights_SK, inputs_ND=inputs_ND))


def score_function(routed: Sequence[Routed], gate: Any) -> str | None:
    """`softmax` or `sigmoid`: whose scores the weights of the chosen experts are proportional to; None for neither.

    Choice: where both or neither can be told from one expert per token, `sigmoid` for a router with a selection bias,
    as in DeepSeek-V3 and its like, else `softmax`.
    """
    if routed[0].chosen_SK.shape[1] == 1:
        return "sigmoid" if hasattr(gate, "e_score_correction_bias") else "softmax"
    spread = {name: max(_spread(layer, score) for layer in routed) for name, score in _SCORES.items()}
    name = min(spread, key=lambda name: spread[name])
    return name if spread[name] <= _PROPORTIONAL else None


def scores(logits_SE: Tensor, name: str) -> Tensor:
    """The router's scores, [S, E]; `name` as `score_function` gives it."""
    return _SCORES[name](logits_SE)


def output_similarity(router: Router, inputs_ND: Tensor) -> Tensor:
    """Cosine of two experts' outputs for the same token, mean over tokens, [E, E]."""
    total_EE = torch.zeros(router.n_experts, router.n_experts, dtype=torch.float64)
    for chunk_ND in inputs_ND.split(32):
        outputs_END = torch.stack([_alone(router, expert, chunk_ND) for expert in range(router.n_experts)])
        direction_END = torch.nn.functional.normalize(outputs_END.float(), dim=-1)
        total_EE += torch.einsum("end,fnd->ef", direction_END, direction_END).double().cpu()
    return total_EE / len(inputs_ND)


def _alone(router: Router, expert: int, inputs_ND: Tensor) -> Tensor:
    chosen_N1 = torch.full((len(inputs_ND), 1), expert, device=inputs_ND.device)
    return router.experts(inputs_ND, chosen_N1, inputs_ND.new_ones(len(inputs_ND), 1))


def _logits_of(output: Any, n_experts: int) -> Tensor:
    """The logits of a router that gives them alone, or before or behind its weights and choices."""
    parts = output if isinstance(output, tuple) else (output,)
    # With all experts active the weights have the logits' shape; the logits stand at the other end of the choices.
    found = parts[0] if parts[0].is_floating_point() else parts[-1]
    if found.shape[-1] != n_experts:
        raise UserError("the routing of this model cannot be measured: its router gives no logits")
    return found.reshape(-1, n_experts).float()


def _sampled(inputs: tuple[Any, ...], sampled_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if len(inputs) < 3 or not isinstance(inputs[1], Tensor) or inputs[1].is_floating_point():
        raise UserError("the routing of this model cannot be measured: its experts are not given who was chosen")
    states_SD, chosen_SK, weights_SK = inputs[:3]
    kept = states_SD[:0] if sampled_N is None else states_SD[sampled_N]
    return kept, chosen_SK, weights_SK


def _spread(routed: Routed, score: Any) -> float:
    """How far the weights are from a multiple of the scores: range of log(weight / score), median over tokens."""
    scores_SK = score(routed.logits_SE).gather(-1, routed.chosen_SK)
    tiny = torch.finfo(torch.float32).tiny
    difference_SK = routed.weights_SK.float().clamp(min=tiny).log() - scores_SK.clamp(min=tiny).log()
    return float((difference_SK.amax(-1) - difference_SK.amin(-1)).median())
