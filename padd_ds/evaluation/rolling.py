"""A batch in which waiting prompts take the places of finished responses, by transformers' own `generate`.

Legend: B rows, N rows that come in, L tokens so far (left-padded), T tokens of a prompt, H heads, D of a head.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from padd_ds.hf import prompt_cache
from padd_ds.rollout.drawing import DrawByRow
from padd_ds.rollout.settings import callers_settings_alone

SEGMENT = 16
"""Tokens of every row between two looks for finished ones."""


def can_roll(model: Any) -> bool:
    """Whether rows can be taken out of the model's cache, and others put in behind padding.

    Where there is a cache, all layers attend to all tokens, and positions can be told: a window or a state of its own
    would have to be moved as well.
    """
    if not {"position_ids", "past_key_values"} <= inspect.signature(model.base_model.forward).parameters.keys():
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


class RollingBatch:
    """Responses in the making, each known by the number that its prompt came with.

    `draw` gives the processor that draws the next tokens, as many as its second argument says, of rows from the places
    in their responses that its first one says; None takes the likeliest.
    """

    def __init__(
        self,
        model: Any,
        config: GenerationConfig,
        max_new_tokens: int,
        draw: Callable[[Mapping[int, int], int], DrawByRow] | None = None,
    ) -> None:
        self._model, self._config, self._max_new_tokens, self._draw = model, config, max_new_tokens, draw
        self._made: dict[int, list[int]] = {}
        self._ids_BL = torch.empty(0, 0, dtype=torch.long)
        self._mask_BL = torch.empty(0, 0, dtype=torch.long)
        self._cache: Any = None

    def __len__(self) -> int:
        return len(self._made)

    @torch.inference_mode()
    def admit(self, rows: Sequence[int], ids_NT: torch.Tensor, mask_NT: torch.Tensor) -> None:
        """Take in left-padded prompts."""
        # A column of padding in front, so that a prompt of one token has something to be kept of it, too.
        ids_NT, mask_NT = pad(ids_NT, (1, 0), value=self._config.pad_token_id), pad(mask_NT, (1, 0))
        cache: Any = prompt_cache(self._model, ids_NT, mask_NT)
        if self._cache is None:
            self._ids_BL, self._mask_BL, self._cache = ids_NT, mask_NT, cache
        else:
            for ours, theirs in zip(self._cache.layers, cache.layers, strict=True):
                ours.keys = _stacked(ours.keys, theirs.keys, dim=-2)
                ours.values = _stacked(ours.values, theirs.values, dim=-2)
            self._ids_BL = _stacked(self._ids_BL, ids_NT, dim=-1, value=self._config.pad_token_id)
            self._mask_BL = _stacked(self._mask_BL, mask_NT, dim=-1)
        self._made |= {row: [] for row in rows}

    @torch.inference_mode()
    def grow(self) -> dict[int, list[int]]:
        """Up to SEGMENT more tokens to every row; returns the tokens of each row's response so far.

        Rows that reach an end token on the way are padded behind it.
        """
        lengths = {row: len(ids) for row, ids in self._made.items()}
        n_steps = min(SEGMENT, self._max_new_tokens - max(lengths.values()))
        draws = [] if self._draw is None else [self._draw(lengths, n_steps)]
        width = self._ids_BL.shape[1]
        self._config.max_new_tokens = n_steps
        with callers_settings_alone(self._model):
            self._ids_BL = self._model.generate(
                input_ids=self._ids_BL,
                attention_mask=self._mask_BL,
                past_key_values=self._cache,
                generation_config=self._config,
                logits_processor=LogitsProcessorList(draws),
            )
        self._mask_BL = pad(self._mask_BL, (0, self._ids_BL.shape[1] - width), value=1)
        for made, new in zip(self._made.values(), self._ids_BL[:, width:].tolist(), strict=True):
            made += new
        return self._made

    @torch.inference_mode()
    def drop(self, rows: set[int]) -> None:
        """Take out rows that are done, and the padding that none of the others has need of."""
        places = [place for place, row in enumerate(self._made) if row not in rows]
        self._made = {row: made for row, made in self._made.items() if row not in rows}
        if not places:
            self._cache = None
            return
        kept = torch.tensor(places, device=self._ids_BL.device)
        first = int(self._mask_BL[kept].argmax(dim=-1).min())
        self._ids_BL, self._mask_BL = self._ids_BL[kept, first:], self._mask_BL[kept, first:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[kept, :, first:], layer.values[kept, :, first:]


def _stacked(above: torch.Tensor, below: torch.Tensor, *, dim: int, value: int = 0) -> torch.Tensor:
    """One on the other along the first dimension, the shorter one padded in front along `dim`, the last or last but
    one."""
    width = max(above.shape[dim], below.shape[dim])
    behind = (0, 0) * (-1 - dim)
    return torch.cat([pad(each, (*behind, width - each.shape[dim], 0), value=value) for each in (above, below)])
