"""Clipping at ZeRO stage 0, which DeepSpeed 0.19.8 does by another norm than from stage 1 on.

In fp32 it takes the mean over ranks of the norms that each has with its own experts, in bf16 a norm without any
experts; both are less than the whole one.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_by_whole_norm(engine: Any, expert_group: Any) -> None:
    """Make `engine` clip by the norm of the whole gradient, and remember it as it does from stage 1 on.

    `expert_group`: the ranks that share the experts; None without any.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):  # which DeepSpeed takes for bf16, too
        clip_by = optimizer.unscale_and_clip_grads

        def clip_masters(_: float, apply_scale: bool = True) -> Any:
            pairs = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
            gradients = [(master.grad, is_moe_param(live)) for live, master in pairs]
            optimizer._global_grad_norm = whole_norm(gradients, expert_group, engine.device)
            return clip_by(optimizer._global_grad_norm, apply_scale)

        optimizer.unscale_and_clip_grads = clip_masters
        return

    def clip() -> None:
        parameters = list(engine.module.parameters())
        norm = whole_norm([(p.grad, is_moe_param(p)) for p in parameters], expert_group, engine.device)
        clip_grads_with_norm_(parameters, engine.gradient_clipping(), torch.tensor(norm))
        engine._global_grad_norm = norm

    engine.clip_fp32_gradients = clip


def whole_norm(gradients: Iterable[tuple[torch.Tensor | None, bool]], expert_group: Any, device: torch.device) -> float:
    """The norm of the gradients that every rank has, and of those of all ranks' experts. Collective.

    `gradients`: each, if there is one, and whether it is an expert's.
    """
    of: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for gradient, of_expert in gradients:
        if gradient is not None:
            of[of_expert].append(gradient)
    # Of no gradients, get_total_norm gives a zero on the CPU.
    shared, own = (get_total_norm(of[of_experts]).square().to(device) for of_experts in (False, True))
    if expert_group is not None:
        dist.all_reduce(own, group=expert_group)
    return float((shared + own).sqrt())
