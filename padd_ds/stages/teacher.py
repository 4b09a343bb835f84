"""The teacher on a rollout's responses, with each prompt run once for all responses of its group.

Legend: P prompts, G responses per prompt, B responses, T prompt tokens (left-padded), R response tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from padd_ds.hf import position_ids, prompt_cache
from padd_ds.rollout.batch import RolloutBatch


@dataclass(frozen=True, kw_only=True)
class TeacherOnPrompts:
    """A frozen teacher that has read the prompts of a rollout."""

    teacher: Any
    cache: DynamicCache
    """Of all prompt tokens but the last."""
    mask_PT: torch.Tensor

    @classmethod
    @torch.no_grad()
    def read(cls, teacher: Any, batch: RolloutBatch, group_size: int) -> "TeacherOnPrompts":
        """`batch`: the whole rollout of a rank, the responses of a group side by side."""
        # A column of padding, so that a prompt of one token leaves something to cache.
        ids_PT, mask_PT = (
            torch.nn.functional.pad(tensor_BT[::group_size], (1, 0), value=0)
            for tensor_BT in (batch.prompt_ids_BT, batch.prompt_mask_BT)
        )
        return cls(teacher=teacher, cache=prompt_cache(teacher, ids_PT, mask_PT), mask_PT=mask_PT)

    @torch.no_grad()
    def logits(self, batch: RolloutBatch, prompt_B: torch.Tensor) -> torch.Tensor:
        """[B, R, V]: logits that predict the tokens of these responses, which follow the prompts `prompt_B`."""
        n_response, mask_BT = batch.response_ids_BR.shape[1], self.mask_PT[prompt_B]
        # As wide as the longest of these prompts, with one column at least in the cache.
        n_prompt = max(int(mask_BT.sum(dim=1).max()), 2)
        cache = DynamicCache()
        layer: Any
        for index, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[prompt_B, :, 1 - n_prompt :], layer.values[prompt_B, :, 1 - n_prompt :], index)
        mask_BL = torch.cat([mask_BT[:, -n_prompt:], batch.response_mask_BR[:, :-1].long()], dim=1)
        return self.teacher(
            input_ids=torch.cat([batch.prompt_ids_BT[:, -1:], batch.response_ids_BR[:, :-1]], dim=1),
            attention_mask=mask_BL,
            position_ids=position_ids(mask_BL)[:, -n_response:],
            past_key_values=cache,
            use_cache=True,
        ).logits
