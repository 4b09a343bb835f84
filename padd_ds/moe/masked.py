"""All experts on all tokens in three matrix products, the unchosen ones weighed with 0.

Legend: S tokens, D model width, E routed experts, F expert width, K experts per token.
"""

import torch.nn.functional as F
from torch import Tensor


def weights_of_all(weights_SK: Tensor, selected_SK: Tensor, experts: int) -> Tensor:
    """The weights of the selected experts at their places among all `experts`, [S, E]; 0 for the others."""
    return weights_SK.new_zeros(len(weights_SK), experts).scatter(1, selected_SK, weights_SK)


def masked_experts(
    x_SD: Tensor, weights_SE: Tensor, w_gate_EFD: Tensor, w_down_EDF: Tensor, w_up_EFD: Tensor
) -> Tensor:
    """sum_e weight_e expert_e(x), [S, D]: what sending each token to its experts gives, up to rounding.

    E / K times the multiplications, in products that are large where experts are narrow, and nothing is sorted or
    copied: faster on a processor that is slow at small ones.
    """
    hidden_SG = F.silu(F.linear(x_SD, w_gate_EFD.flatten(0, 1))) * F.linear(x_SD, w_up_EFD.flatten(0, 1))
    weighted_SEF = hidden_SG.unflatten(1, w_gate_EFD.shape[:2]) * weights_SE[..., None]
    return weighted_SEF.flatten(1) @ w_down_EDF.transpose(1, 2).flatten(0, 1)
