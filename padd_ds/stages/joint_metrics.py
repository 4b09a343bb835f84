"""Metrics of a joint update, as sums over micro-batches.

Legend: B responses, R response tokens, S tokens of a layer, K experts per token.
"""

import torch

from padd_ds.losses.policy import PolicyTerms
from padd_ds.moe.load import choice_flips
from padd_ds.moe.router import RoutingRecord
from padd_ds.rollout.batch import RolloutBatch
from padd_ds.stages.stage import MetricSums

LAYER_MEANS = ("router_shift", "router_flips", "router_flips_rollout")
"""Told per layer, and as their mean among the metrics."""


def add_flips(
    sums: MetricSums, name: str, record: RoutingRecord, other: list[torch.Tensor], batch: RolloutBatch
) -> None:
    """How many of the chosen experts are not among those of `other`, one [S, K] per layer, over counted tokens.

    A token that `other` has not routed (negative) does not count.
    """
    if not other:
        return
    mask_S = batch.counted_mask_BL.flatten().bool() & (other[0][:, 0] >= 0)
    flips = [choice_flips(record.selected_SK[layer], other_SK, mask_S) for layer, other_SK in enumerate(other)]
    sums.add_layers(name, torch.stack(flips), mask_S.sum() * other[0].shape[1])


def add_rollout_mismatch(sums: MetricSums, old_logprobs_BR: torch.Tensor, batch: RolloutBatch) -> None:
    """How far training's own likelihoods of the responses are from those of the engine that drew them, where it told.

    ratio = old policy / rollout; the divergence is KL(rollout || old policy) by the estimate ratio - 1 - log ratio.
    """
    if batch.rollout_logprobs_BR is None:
        return
    # A response of the teacher's has none.
    mask_BR = batch.response_mask_BR.bool() & ~batch.rollout_logprobs_BR.isnan()
    log_ratio_BR = (old_logprobs_BR - batch.rollout_logprobs_BR).masked_fill(~mask_BR, 0.0)
    ratio_BR = log_ratio_BR.exp()
    sums.add("rollout_mismatch", (ratio_BR - 1).abs().sum(), mask_BR.sum())
    sums.add("kl_rollout_nats", (ratio_BR - 1 - log_ratio_BR).sum(), mask_BR.sum())
    sums.add_largest("rollout_ratio_max", ratio_BR.max())


def add_policy_metrics(sums: MetricSums, terms: PolicyTerms, n_policy: torch.Tensor) -> None:
    """`n_policy`: what the policy loss is a mean over."""
    sums.add("loss_policy", terms.loss_sum, n_policy)
    sums.add("ratio_deviation", terms.ratio_deviation_sum, terms.tokens)
    sums.add("ratio_penalised", terms.used_ratio_sum, terms.tokens)
    sums.add("shift_penalty", terms.penalty_sum, terms.tokens)
    sums.add("clip_fraction", terms.clipped_tokens, terms.tokens)
    sums.add("kl_old_nats", terms.kl_old_sum, terms.tokens)
