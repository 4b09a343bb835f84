"""How a mixture of experts routes worked solutions: what is counted, and its headline.

Shapes: N rows, B rows of a batch, T tokens of a row, S = B * T, L layers, E experts, K experts per token, C subjects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from padd_ds.data.batches import supervised_batch
from padd_ds.errors import UserError
from padd_ds.evaluation.clusters import TeacherClusters
from padd_ds.evaluation.routers import Routed, find_routers, score_function, scores, watching
from padd_ds.hf import position_ids
from padd_ds.moe.labels import esi, nmi
from padd_ds.moe.load import choice_flips, dead_experts, expert_counts, load_share, max_violation, router_entropy_sum
from padd_ds.moe.shift import SHIFT_EDGES, mean_over_layers, router_distribution, router_shift, shift_counts

SAMPLED_TOKENS = 256
"""Of all texts together, on which the experts' outputs are compared."""


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
    entropy_nats: float | None
    """Of the router's distribution; None where its scores are neither a softmax nor a sigmoid, as is the shift."""
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


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is routed: rows of prompt and solution, the same for every checkpoint."""

    prompts: Sequence[str]
    solutions: Sequence[str]
    subjects: Sequence[str | None]

    @property
    def names(self) -> list[str]:
        return sorted({subject or "" for subject in self.subjects})

    @property
    def labels_N(self) -> Tensor:
        """The place of every row's subject among `names`."""
        places = {name: place for place, name in enumerate(self.names)}
        return torch.tensor([places[subject or ""] for subject in self.subjects])


@dataclass(kw_only=True)
class RoutingCounts:
    """Sums over the real tokens of all rows."""

    chosen_NLE: Tensor
    """How many slots of each row's tokens each expert got, int64."""
    pairs_LEE: Tensor
    """How many tokens went to both experts; the diagonal: to the expert."""
    tokens: int = 0
    score: str | None = None
    """As `score_function` gives it."""
    entropy_L: Tensor
    inputs_LND: list[list[Tensor]]
    """What the experts were given of sampled tokens."""
    shift_L: Tensor
    shift_counts: Tensor
    """Of the mean over layers, as `moe.shift.shift_counts`."""
    flips_L: Tensor
    agreed_L: Tensor
    """Slots whose expert is among the teacher's most active clusters."""
    teachers_LE: Tensor
    """How many tokens have the cluster among the teacher's most active ones."""

    @property
    def counts_LE(self) -> Tensor:
        return self.chosen_NLE.sum(0)

    def counts_LCE(self, labels_N: Tensor, subjects: int) -> Tensor:
        """By subject."""
        counts_CLE = torch.zeros(subjects, *self.chosen_NLE.shape[1:], dtype=torch.int64)
        return counts_CLE.index_add_(0, labels_N, self.chosen_NLE).transpose(0, 1)


