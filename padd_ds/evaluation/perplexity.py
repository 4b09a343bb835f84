"""Perplexity of a text.

Shapes: N windows, B windows of a batch, T tokens of a window, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite
from typing import Any

import torch
from torch.nn import functional

from padd_ds.data.batches import supervised_batch, text_windows
from padd_ds.errors import UserError
from padd_ds.hf import response_logits
from padd_ds.losses.tokens import cross_entropy_sum


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean negative log-likelihood per predicted token."""

    value: float
    nll_mean_nats: float
    tokens: int
    """Tokens predicted: `window` - 1 for each window."""
    windows: int
    window: int
    """Tokens per window."""


@torch.inference_mode()
def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    window: int = 256,
    max_windows: int | None = None,
    batch_size: int = 4,
) -> Perplexity:
    """Perplexity over the first `max_windows` (default: all) non-overlapping windows of `text`.

    Every token of a window but its first is predicted, from those before it in the same window; no
    begin-of-text token is added, and what does not fill a window is left out. UserError where the loss is not finite.
    """
    if window < 2:
        raise UserError(f"perplexity window {window} must be at least 2 tokens")
    ids_NT = text_windows(text, tokenizer, window, max_windows)
    nll_sum = sum(_nll_sum(model, ids_BT.to(model.device)) for ids_BT in ids_NT.split(batch_size))
    return _measured(nll_sum, ids_NT.shape[0] * (window - 1), ids_NT.shape[0], window)


@torch.inference_mode()
def solution_perplexity(
    model: Any, tokenizer: Any, prompts: Sequence[str], solutions: Sequence[str], batch_size: int = 32
) -> Perplexity:
    """Perplexity of worked solutions and their end token, each given its prompt; `window` is the longest row.

    UserError where the loss is not finite.
    """
    nll_sum, tokens, longest = 0.0, 0, 0
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        batch = supervised_batch(prompts[rows], solutions[rows], tokenizer, model.config.max_position_embeddings)
        ids_BT, mask_BT = batch["input_ids_BT"].to(model.device), batch["attention_mask_BT"].to(model.device)
        target_ids_BR, target_mask_BR = (batch[name].to(model.device) for name in ("target_ids_BR", "target_mask_BR"))
        logits_BRV = response_logits(model, ids_BT, mask_BT, target_ids_BR.shape[1])
        nll_sum += float(cross_entropy_sum(logits_BRV, target_ids_BR, target_mask_BR))
        tokens += int(target_mask_BR.sum())
        longest = max(longest, ids_BT.shape[1])
    if tokens == 0:
        raise UserError("no solution has a token; check --solution-field")
    return _measured(nll_sum, tokens, len(prompts), longest)


def _measured(nll_sum: float, tokens: int, windows: int, window: int) -> Perplexity:
    mean = nll_sum / tokens
    if not isfinite(mean):
        raise UserError(
            f"the perplexity is not finite (mean loss {mean} nats): the model's logits are not; check its weights, "
            "or measure with --dtype float32"
        )
    value = exp(mean) if mean < 700 else float("inf")
    return Perplexity(value=value, nll_mean_nats=mean, tokens=tokens, windows=windows, window=window)


def _nll_sum(model: Any, ids_BT: torch.Tensor) -> float:
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
    nll = functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    return nll.double().sum().item()
