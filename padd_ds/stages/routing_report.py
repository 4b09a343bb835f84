"""Load, entropy and spread of the routing during one step, over all ranks.

Legend: L layers, E experts, S tokens of a forward pass, K experts per token.
"""

from dataclasses import dataclass

import torch

from padd_ds.engine.ranks import sum_over_ranks
from padd_ds.engine.student import Student
from padd_ds.moe.load import (
    dead_experts,
    expert_counts,
    expert_value_sums,
    load_share,
    max_violation,
    router_entropy_sum,
)
from padd_ds.moe.router import RoutingRecord, score_spread
from padd_ds.moe.shift import router_distribution


@dataclass(frozen=True)
class RoutingReport:
    """Scalars for the metrics and lists per layer for the routing file."""

    scalars: dict[str, float]
    layers: dict[str, list]


@dataclass(frozen=True)
class RoutingTotals:
    """Sums over all ranks."""

    counts_LE: torch.Tensor
    value_sum_LE: torch.Tensor
    value_count_LE: torch.Tensor
    above_LE: torch.Tensor
    """Of the slots in value_count, those of tokens with a value above 0."""
    below_LE: torch.Tensor
    """The same below 0."""
    spread_L: torch.Tensor
    """Mean over real tokens of the layers' score spread."""


@dataclass
class RoutingStatistics:
    """Sums on this rank, filled by `add` after each forward pass."""

    student: Student
    counts_LE: torch.Tensor
    value_sum_LE: torch.Tensor
    value_count_LE: torch.Tensor
    above_LE: torch.Tensor
    below_LE: torch.Tensor
    entropy_sum_L: torch.Tensor
    spread_sum_L: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def start(cls, student: Student) -> "RoutingStatistics":
        shape, device = (len(student.layers), student.n_experts), student.ranks.device
        per_expert = [torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(5)]
        per_layer = [torch.zeros(shape[0], dtype=torch.float64, device=device) for _ in range(2)]
        parts = [*per_expert, *per_layer, torch.zeros((), dtype=torch.float64, device=device)]
        return cls(student, *parts)

    @torch.no_grad()
    def add(
        self,
        record: RoutingRecord,
        mask_BT: torch.Tensor,
        values_BT: torch.Tensor | None = None,
        value_mask_BT: torch.Tensor | None = None,
    ) -> None:
        """Count the real tokens (`mask_BT`), and the advantages of those in `value_mask_BT`."""
        mask_S, n_experts = mask_BT.flatten().bool(), self.student.n_experts
        for layer, router in enumerate(self.student.routers):
            selected_SK, scores_SE = record.selected_SK[layer], record.scores_SE[layer]
            self.counts_LE[layer] += expert_counts(selected_SK, mask_S, n_experts)
            distribution_SE = router_distribution(scores_SE, router.score_function)
            self.entropy_sum_L[layer] += router_entropy_sum(distribution_SE, mask_S)
            self.spread_sum_L[layer] += score_spread(scores_SE[mask_S]).double().sum()
            if values_BT is not None and value_mask_BT is not None:
                counted_S = value_mask_BT.flatten().bool()
                values_S = values_BT.flatten()
                self.value_sum_LE[layer] += expert_value_sums(selected_SK, values_S, counted_S, n_experts)
                self.value_count_LE[layer] += expert_counts(selected_SK, counted_S, n_experts)
                self.above_LE[layer] += expert_counts(selected_SK, counted_S & (values_S > 0), n_experts)
                self.below_LE[layer] += expert_counts(selected_SK, counted_S & (values_S < 0), n_experts)
        self.tokens += mask_S.sum()

    def totals(self) -> RoutingTotals:
        """The sums of all ranks; the same on each. Collective."""
        per_expert = [self.counts_LE, self.value_sum_LE, self.value_count_LE, self.above_LE, self.below_LE]
        counts_LE, value_sum_LE, value_count_LE, above_LE, below_LE = sum_over_ranks(torch.stack(per_expert))
        per_layer = sum_over_ranks(torch.cat([self.spread_sum_L, self.tokens[None]]))
        spread_L = per_layer[:-1] / per_layer[-1].clamp(min=1)
        return RoutingTotals(counts_LE, value_sum_LE, value_count_LE, above_LE, below_LE, spread_L)

    def report(self) -> RoutingReport:
        """Load violation, dead experts and entropy, as means over layers and per layer; nothing without MoE layers.

        Collective.
        """
        if not self.student.layers:
            return RoutingReport({}, {})
        totals = self.totals()
        entropy = sum_over_ranks(torch.cat([self.entropy_sum_L, self.tokens[None]]))
        entropy_L = entropy[:-1] / entropy[-1].clamp(min=1)
        violation_L, dead_L = max_violation(totals.counts_LE), dead_experts(totals.counts_LE)
        scalars = {
            "load_max_violation": float(violation_L.mean()),
            "load_dead_experts": float(dead_L.sum()),
            "router_entropy_nats": float(entropy_L.mean()),
        }
        layers = {
            "load_share": load_share(totals.counts_LE).tolist(),
            "max_violation": violation_L.tolist(),
            "dead_experts": dead_L.tolist(),
            "entropy_nats": entropy_L.tolist(),
            "score_spread": totals.spread_L.tolist(),
            "selection_bias": [r.e_score_correction_bias.tolist() for r in self.student.routers],
            "logit_bias": [r.logit_bias.tolist() for r in self.student.routers],
        }
        if totals.value_count_LE.sum() > 0:
            above_LE, below_LE = load_share(totals.above_LE), load_share(totals.below_LE)
            both_L = (totals.above_LE.sum(-1) > 0) & (totals.below_LE.sum(-1) > 0)
            distance_L = 0.5 * (above_LE - below_LE).abs().sum(-1) * both_L
            scalars["load_reward_distance"] = float(distance_L.mean())
            layers |= {"load_share_rewarded": above_LE.tolist(), "load_share_unrewarded": below_LE.tolist()}
        return RoutingReport(scalars, layers)
