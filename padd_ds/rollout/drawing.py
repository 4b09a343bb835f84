"""Drawing tokens by seeds of their own.

Legend: B rows of a batch, T tokens so far, V vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


class DrawByRow(LogitsProcessor):
    """Makes a drawn token the likeliest one, by each row's own numbers, whatever other rows stand in its batch.

    For `generate` without sampling, as its last processor. One seed for each row; temperature above 0. `made`: the
    tokens that each row has drawn before, 0 where they are left out; the longest goes on to `max_new_tokens` at most.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        made: Sequence[int] | None = None,
    ) -> None:
        self._temperature, self._top_p = temperature, top_p
        made = made or [0] * len(seeds)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = [torch.rand(max_new_tokens, generator=each, dtype=torch.float64) for each in generators]
        n_steps = max_new_tokens - max(made, default=0)
        self._steps = iter(torch.stack([row[skip : skip + n_steps] for row, skip in zip(rows, made, strict=True)], 1))

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
