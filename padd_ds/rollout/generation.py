"""Sampling responses from the live student, all ranks in step.

Legend: P prompts, G responses per prompt, B = P * G responses, T prompt tokens (left-padded),
R response tokens (right-padded), N MoE layers, K experts per token.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from padd_ds.hf import prompt_cache
from padd_ds.rollout.drawing import DrawByRow, numbers_of
from padd_ds.rollout.settings import callers_settings_alone


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn."""

    group_size: int = 1
    """Responses to each prompt."""
    max_new_tokens: int
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    share_prefill: bool = True
    """Run each prompt once and copy its cache to its G responses."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What responses are drawn to."""

    ids_PT: torch.Tensor
    mask_PT: torch.Tensor
    seeds: Sequence[int]
    """One for each prompt: a response is drawn by that of its prompt plus its place in the group, whatever stands
    beside it."""

    def __getitem__(self, rows: slice) -> "Prompts":
        return Prompts(ids_PT=self.ids_PT[rows], mask_PT=self.mask_PT[rows], seeds=self.seeds[rows])


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Responses in the order of their prompts, the G of one prompt next to each other."""

    ids_BR: torch.Tensor
    mask_BR: torch.Tensor
    """1 up to and including the end token; bool."""
    ended_B: torch.Tensor
    """Whether the end token came within the allowed length."""
    logprobs_BR: torch.Tensor | None = None
    """fp32 log-probabilities of the tokens at the sampling temperature, as this engine computed them; None where
    nobody asked."""
    routes_BLNK: torch.Tensor | None = None
    """Experts that every token of prompt and response (L = T + R) was routed to, int16; -1 on the last token, which
    no forward pass saw. None where they were not traced."""
    versions_B: torch.Tensor | None = None
    """Of the weights that made them, on the CPU; None where they are those of the student itself."""


class RolloutEngine(Protocol):
    """Whatever draws responses from the current weights."""

    def ready(self, version: int) -> AbstractContextManager[object]:
        """Inside, `generate` draws from the weights as they are now, which get this number. Collective."""
        ...

    def generate(self, prompts: Prompts, sampling: Sampling) -> Responses:
        """Responses to each prompt; called by all ranks with the same number of prompts."""
        ...


class DrawsAhead(RolloutEngine, Protocol):
    """An engine that can draw while the student is trained."""

    def begin(self, prompts: Prompts, sampling: Sampling) -> Any:
        """Start what `generate` does, inside `ready`, and return at once."""
        ...

    def finish(self, drawing: Any, version: int) -> Responses:
        """The responses that were begun. What a server failed to answer is drawn from the weights as they are now,
        which get this number. Collective; before the next `ready`."""
        ...


@dataclass(frozen=True, kw_only=True)
class HuggingFaceRollout:
    """transformers' `generate` on the training engine's own module, by `Sampling` alone.

    With `ranks_in_step` every rank runs as many forward passes as the slowest one: experts of other
    ranks are reached by collectives, so a rank that stopped early would leave the others waiting.
    """

    model: Any
    end_token_ids: tuple[int, ...]
    pad_token_id: int
    ranks_in_step: bool
    trace: Callable[[], AbstractContextManager[list[dict[int, torch.Tensor]]]] | None = None
    """Opens a list that collects the chosen experts of every forward pass; None keeps no routes."""

    keep_logprobs: bool = False

    def ready(self, version: int) -> AbstractContextManager[object]:
        """Nothing to do: the weights are those of the student itself."""
        return nullcontext()

    @torch.no_grad()
    def generate(self, prompts: Prompts, sampling: Sampling) -> Responses:
        """See RolloutEngine."""
        prompt_ids_PT, prompt_mask_PT, group_size = prompts.ids_PT, prompts.mask_PT, sampling.group_size
        if sampling.share_prefill:
            # Room for a cache of all tokens but the last, on every rank, whatever its own prompts are; `generate` runs
            # the last.
            prompt_ids_PT = torch.nn.functional.pad(prompt_ids_PT, (1, 0), value=self.pad_token_id)
            prompt_mask_PT = torch.nn.functional.pad(prompt_mask_PT, (1, 0), value=0)
        ids_BT = prompt_ids_PT.repeat_interleave(group_size, dim=0)
        mask_BT = prompt_mask_PT.repeat_interleave(group_size, dim=0)
        recorder = SampledLogprobs(sampling.temperature or 1.0) if self.keep_logprobs else None
        processors: list[LogitsProcessor] = [] if recorder is None else [recorder]
        if sampling.temperature > 0:
            row_seeds = [seed + place for seed in prompts.seeds for place in range(group_size)]
            numbers_BT = torch.stack([numbers_of(seed, sampling.max_new_tokens) for seed in row_seeds])
            processors.append(DrawByRow(numbers_BT, sampling.temperature, sampling.top_p))
        with self.trace() if self.trace is not None else nullcontext() as passes, callers_settings_alone(self.model):
            cache = None
            if sampling.share_prefill:
                cache = prompt_cache(self.model, prompt_ids_PT, prompt_mask_PT)
                cache.batch_repeat_interleave(group_size)
            sequences_BL = self.model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                past_key_values=cache,
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=list(self.end_token_ids),
                pad_token_id=self.pad_token_id,
                synced_gpus=self.ranks_in_step,
                logits_processor=LogitsProcessorList(processors),
            )
        responses = split_responses(sequences_BL[:, ids_BT.shape[1] :], self.end_token_ids)
        if recorder is not None:
            responses = replace(responses, logprobs_BR=recorder.logprobs(sequences_BL))
        if passes is None:
            return responses
        routes_BLNK = assemble_routes(passes, responses.ids_BR.shape, group_size, prefilled=sampling.share_prefill)
        return replace(responses, routes_BLNK=routes_BLNK)


class SampledLogprobs(LogitsProcessor):
    """Keeps the log-probability of every token that `generate` draws; holds one step's [B, V] at a time."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._last_BV: torch.Tensor | None = None
        self._drawn: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._take(input_ids)
        self._last_BV = (scores.float() / self._temperature).log_softmax(-1)
        return scores

    def logprobs(self, sequences_BL: torch.Tensor) -> torch.Tensor:
        """[B, R] of the finished sequences' R new tokens."""
        self._take(sequences_BL)
        self._last_BV = None
        return torch.stack(self._drawn, dim=1)

    def _take(self, ids_BL: torch.Tensor) -> None:
        if self._last_BV is not None:
            self._drawn.append(self._last_BV.gather(1, ids_BL[:, -1:])[:, 0])


