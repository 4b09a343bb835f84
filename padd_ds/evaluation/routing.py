"""How a student routes worked solutions: load, specialisation by subject, and what changed since another checkpoint.

Shapes: B rows, T tokens of a row, S = B * T, L layers, E experts, K experts per token, C subjects.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from padd_ds.data.batches import supervised_batch
from padd_ds.errors import UserError
from padd_ds.hf import position_ids
from padd_ds.moe.labels import esi, nmi
from padd_ds.moe.load import choice_flips, dead_experts, expert_counts, load_share, max_violation, router_entropy_sum
from padd_ds.moe.shift import SHIFT_EDGES, mean_over_layers, router_distribution, router_shift, shift_counts

ROUTED_FAMILIES = {"glm4_moe": torch.sigmoid}
"""Model types whose `mlp.gate` returns (logits [S, E], weights, experts [S, K]), and their score function."""


@dataclass(frozen=True, kw_only=True)
class RoutingResult:
    """Over the real tokens of prompts and solutions; lists are per layer, scalars their means."""

    tokens: int
    nmi: float | None
    """Between chosen expert and subject; None without subjects."""
    esi_nats: float | None
    max_violation: float
    dead_experts: int
    """Summed over layers."""
    entropy_nats: float
    shift: float | None
    """Mean over tokens and layers of ||g - g_other||; None without another checkpoint."""
    flips: float | None
    """Share of the chosen experts that the other checkpoint does not choose."""
    shift_edges: list[float]
    shift_counts: list[int]
    """Tokens below the first edge, between two, above the last."""
    nmi_by_layer: list[float]
    max_violation_by_layer: list[float]
    load_share_by_layer: list[list[float]]


@dataclass(kw_only=True)
class _Sums:
    counts_LCE: torch.Tensor
    entropy_L: torch.Tensor
    shift_counts: torch.Tensor
    shift: float = 0.0
    flips: int = 0
    tokens: int = 0


@torch.inference_mode()
def measure_routing(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    solutions: Sequence[str],
    subjects: Sequence[str | None],
    other: Any = None,
    batch_size: int = 64,
) -> RoutingResult:
    """Run prompts with their solutions, the same text for every checkpoint, through `model` (and `other`).

    UserError: a model without routers that can be read, or two whose routers differ in shape.
    """
    routers, others = find_routers(model), find_routers(other) if other is not None else []
    if other is not None and [r.weight.shape for r in routers] != [r.weight.shape for r in others]:
        raise UserError("the two checkpoints differ in layers or experts, so their routing cannot be compared")
    score = ROUTED_FAMILIES[model.config.model_type]
    names = sorted({subject or "" for subject in subjects})
    n_experts, sums = len(routers[0].weight), None
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        batch = supervised_batch(prompts[rows], solutions[rows], tokenizer, model.config.max_position_embeddings)
        ids_BT, mask_BT = batch["input_ids_BT"].to(model.device), batch["attention_mask_BT"].to(model.device)
        labels_B = torch.tensor([names.index(subject or "") for subject in subjects[rows]], device=model.device)
        with _watching(routers) as seen, _watching(others) as seen_other:
            for one in (model, other):
                if one is not None:
                    one.model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_ids(mask_BT))
        sums = sums or _start(len(routers), len(names), n_experts, model.device)
        _add(sums, seen, seen_other, mask_BT.flatten().bool(), labels_B[:, None].expand_as(ids_BT).flatten(), score)
    if sums is None:
        raise UserError("no problem to measure the routing on")
    return _result(sums, labelled=len(names) > 1, compared=other is not None)


def find_routers(model: Any) -> list[Any]:
    """The routers in the order of the layers; UserError where there are none, or none that can be read."""
    routers = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
    if model.config.model_type not in ROUTED_FAMILIES or not routers:
        known = ", ".join(ROUTED_FAMILIES)
        raise UserError(f"the routing of a {model.config.model_type} cannot be measured; known: {known}")
    return routers


@contextmanager
def _watching(routers: list[Any]) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Logits [S, E] and chosen experts [S, K] by layer, of the last forward pass inside the block."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            logits_SE, _, chosen_SK = output
            seen[layer] = (logits_SE.float(), chosen_SK)

        return hook

    handles = [router.register_forward_hook(keep(layer)) for layer, router in enumerate(routers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _start(layers: int, subjects: int, experts: int, device: torch.device) -> _Sums:
    return _Sums(
        counts_LCE=torch.zeros(layers, subjects, experts, dtype=torch.int64, device=device),
        entropy_L=torch.zeros(layers, dtype=torch.float64, device=device),
        shift_counts=torch.zeros(len(SHIFT_EDGES) + 1, dtype=torch.int64, device=device),
    )


def _add(sums: _Sums, seen: Any, seen_other: Any, mask_S: torch.Tensor, label_S: torch.Tensor, score: Any) -> None:
    shifts = []
    for layer, (logits_SE, chosen_SK) in seen.items():
        distribution_SE = router_distribution(score(logits_SE), "sigmoid")
        sums.entropy_L[layer] += router_entropy_sum(distribution_SE, mask_S)
        for subject in range(sums.counts_LCE.shape[1]):
            of_subject_S = mask_S & (label_S == subject)
            sums.counts_LCE[layer, subject] += expert_counts(chosen_SK, of_subject_S, logits_SE.shape[1])
        if seen_other:
            other_SE, other_SK = seen_other[layer]
            shifts.append(router_shift(distribution_SE, router_distribution(score(other_SE), "sigmoid"), "absolute"))
            sums.flips += int(choice_flips(chosen_SK, other_SK, mask_S))
    if shifts:
        shift_S = mean_over_layers(shifts)
        sums.shift += float(shift_S[mask_S].double().sum())
        sums.shift_counts += shift_counts(shift_S, mask_S)
    sums.tokens += int(mask_S.sum())


def _result(sums: _Sums, *, labelled: bool, compared: bool) -> RoutingResult:
    counts_LE = sums.counts_LCE.sum(1)
    nmi_L = torch.stack([nmi(counts_CE) for counts_CE in sums.counts_LCE])
    esi_L = torch.stack([esi(counts_CE) for counts_CE in sums.counts_LCE])
    violation_L = max_violation(counts_LE)
    return RoutingResult(
        tokens=sums.tokens,
        nmi=float(nmi_L.mean()) if labelled else None,
        esi_nats=float(esi_L.mean()) if labelled else None,
        max_violation=float(violation_L.mean()),
        dead_experts=int(dead_experts(counts_LE).sum()),
        entropy_nats=float((sums.entropy_L / sums.tokens).mean()),
        shift=sums.shift / sums.tokens if compared else None,
        flips=sums.flips / int(counts_LE.sum()) if compared else None,
        shift_edges=SHIFT_EDGES if compared else [],
        shift_counts=sums.shift_counts.tolist() if compared else [],
        nmi_by_layer=nmi_L.tolist() if labelled else [],
        max_violation_by_layer=violation_L.tolist(),
        load_share_by_layer=load_share(counts_LE).tolist(),
    )
