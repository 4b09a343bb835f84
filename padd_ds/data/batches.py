"""Batches of token ids as pure functions of their inputs.

Shapes: B rows of a batch, T tokens of the longest row, R tokens of the longest target, N windows.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch

from padd_ds.errors import UserError


class SupervisedBatch(TypedDict):
    """Prompts followed by targets, padded on the left, so that all targets end in the last column; or packed documents,
    padded on the right."""

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    """1 on all tokens but padding."""
    position_ids_BT: torch.Tensor | None
    """In packed rows: 0 at the first token of each document, and of the padding. None: positions follow from the
    mask."""
    target_ids_BR: torch.Tensor
    """The last R columns of input_ids_BT."""
    target_mask_BR: torch.Tensor
    """True on tokens to be predicted: the target's and its end token; bool."""
    truncated: int
    """Rows cut at `max_length`."""


class PromptBatch(TypedDict):
    """Prompts padded on the left, so that generation starts in one column."""

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    truncated: int
    """Prompts that lost their beginning."""


def batch_indices(step: int, batch_size: int, n_rows: int, seed: int) -> list[int]:
    """The rows of batch `step` (from 0): a pure function, so that resuming needs the step alone.

    Every epoch is a permutation of its own by (seed, epoch); batches run across the border of epochs, so
    each row is met once per epoch and no batch is short. A batch larger than the set repeats rows.
    """
    if n_rows < 1:
        raise ValueError("batch_indices needs at least one row")
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {position // n_rows for position in positions}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n_rows) for epoch in epochs}
    return [int(orders[position // n_rows][position % n_rows]) for position in positions]


def supervised_batch(
    prompts: Sequence[str], targets: Sequence[str], tokenizer: Any, max_length: int
) -> SupervisedBatch:
    """Token ids of prompt + target + end token per row, cut on the right at `max_length` tokens.

    `prompts` are complete texts (see `prompts.render`). A row whose prompt fills `max_length` has no
    token to learn; its target mask is all False. UserError when a prompt has no token: nothing would
    predict the target's first.
    """
    rows, n_targets, truncated = [], [], 0
    for prompt, target in zip(prompts, targets, strict=True):
        prompt_ids, target_ids = _ids(prompt, tokenizer), [*_ids(target, tokenizer), tokenizer.eos_token_id]
        if not prompt_ids:
            raise UserError("a prompt has no token; write some text around {question} in data.template")
        truncated += len(prompt_ids) + len(target_ids) > max_length
        rows.append((prompt_ids + target_ids)[:max_length])
        n_targets.append(max(len(rows[-1]) - len(prompt_ids), 0))
    input_ids_BT, attention_mask_BT = _padded_left(rows, tokenizer)
    n_target = max(1, *n_targets)
    return SupervisedBatch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=attention_mask_BT,
        position_ids_BT=None,
        target_ids_BR=input_ids_BT[:, -n_target:],
        target_mask_BR=torch.arange(n_target) >= n_target - torch.tensor(n_targets)[:, None],
        truncated=truncated,
    )


def packed_batch(rows: Sequence[Sequence[np.ndarray]], pad_token_id: int) -> SupervisedBatch:
    """Rows of whole documents, one behind the other; of each document, all tokens but the first are to be predicted.

    Padding counts its own positions, as another document would, so that nothing sees it.
    """
    width = max(sum(map(len, documents)) for documents in rows)
    ids_BT = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    mask_BT, positions_BT = np.zeros_like(ids_BT), np.zeros_like(ids_BT)
    for row, documents in enumerate(rows):
        lengths = [len(document) for document in documents]
        used = sum(lengths)
        ids_BT[row, :used] = np.concatenate(documents)
        mask_BT[row, :used] = 1
        positions_BT[row] = np.concatenate([np.arange(length) for length in (*lengths, width - used)])
    return SupervisedBatch(
        input_ids_BT=torch.from_numpy(ids_BT),
        attention_mask_BT=torch.from_numpy(mask_BT),
        position_ids_BT=torch.from_numpy(positions_BT),
        target_ids_BR=torch.from_numpy(ids_BT[:, 1:]),
        target_mask_BR=torch.from_numpy((mask_BT == 1) & (positions_BT > 0))[:, 1:],
        truncated=0,
    )


def prompt_batch(prompts: Sequence[str], tokenizer: Any, max_prompt_length: int) -> PromptBatch:
    """Token ids of complete prompt texts, the last `max_prompt_length` tokens of each."""
    whole = [_ids(prompt, tokenizer) for prompt in prompts]
    input_ids_BT, attention_mask_BT = _padded_left([ids[-max_prompt_length:] for ids in whole], tokenizer)
    return PromptBatch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=attention_mask_BT,
        truncated=sum(len(ids) > max_prompt_length for ids in whole),
    )


def text_windows(text: str, tokenizer: Any, length: int, count: int | None = None) -> torch.Tensor:
    """The first `count` (default: all) non-overlapping windows of `length` tokens of `text`, ids_NT.

    No begin-of-text token is added; what is left at the end is dropped. UserError if not one is full.
    """
    ids = _ids(text, tokenizer)
    available = len(ids) // length
    if available < 1:
        raise UserError(f"the text has {len(ids)} tokens, less than one window of {length}; give a longer one")
    windows = available if count is None else min(count, available)
    return torch.tensor(ids[: windows * length]).view(windows, length)


def _ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _padded_left(rows: Sequence[list[int]], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [B, T] int64."""
    width = max(map(len, rows))
    ids_BT = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids_BT, mask_BT
