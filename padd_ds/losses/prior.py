"""How much each expert's neurons fire: the distributions p_T and p_S that the warm-up compares.

Shapes: S tokens, D model width, E experts, F neurons of one expert.
"""

import torch
from torch.nn import functional


def expert_activation_sums(x_SD: torch.Tensor, w_gate_EFD: torch.Tensor, w_up_EFD: torch.Tensor) -> torch.Tensor:
    """[E] fp32: sum over tokens, mean over an expert's neurons of |silu(x Wg^T) * (x Wu^T)|.

    Every expert is applied to every token. Sums of several ranks may be added before dividing by
    the number of tokens, which gives hbar of PADD eq. 2. Differentiable; one expert at a time, so
    that no more than [S, F] is alive without a gradient.
    Choice: the magnitude is averaged, because the signed activations of a gated FFN average to about 0.
    """
    sums = []
    for w_gate_FD, w_up_FD in zip(w_gate_EFD, w_up_EFD, strict=True):
        hidden_SF = functional.silu(x_SD @ w_gate_FD.T) * (x_SD @ w_up_FD.T)
        sums.append(hidden_SF.abs().float().mean(dim=-1).sum())
    return torch.stack(sums)


def expert_prior(activation_mean_E: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax(hbar / mean(hbar) / xi) over experts, [E] fp32 (PADD eq. 2; `temperature` is xi, > 0).

    Choice: hbar is divided by its mean over experts, so that xi means the same in every layer.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    activation_mean_E = activation_mean_E.float()
    return torch.softmax(activation_mean_E / activation_mean_E.mean() / temperature, dim=-1)
