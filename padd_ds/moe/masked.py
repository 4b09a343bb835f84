"""All experts on all tokens in three matrix products, the unchosen ones weighed with 0.

Legend: S tokens, D model width, E routed experts, F expert width, K experts per token.
"""

import torch.nn.functional as F
from torch import Tensor


def masked_experts(
    x_SD: Tensor, weights_SK: Tensor, selected_SK: Tensor, w_gate_EFD: Tensor, w_down_EDF: Tensor, w_up_EFD: Tensor
) -> Tensor:
    """sum_k weight_k expert_k(x), [S, D]: what sending each token to its experts gives, up to rounding.

    E / K times the multiplications, in products that are large where experts are narrow, and nothing is sorted or
    copied: faster on a processor that is slow at small ones.
    """
    weights_SE = x_SD.new_zeros(len(x_SD), len(w_gate_EFD)).scatter(1, selected_SK, weights_SK.to(x_SD.dtype))
    hidden_SG = F.silu(F.linear(x_SD, w_gate_EFD.flatten(0, 1))) * F.linear(x_SD, w_up_EFD.flatten(0, 1))
    weighted_SEF = hidden_SG.unflatten(1, w_gate_EFD.shape[:2]) * weights_SE[..., None]
    return weighted_SEF.flatten(1) @ w_down_EDF.transpose(1, 2).flatten(0, 1)
