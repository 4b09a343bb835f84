"""Tokens on their way to experts of other ranks: each goes once to every rank that has some of its experts.

AutoEP sends a token once for each of its experts. Here experts that share a rank share the token, and their weighted
outputs come back as one sum: with K = 8 experts of a token on two ranks a quarter of the bytes.

Legend: S tokens of this rank, D model width, E routed experts, R ranks of the expert-parallel group, F experts of a
rank (E = R * F), N tokens on their way.
"""

from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_layer import _AllToAllV
from torch import Tensor

Experts = Callable[[Tensor, Tensor], Tensor]
"""Weighted sum, [N, D], of a rank's own experts: of tokens [N, D] and the weight of each expert, [N, F]."""


def over_ranks(experts: Experts, x_SD: Tensor, weights_SE: Tensor, chosen_SE: Tensor, ranks: int, group: Any) -> Tensor:
    """What `experts` of all `ranks` of `group` give together for this rank's tokens, [S, D]. Collective.

    weights_SE: 0 where `chosen_SE`, bool, is not set.
    """
    needed_RS = chosen_SE.unflatten(1, (ranks, -1)).any(dim=2).T
    rank_N, token_N = needed_RS.nonzero(as_tuple=True)
    n_sent_R = needed_RS.sum(dim=1)
    n_received_R = torch.empty_like(n_sent_R)
    dist.all_to_all_single(n_received_R, n_sent_R, group=group)
    n_sent, n_received = torch.stack([n_sent_R, n_received_R]).tolist()
    weights_NF = weights_SE.unflatten(1, (ranks, -1))[token_N, rank_N]
    there = _AllToAllV.apply(group, torch.cat([x_SD[token_N], weights_NF], dim=1), n_sent, n_received)
    width = x_SD.shape[1]
    back_ND = _AllToAllV.apply(group, experts(there[:, :width], there[:, width:]), n_received, n_sent)
    # In fp32, as AutoEP adds up.
    sum_SD = torch.zeros_like(x_SD, dtype=torch.float32).index_add(0, token_N, back_ND.float())
    return sum_SD.to(x_SD.dtype)
