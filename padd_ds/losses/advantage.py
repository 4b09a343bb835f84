"""Advantages of responses relative to their group.

Shapes: P prompts, G responses per prompt.
"""

import torch
from torch import Tensor

from padd_ds.losses.tokens import compute_dtype


def group_advantages(rewards_PG: Tensor, eps: float = 1e-8, *, scale: str = "std") -> Tensor:
    """A = (r - mean) / (std + eps) within each prompt's group, [P, G] (PADD, joint training).

    scale: `std`, or `none` for r - mean alone (Dr. GRPO, arXiv 2503.20783). Choice: the population standard deviation.
    A group of equal rewards gives exactly 0, also where rounding keeps its mean from being exact, which eps would then
    blow up.
    """
    rewards_PG = rewards_PG.to(compute_dtype(rewards_PG))
    centred_PG = rewards_PG - rewards_PG.mean(-1, keepdim=True)
    if scale == "std":
        centred_PG = centred_PG / (rewards_PG.std(-1, correction=0, keepdim=True) + eps)
    return torch.where(_all_equal(rewards_PG)[:, None], 0.0, centred_PG)


def groups_without_spread(rewards_PG: Tensor) -> Tensor:
    """[P] bool: groups of equal rewards throughout, which teach nothing."""
    return _all_equal(rewards_PG)


def _all_equal(rewards_PG: Tensor) -> Tensor:
    return (rewards_PG == rewards_PG[:, :1]).all(-1)