def assemble_routes(
    passes: list[dict[int, torch.Tensor]], shape_BR: tuple[int, ...], group_size: int, *, prefilled: bool
) -> torch.Tensor:
    """[B, L, N, K] int16: the routes of prompts and responses from the forward passes of one `generate`.

    `prefilled`: the first pass ran every prompt once, with a column of padding in front and without its last token.
    Passes behind those of the R tokens only kept this rank in step with others.
    """
    n_responses, n_tokens = shape_BR
    first, *steps = [torch.stack([chosen[layer] for layer in sorted(chosen)], dim=1).short() for chosen in passes]
    if prefilled:
        prompts = first.view(n_responses // group_size, -1, *first.shape[1:])[:, 1:]
        prompts = torch.cat([prompts.repeat_interleave(group_size, dim=0), steps[0][:, None]], dim=1)
        steps = steps[1:]
    else:
        prompts = first.view(n_responses, -1, *first.shape[1:])
    unseen = torch.full_like(prompts[:, 0], -1)
    return torch.cat([prompts, torch.stack([*steps[: n_tokens - 1], unseen], dim=1)], dim=1)


def split_responses(ids_BR: torch.Tensor, end_token_ids: tuple[int, ...]) -> Responses:
    """Mask of the real tokens: everything up to and including the first end token."""
    is_end_BR = torch.isin(ids_BR, torch.tensor(end_token_ids, device=ids_BR.device))
    ends_before_BR = is_end_BR.long().cumsum(-1) - is_end_BR.long()
    return Responses(ids_BR=ids_BR, mask_BR=ends_before_BR == 0, ended_B=is_end_BR.any(dim=-1))


def generate_in_batches(
    generate: Callable[[Prompts], Responses], prompts: Prompts, prompts_per_batch: int, pad_token_id: int
) -> Responses:
    """`generate` on `prompts_per_batch` prompts at a time, joined and padded to the longest response."""
    starts = range(0, len(prompts.ids_PT), prompts_per_batch)
    parts = [generate(prompts[start : start + prompts_per_batch]) for start in starts]
    width = max(part.ids_BR.shape[1] for part in parts)
    wide = [widened(part, width, pad_token_id) for part in parts]

    def joined(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        return None if tensors[0] is None else torch.cat(tensors)  # type: ignore[arg-type]

    return Responses(
        ids_BR=torch.cat([part.ids_BR for part in wide]),
        mask_BR=torch.cat([part.mask_BR for part in wide]),
        ended_B=torch.cat([part.ended_B for part in wide]),
        logprobs_BR=joined([part.logprobs_BR for part in wide]),
        versions_B=joined([part.versions_B for part in wide]),
        routes_BLNK=joined([part.routes_BLNK for part in wide]),
    )


def widened(responses: Responses, width: int, pad_token_id: int) -> Responses:
    """The same with room for `width` response tokens, at least as many as there are."""
    missing = width - responses.ids_BR.shape[1]
    logprobs_BR, routes_BLNK = responses.logprobs_BR, responses.routes_BLNK
    pad = torch.nn.functional.pad
    return replace(
        responses,
        ids_BR=pad(responses.ids_BR, (0, missing), value=pad_token_id),
        mask_BR=pad(responses.mask_BR, (0, missing), value=0),
        logprobs_BR=None if logprobs_BR is None else pad(logprobs_BR, (0, missing), value=0),
        routes_BLNK=None if routes_BLNK is None else pad(routes_BLNK, (0, 0, 0, 0, 0, missing), value=-1),
    )
