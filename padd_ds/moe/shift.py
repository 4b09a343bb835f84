"""How far the router's choice for a token has moved between two policies (PADD, Stage III).

Shapes: S flattened tokens, E experts, K experts per token.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

SHIFT_EDGES = [10 ** (exponent / 4) for exponent in range(-32, 5)]
"""From 1e-8 to 10, four to a power of ten: Gamma varies over orders of magnitude."""


def router_distribution(scores_SE: Tensor, score_func: str) -> Tensor:
    """g, the router's distribution over experts, [S, E], rows summing to 1, float32 or better.

    `scores_SE` are the router's activated scores, without noise and without selection bias. Choice:
    `sigmoid` scores are divided by their sum; `softmax` scores already are a distribution.
    """
    scores_SE = _widened(scores_SE)
    if score_func == "softmax":
        return scores_SE
    if score_func == "sigmoid":
        return scores_SE / scores_SE.sum(-1, keepdim=True).clamp(min=_tiny(scores_SE))
    raise ValueError(f"score_func {score_func!r} is not one of sigmoid, softmax")


@torch.no_grad()
def router_shift(new_SE: Tensor, old_SE: Tensor, measure: str, selected_SK: Tensor | None = None) -> Tensor:
    """Gamma of one layer, [S], without gradient; both arguments as router_distribution gives them.

    Choice: `absolute` is ||g - g_old||_2 (the paper); `relative` divides it by ||g_old||_2; `selected` is the
    mean of |log g - log g_old| over `selected_SK`, the experts that the old policy chose (as in RSPO).
    """
    new_SE, old_SE = _widened(new_SE), _widened(old_SE)
    if measure == "selected":
        if selected_SK is None:
            raise ValueError("measure 'selected' needs the experts that the old policy chose")
        return _selected_shift(new_SE, old_SE, selected_SK)
    return SHIFT_MEASURES[measure](new_SE, old_SE)


def shift_counts(shift_S: Tensor, mask_S: Tensor) -> Tensor:
    """How many unmasked tokens' shifts lie below SHIFT_EDGES[0], between two neighbours, or above, int64.

    Sums over ranks and steps, from which the distribution function follows.
    """
    edges = torch.tensor(SHIFT_EDGES, dtype=shift_S.dtype, device=shift_S.device)
    return torch.bincount(torch.bucketize(shift_S[mask_S.bool()], edges, right=True), minlength=len(SHIFT_EDGES) + 1)


def mean_over_layers(shifts_S: Iterable[Tensor]) -> Tensor:
    """Mean of one [S] tensor per layer, taken one at a time, so that a generator is never held whole."""
    total_S, layers = None, 0
    for shift_S in shifts_S:
        total_S = shift_S if total_S is None else total_S + shift_S
        layers += 1
    if total_S is None:
        raise ValueError("mean_over_layers got no layer")
    return total_S / layers


def _absolute_shift(new_SE: Tensor, old_SE: Tensor) -> Tensor:
    return torch.linalg.vector_norm(new_SE - old_SE, dim=-1)


def _relative_shift(new_SE: Tensor, old_SE: Tensor) -> Tensor:
    return _absolute_shift(new_SE, old_SE) / torch.linalg.vector_norm(old_SE, dim=-1).clamp(min=_tiny(old_SE))


def _selected_shift(new_SE: Tensor, old_SE: Tensor, selected_SK: Tensor) -> Tensor:
    tiny = _tiny(old_SE)
    new_SK = new_SE.gather(-1, selected_SK).clamp(min=tiny)
    old_SK = old_SE.gather(-1, selected_SK).clamp(min=tiny)
    return (new_SK.log() - old_SK.log()).abs().mean(-1)


def _widened(scores_SE: Tensor) -> Tensor:
    return scores_SE.to(torch.promote_types(scores_SE.dtype, torch.float32))


def _tiny(scores_SE: Tensor) -> float:
    return torch.finfo(scores_SE.dtype).tiny


SHIFT_MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "absolute": _absolute_shift,
    "relative": _relative_shift,
}
