"""Advantages of responses relative to their group.

Shapes: P prompts, G responses per prompt.
"""

import torch
from torch import Tensor

from padd_ds.losses.tokens import compute_dtype


def group_advantages(rewards_PG: Tensor, eps: float = 1e-8) -> Tensor:
    """A = (r - mean) / (std + eps) within each prompt's group, [P, G] (PADD, joint training).

    Choice: the population standard deviation. A group of equal rewards gives exactly 0, also where rounding
    keeps its mean from being exact, which eps would then blow up.
    """
    rewards_PG = rewards_PG.to(compute_dtype(rewards_PG))
    centred_PG = rewards_PG - rewards_PG.mean(-1, keepdim=True)
    std_P1 = rewards_PG.std(-1, correction=0, keepdim=True)
    return torch.where(_all_equal(rewards_PG)[:, None], 0.0, centred_PG / (std_P1 + eps))


def groups_without_spread(rewards_PG: Tensor) -> Tensor:
    """How many groups have equal rewards throughout, so that they teach nothing; scalar int64."""
    return _all_equal(rewards_PG).sum()


def _all_equal(rewards_PG: Tensor) -> Tensor:
    return (rewards_PG == rewards_PG[:, :1]).all(-1)
