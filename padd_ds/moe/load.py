"""What the experts of a layer were given to do.

Shapes: S flattened tokens, E experts, K experts per token; `..E` is any leading dimensions (layers, classes).
All counts leave out padding and are sums, to be added over ranks before anything is derived from them.
"""

import torch
from torch import Tensor


def expert_counts(selected_SK: Tensor, mask_S: Tensor, n_experts: int) -> Tensor:
    """How many routed slots of unmasked tokens each expert got, [E], int64."""
    mask_SK = mask_S.bool()[:, None].expand(selected_SK.shape)
    return _add_up(selected_SK, mask_SK.long(), mask_SK, n_experts)


def expert_value_sums(selected_SK: Tensor, values_S: Tensor, mask_S: Tensor, n_experts: int) -> Tensor:
    """Sum of the tokens' values (their advantages, say) over the slots that each expert got, [E]."""
    mask_SK = mask_S.bool()[:, None].expand(selected_SK.shape)
    values_S = values_S.to(torch.promote_types(values_S.dtype, torch.float32))
    values_SK = values_S[:, None].expand(selected_SK.shape).masked_fill(~mask_SK, 0.0)
    return _add_up(selected_SK, values_SK, mask_SK, n_experts)


def load_share(counts_E: Tensor) -> Tensor:
    """f, each expert's share of the routed slots, [..E]; sums to 1, or to 0 where nothing was routed."""
    return counts_E / counts_E.sum(-1, keepdim=True).clamp(min=1)


def max_violation(counts_E: Tensor) -> Tensor:
    """max_j f_j * E - 1, [..]: 0 is even, E / K - 1 is the ceiling; 0 where nothing was routed."""
    violation = load_share(counts_E).amax(-1) * counts_E.shape[-1] - 1
    return violation.masked_fill(counts_E.sum(-1) == 0, 0.0)


def dead_experts(counts_E: Tensor) -> Tensor:
    """How many experts got nothing, [..], int64; 0 where nothing was routed at all."""
    return (counts_E == 0).sum(-1).masked_fill(counts_E.sum(-1) == 0, 0)


def load_balance_sum(distribution_SE: Tensor, selected_SK: Tensor, mask_S: Tensor) -> Tensor:
    """E sum_j f_j sum_t g_tj over unmasked tokens, scalar (arXiv 2101.03961, eq. 4, times the tokens).

    Divided by the tokens it is 1 for an even load. Only g, the router's distribution, carries a gradient.
    """
    mask_S, n_experts = mask_S.bool(), distribution_SE.shape[-1]
    share_E = load_share(expert_counts(selected_SK, mask_S, n_experts).to(distribution_SE.dtype))
    return n_experts * (distribution_SE.masked_fill(~mask_S[:, None], 0.0).sum(0) * share_E).sum()


def choice_flips(selected_SK: Tensor, other_SK: Tensor, mask_S: Tensor) -> Tensor:
    """How many routed slots of unmasked tokens hold an expert that `other_SK` does not, scalar int64."""
    kept_SK = (selected_SK[:, :, None] == other_SK[:, None, :]).any(-1)
    return (~kept_SK & mask_S.bool()[:, None]).sum()


def router_entropy_sum(distribution_SE: Tensor, mask_S: Tensor) -> Tensor:
    """Sum over unmasked tokens of the entropy of the router's distribution, nats, scalar."""
    distribution_SE = distribution_SE.to(torch.promote_types(distribution_SE.dtype, torch.float32))
    kept_SE = distribution_SE.masked_fill(~mask_S.bool()[:, None], 0.0)
    return -torch.xlogy(kept_SE, kept_SE).sum()


def _add_up(selected_SK: Tensor, values_SK: Tensor, mask_SK: Tensor, n_experts: int) -> Tensor:
    # padding may hold any id: its values are 0 already, and its slots go to expert 0
    slots_SK = selected_SK.masked_fill(~mask_SK, 0)
    total_E = torch.zeros(n_experts, dtype=values_SK.dtype, device=values_SK.device)
    return total_E.index_add_(0, slots_SK.flatten(), values_SK.flatten())
