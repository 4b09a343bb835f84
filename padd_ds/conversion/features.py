"""What a teacher FFN neuron is known by when neurons are grouped.

Shapes: S tokens, D model width, F neurons of the teacher's FFN.
"""

import torch
from torch.nn import functional

MAX_FEATURE_TOKENS = 2048


def hidden_activations(x_SD: torch.Tensor, w_gate_FD: torch.Tensor, w_up_FD: torch.Tensor) -> torch.Tensor:
    """h = silu(x Wg^T) * (x Wu^T), [S, F] fp32."""
    x_SD = x_SD.float()
    return functional.silu(x_SD @ w_gate_FD.float().T) * (x_SD @ w_up_FD.float().T)


def contributions(hidden_SF: torch.Tensor, w_down_DF: torch.Tensor) -> torch.Tensor:
    """|h_k| * ||W_down[:, k]||, [S, F]: the length of what neuron k adds to the residual stream."""
    return hidden_SF.abs() * w_down_DF.float().norm(dim=0)


def contribution_pattern(contribution_SF: torch.Tensor) -> torch.Tensor:
    """[F, S']: on which tokens a neuron contributes most, each row of length 1.

    The neuron's share of its token's total contribution, on at most MAX_FEATURE_TOKENS evenly spaced
    tokens.
    Choice: rows of equal length, so that neurons group by when they fire and not by how much.
    """
    step = -(-len(contribution_SF) // MAX_FEATURE_TOKENS)
    sample_SF = contribution_SF[::step]
    share_SF = sample_SF / sample_SF.sum(dim=1, keepdim=True).clamp(min=1e-30)
    return functional.normalize(share_SF.T, dim=1)


def weight_importance(w_gate_FD: torch.Tensor, w_down_DF: torch.Tensor) -> torch.Tensor:
    """[F]: ||W_gate[k]|| * ||W_down[:, k]||, a stand-in for the contribution where there is no data."""
    return w_gate_FD.float().norm(dim=1) * w_down_DF.float().norm(dim=0)