@torch.inference_mode()
def count_routing(
    model: Any,
    tokenizer: Any,
    text: Text,
    other: Any = None,
    clusters: TeacherClusters | None = None,
    batch_size: int = 64,
) -> RoutingCounts:
    """Run `text` through `model`, through the checkpoint `other`, and through the teacher of `clusters`.

    UserError: a model without routers that can be read, two whose routers differ in shape, no text.
    """
    routers, others = find_routers(model), find_routers(other) if other is not None else []
    if other is not None and [(r.layer, r.n_experts) for r in routers] != [(r.layer, r.n_experts) for r in others]:
        raise UserError("the two checkpoints differ in layers or experts, so their routing cannot be compared")
    if not text.prompts:
        raise UserError("no problem to measure the routing on")
    counts = _start(len(text.prompts), len(routers), routers[0].n_experts)
    per_batch = -(-SAMPLED_TOKENS // -(-len(text.prompts) // batch_size))
    for start in range(0, len(text.prompts), batch_size):
        rows = slice(start, start + batch_size)
        batch = supervised_batch(
            text.prompts[rows], text.solutions[rows], tokenizer, model.config.max_position_embeddings
        )
        ids_BT, mask_BT = batch["input_ids_BT"].to(model.device), batch["attention_mask_BT"].to(model.device)
        real_S = mask_BT.flatten().nonzero()[:, 0]
        sampled_N = real_S[torch.linspace(0, len(real_S) - 1, min(per_batch, len(real_S))).round().long()]
        with watching(routers, sampled_N) as seen, watching(others) as seen_other:
            for one in (model, other):
                if one is not None:
                    _forward(one, ids_BT, mask_BT)
        counts.score = counts.score or score_function(seen, routers[0].gate)
        _add(counts, rows, seen, mask_BT)
        if other is not None:
            _add_changes(counts, seen, seen_other, mask_BT.flatten().bool())
        if clusters is not None:
            with clusters.watching() as activity:
                _forward(clusters.teacher, ids_BT, mask_BT)
            _add_clusters(counts, seen, activity, mask_BT.flatten().bool())
    return counts


def measure_routing(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    solutions: Sequence[str],
    subjects: Sequence[str | None],
    other: Any = None,
    batch_size: int = 64,
) -> RoutingResult:
    """The headline of the routing of prompts with their solutions. UserError as `count_routing`."""
    text = Text(prompts=prompts, solutions=solutions, subjects=subjects)
    return headline(count_routing(model, tokenizer, text, other, batch_size=batch_size), text, other is not None)


def headline(counts: RoutingCounts, text: Text, compared: bool) -> RoutingResult:
    """What a result is quoted by."""
    counts_LE, labelled = counts.counts_LE, len(text.names) > 1
    counts_LCE = counts.counts_LCE(text.labels_N, len(text.names))
    violation_L, nmi_L = max_violation(counts_LE), nmi(counts_LCE)
    scored = counts.score is not None
    return RoutingResult(
        tokens=counts.tokens,
        nmi=float(nmi_L.mean()) if labelled else None,
        esi_nats=float(esi(counts_LCE).mean()) if labelled else None,
        max_violation=float(violation_L.mean()),
        dead_experts=int(dead_experts(counts_LE).sum()),
        entropy_nats=float((counts.entropy_L / counts.tokens).mean()) if scored else None,
        shift=float((counts.shift_L / counts.tokens).mean()) if compared and scored else None,
        flips=int(counts.flips_L.sum()) / int(counts_LE.sum()) if compared else None,
        shift_edges=SHIFT_EDGES if compared and scored else [],
        shift_counts=counts.shift_counts.tolist() if compared and scored else [],
        nmi_by_layer=nmi_L.tolist() if labelled else [],
        max_violation_by_layer=violation_L.tolist(),
        load_share_by_layer=load_share(counts_LE).tolist(),
    )


def _forward(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> None:
    model.base_model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_ids(mask_BT), use_cache=False)


def _start(rows: int, layers: int, experts: int) -> RoutingCounts:
    def whole(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int64)

    return RoutingCounts(
        chosen_NLE=whole(rows, layers, experts),
        pairs_LEE=whole(layers, experts, experts),
        entropy_L=torch.zeros(layers, dtype=torch.float64),
        inputs_LND=[[] for _ in range(layers)],
        shift_L=torch.zeros(layers, dtype=torch.float64),
        shift_counts=whole(len(SHIFT_EDGES) + 1),
        flips_L=whole(layers),
        agreed_L=whole(layers),
        teachers_LE=whole(layers, experts),
    )


def _add(counts: RoutingCounts, rows: slice, seen: Sequence[Routed], mask_BT: Tensor) -> None:
    n_experts, mask_S = counts.pairs_LEE.shape[-1], mask_BT.flatten().bool()
    for layer, routed in enumerate(seen):
        taken_SE = torch.zeros(len(mask_S), n_experts, device=mask_S.device).scatter_(1, routed.chosen_SK.long(), 1.0)
        taken_SE[~mask_S] = 0
        counts.chosen_NLE[rows, layer] = taken_SE.view(len(mask_BT), -1, n_experts).sum(1).long().cpu()
        counts.pairs_LEE[layer] += (taken_SE.T @ taken_SE).long().cpu()
        counts.inputs_LND[layer].append(routed.inputs_ND)
        if counts.score is not None:
            counts.entropy_L[layer] += float(router_entropy_sum(_distribution(routed, counts.score), mask_S))
    counts.tokens += int(mask_S.sum())


def _add_changes(counts: RoutingCounts, seen: Sequence[Routed], others: Sequence[Routed], mask_S: Tensor) -> None:
    """How far `seen` is from `others`."""
    shifts = []
    for layer, (routed, before) in enumerate(zip(seen, others, strict=True)):
        counts.flips_L[layer] += int(choice_flips(routed.chosen_SK, before.chosen_SK, mask_S))
        if counts.score is not None:
            new_SE, old_SE = _distribution(routed, counts.score), _distribution(before, counts.score)
            shifts.append(router_shift(new_SE, old_SE, "absolute"))
            counts.shift_L[layer] += float(shifts[-1][mask_S].double().sum())
    if shifts:
        counts.shift_counts += shift_counts(mean_over_layers(shifts), mask_S).cpu()


def _add_clusters(counts: RoutingCounts, seen: Sequence[Routed], activity: dict[int, Tensor], mask_S: Tensor) -> None:
    """How many choices are among the teacher's most active clusters."""
    for layer, routed in enumerate(seen):
        top_SK = activity[layer].topk(routed.chosen_SK.shape[1], dim=-1).indices
        slots = int(mask_S.sum()) * top_SK.shape[1]
        counts.agreed_L[layer] += slots - int(choice_flips(routed.chosen_SK, top_SK, mask_S))
        counts.teachers_LE[layer] += expert_counts(top_SK, mask_S, counts.teachers_LE.shape[1]).cpu()


def _distribution(routed: Routed, score: str) -> Tensor:
    return router_distribution(scores(routed.logits_SE, score), score)
