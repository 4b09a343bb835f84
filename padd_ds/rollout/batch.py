"""A rollout as tensors, and the slices that training takes from it.

Legend: B responses of this rank, T prompt tokens (left-padded), R response tokens (right-padded), L = T + R,
N MoE layers, K experts per token.
"""

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """Prompts and responses of this rank with what they earned."""

    prompt_ids_BT: torch.Tensor
    prompt_mask_BT: torch.Tensor
    response_ids_BR: torch.Tensor
    response_mask_BR: torch.Tensor
    """1 on the response's own tokens, the end token included; bool."""
    advantage_B: torch.Tensor
    failure_B: torch.Tensor
    """Share of wrong responses among what the student itself answered to the prompt."""
    rollout_logprobs_BR: torch.Tensor | None = None
    """Log-probabilities of the response's tokens as the rollout computed them, not a number where it did not; None
    where nobody asked."""
    routes_BLNK: torch.Tensor | None = None
    """Experts that the rollout routed every token to, -1 where it did not run one; None where nobody asked."""

    @property
    def n_responses(self) -> int:
        return self.response_ids_BR.shape[0]

    @property
    def input_ids_BL(self) -> torch.Tensor:
        """Prompt and response side by side."""
        return torch.cat([self.prompt_ids_BT, self.response_ids_BR], dim=1)

    @property
    def attention_mask_BL(self) -> torch.Tensor:
        return torch.cat([self.prompt_mask_BT, self.response_mask_BR.long()], dim=1)

    @property
    def counted_mask_BL(self) -> torch.Tensor:
        """The attention mask, without the responses of which nothing is learnt: those of dropped groups."""
        return self.attention_mask_BL * self.response_mask_BR.any(dim=1, keepdim=True)

    def rows(self, index: torch.Tensor) -> "RolloutBatch":
        """The responses at `index`, cut to the longest prompt and response among them."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen = replace(self, **{name: tensor[index] for name, tensor in tensors.items() if tensor is not None})
        n_prompt = int(chosen.prompt_mask_BT.sum(dim=1).max())
        n_response = max(int(chosen.response_mask_BR.sum(dim=1).max()), 1)
        logprobs_BR = chosen.rollout_logprobs_BR
        width, routes_BLNK = chosen.prompt_ids_BT.shape[1], chosen.routes_BLNK
        return replace(
            chosen,
            rollout_logprobs_BR=None if logprobs_BR is None else logprobs_BR[:, :n_response],
            routes_BLNK=None if routes_BLNK is None else routes_BLNK[:, width - n_prompt : width + n_response],
            prompt_ids_BT=chosen.prompt_ids_BT[:, -n_prompt:],
            prompt_mask_BT=chosen.prompt_mask_BT[:, -n_prompt:],
            response_ids_BR=chosen.response_ids_BR[:, :n_response],
            response_mask_BR=chosen.response_mask_BR[:, :n_response],
        )


def deal_responses(
    batch: RolloutBatch, updates: int, micro_batches: int, *, generator: torch.Generator
) -> list[list[torch.Tensor]]:
    """Rows for every micro-batch of every update: those that have a token to learn from, at random, each once.

    Within an update in order of length. There are as many micro-batches on every rank, whatever was dropped there; one
    for which nothing is left gets a row without tokens, which teaches nothing.
    """
    device = batch.response_mask_BR.device
    order_B = torch.randperm(batch.n_responses, generator=generator).to(device)
    learnt_B = batch.response_mask_BR.any(dim=1)
    lengths_B = batch.attention_mask_BL.sum(dim=1)
    filler_B = (~learnt_B).nonzero().flatten()[:1]

    def dealt(rows_B: torch.Tensor) -> list[torch.Tensor]:
        by_length_B = rows_B[lengths_B[rows_B].argsort()]
        return [rows if len(rows) else filler_B for rows in by_length_B.tensor_split(micro_batches)]

    return [dealt(rows_B) for rows_B in order_B[learnt_B[order_B]].tensor_split(updates)]


def response_positions(tensor_BL: torch.Tensor, n_response: int) -> torch.Tensor:
    """Of [B, L, ...], the R positions that predict the response's tokens: one before each of them."""
    return tensor_BL[:, -n_response - 1 : -1]
