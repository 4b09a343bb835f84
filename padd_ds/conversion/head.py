"""What lies outside the layers: embedding, and the head with its likelihood, both read in pieces.

Shapes: B windows, T tokens of a window, S = B * T tokens, D model width, V vocabulary, C rows of the head at a time.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from padd_ds.conversion.teacher import TeacherWeights

ROWS_AT_A_TIME = 1 << 14
TOKENS_AT_A_TIME = 1 << 12


def embed(weights: TeacherWeights, windows_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, D] embeddings in the stored dtype; only the rows of those tokens are read."""
    ids_U, inverse_BT = windows_BT.clamp(min=0).unique(return_inverse=True)
    return weights.pick("model.embed_tokens.weight", ids_U)[inverse_BT]


def head_name(config: Any) -> str:
    """The tensor that gives a model's logits."""
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def head_rows(
    weights: TeacherWeights, config: Any, rounding: torch.dtype | None = None
) -> Callable[[int, int], torch.Tensor]:
    """Reads rows of a model's head, rounded to `rounding` where one is given."""
    name = head_name(config)
    return lambda start, stop: weights.rows(name, start, stop).to(rounding)


class Head:
    """The rows of a language model's head; `rows(start, stop)` reads some of them, [stop - start, D]."""

    def __init__(self, rows: Callable[[int, int], torch.Tensor], vocabulary: int, device: str) -> None:
        self._rows = rows
        self._vocabulary = vocabulary
        self._device = device

    def logits(self, normed_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, V] fp32 on the CPU, computed in the dtype of `normed_BTD`."""
        return torch.cat([part.float() for _, part in self._parts(normed_BTD)], dim=-1)

    def nll_mean_nats(self, normed_BTD: torch.Tensor, windows_BT: torch.Tensor) -> float:
        """Mean negative log-likelihood of every token but the first of its window, in fp32."""
        states_SD = normed_BTD[:, :-1].flatten(0, 1).float()
        targets_S = windows_BT[:, 1:].flatten()
        log_sum_S = torch.full((len(states_SD),), -torch.inf)
        target_logit_S = torch.empty(len(states_SD))
        for start, rows_CD in self._chunks(torch.float32):
            for tokens in torch.arange(len(states_SD)).split(TOKENS_AT_A_TIME):
                logits_SC = states_SD[tokens].to(self._device) @ rows_CD.T
                part_S = torch.logsumexp(logits_SC, dim=1).cpu()
                log_sum_S[tokens] = torch.logaddexp(log_sum_S[tokens], part_S)
                column_S = targets_S[tokens] - start
                here = (column_S >= 0) & (column_S < len(rows_CD))
                target_logit_S[tokens[here]] = logits_SC.cpu()[here, column_S[here]]
        return float((log_sum_S.double() - target_logit_S.double()).mean())

    def _parts(self, normed_BTD: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        states_BTD = normed_BTD.to(self._device)
        for start, rows_CD in self._chunks(normed_BTD.dtype):
            yield start, torch.nn.functional.linear(states_BTD, rows_CD).cpu()

    def _chunks(self, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, self._vocabulary, ROWS_AT_A_TIME):
            stop = min(start + ROWS_AT_A_TIME, self._vocabulary)
            yield start, self._rows(start, stop).to(self._device, dtype)
