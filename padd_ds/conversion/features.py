"""What a teacher FFN neuron is known by when neurons are grouped.

Shapes: S tokens, D model width, F neurons of the teacher's FFN, C features of one kind.
"""

from collections.abc import Sequence

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


def weight_features(
    gate_FD: torch.Tensor, up_FD: torch.Tensor, down_DF: torch.Tensor, parts: Sequence[str] = ("gate",)
) -> torch.Tensor:
    """[F, D * number of parts] fp32: a neuron's weights in the named parts, of "gate", "up" and "down", in that order.

    Choice: several parts weigh equally, see `side_by_side`; a single one stays as it is in the teacher.
    ValueError for no part, an unknown one or one named twice.
    """
    rows = {"gate": gate_FD, "up": up_FD, "down": down_DF.T}
    if not parts or len(set(parts)) < len(parts) or not set(parts) <= set(rows):
        raise ValueError(f"parts are {list(parts)}, but must be different ones of {list(rows)}, at least one")
    blocks = [rows[part].float() for part in rows if part in parts]
    return side_by_side(blocks) if len(blocks) > 1 else blocks[0]


def mixed_features(pattern_FS: torch.Tensor, weights_FC: torch.Tensor) -> torch.Tensor:
    """[F, S + C] fp32: when a neuron fires and what its weights are, at equal weight, see `side_by_side`.

    pattern_FS: of `contribution_pattern`. weights_FC: of `weight_features`.
    """
    return side_by_side([pattern_FS, weights_FC])


def side_by_side(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """[F, sum of the blocks' C] fp32 from blocks [F, C]: each gives the same share of a total variance of 1.

    Choice: a block is centred, which k-means does not see, and divided by the root of its total variance (the mean
    squared distance of its rows from their mean), which is what k-means splits. So distances within a block keep
    their proportions, and many columns count no more than few. A block of equal rows becomes zero.
    """
    equal = []
    for block_FC in blocks:
        block_FC = block_FC.float()
        centred_FC = block_FC - block_FC.mean(dim=0)
        variance, level = (rows_FC.square().sum(dim=1).mean() for rows_FC in (centred_FC, block_FC))
        # Below this the variance is rounding.
        scale = torch.where(variance > 1e-10 * level, (len(blocks) * variance).rsqrt(), 0.0)
        equal.append(centred_FC * scale)
    return torch.cat(equal, dim=1)
