"""How much every expert of a layer fires, experts of other ranks included, measured inside the layer's own pass.

Legend: S tokens, D model width, E routed experts.
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from padd_ds.engine.ranks import gather_over_group
from padd_ds.losses.prior import expert_activation_sums
from padd_ds.moe.router import RoutingControl


def measure_activity(layer: Any, index: int, control: RoutingControl) -> None:
    """Let an AutoEP layer leave its experts' activity in the control's record whenever there is a sample.

    Inside the pass, since under ZeRO-3 the weights are there only as long as it lasts, forwards and backwards.
    """
    run = layer._forward

    def forward(hidden_BTD: torch.Tensor) -> Any:
        output = run(hidden_BTD)
        if control.sample_S is None:
            return output
        activity_E = experts_activity(layer, hidden_BTD.detach().flatten(0, 1)[control.sample_S])
        first, *others = output if isinstance(output, tuple) else (output,)
        first, activity_E = _BackwardAtOnce.apply(first, activity_E)
        if control.record is not None:
            control.record.activity_E[index] = activity_E
        return (first, *others) if others else first

    layer._forward = forward


def experts_activity(layer: Any, x_SD: torch.Tensor) -> torch.Tensor:
    """[E]: mean activity of every expert of an expert-parallel layer on the tokens of all its ranks.

    Only this rank's experts carry a gradient: those of the other ranks enter as numbers.
    """
    x_all_SD = gather_over_group(x_SD, layer.ep_group) if layer.ep_size > 1 else x_SD
    experts = layer.experts
    sums_E = checkpoint(expert_activation_sums, x_all_SD, experts.w1, experts.w3, use_reentrant=False)
    own_E = sums_E / len(x_all_SD)
    if layer.ep_size == 1:
        return own_E
    parts = list(gather_over_group(own_E, layer.ep_group).split(layer.num_local_experts))
    parts[layer.ep_rank] = own_E
    return torch.cat(parts)


class _BackwardAtOnce(torch.autograd.Function):
    """Identity of two tensors that makes the backward pass enter both behind the layer's output."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, activity_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return output.view_as(output), activity_E.view_as(activity_E)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients
