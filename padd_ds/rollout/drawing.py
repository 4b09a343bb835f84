"""Drawing tokens by seeds of their own.

Legend: B rows of a batch, T tokens to come, V vocabulary.
"""

import torch
from transformers import LogitsProcessor


def numbers_of(seed: int, count: int) -> torch.Tensor:
    """The numbers that the tokens of a response are drawn by, one for each; [count], float64, from 0 to 1."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class DrawByRow(LogitsProcessor):
    """Makes a drawn token the likeliest one, by each row's own numbers, whatever other rows stand in its batch.

    For `generate` without sampling, as its last processor; temperature above 0.
    """

    def __init__(self, numbers_BT: torch.Tensor, temperature: float, top_p: float = 1.0) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._steps = iter(numbers_BT.T)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probabilities_BV = (scores.float() / self._temperature).softmax(dim=-1).double()
        if self._top_p < 1:
            sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
            outside_BV = sorted_BV.cumsum(dim=-1) - sorted_BV >= self._top_p
            probabilities_BV = probabilities_BV.scatter(-1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))
        # Over the vocabulary in its own order: rounding moves a bound between two tokens, but never swaps them.
        bounds_BV = probabilities_BV.cumsum(dim=-1)
        drawn_B1 = next(self._steps).to(scores.device)[:, None] * bounds_BV[:, -1:]
        tokens_B1 = torch.searchsorted(bounds_BV, drawn_B1, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, tokens_B1, 0.0)
