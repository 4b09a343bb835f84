"""Clipping at ZeRO stage 0 in fp32, which DeepSpeed 0.19.8 does by another norm than from stage 1 on.

There it takes the mean over ranks of the norms that each has with its own experts, which is less than the whole one.
"""

from collections.abc import Iterable
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.moe.utils import is_moe_param
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_by_whole_norm(engine: Any, expert_group: Any) -> None:
    """Make `engine` clip by the norm of the whole gradient, and remember it as it does from stage 1 on.

    `expert_group`: the ranks that share the experts; None without any.
    """

    def clip() -> None:
        parameters = list(engine.module.parameters())
        norm = whole_norm(parameters, expert_group)
        clip_grads_with_norm_(parameters, engine.gradient_clipping(), norm)
        engine._global_grad_norm = float(norm)

    engine.clip_fp32_gradients = clip


def whole_norm(parameters: Iterable[torch.nn.Parameter], expert_group: Any) -> torch.Tensor:
    """Scalar: the norm of the gradients that every rank has, and of those of all ranks' experts. Collective."""
    gradients: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for parameter in parameters:
        if parameter.grad is not None:
            gradients[is_moe_param(parameter)].append(parameter.grad)
    shared, own = (get_total_norm(gradients[of_experts]).square() for of_experts in (False, True))
    if expert_group is not None:
        dist.all_reduce(own, group=expert_group)
    return (shared + own).sqrt()
