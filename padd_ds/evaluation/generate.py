"""Responses to many prompts, greedy or sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from padd_ds.data.batches import prompt_batch
from padd_ds.errors import UserError
from padd_ds.hf import end_token_ids
from padd_ds.rollout.settings import callers_settings_alone


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How responses are made, how far, and how many at once."""

    max_new_tokens: int = 512
    batch_size: int = 32
    stop: tuple[str, ...] = ()
    """Texts that end a response, beside the end token; they are cut off."""
    temperature: float = 0.0
    """0 takes the likeliest token; above it, tokens are drawn by torch's global generator."""
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "batch_size"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} {getattr(self, key)} must be at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1")
        if not all(self.stop):
            raise UserError("a stop text must not be empty")


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response."""

    text: str
    tokens: int
    """Tokens generated, the end token included."""
    ended: bool
    """Ended by the end token or a stop text, not by `max_new_tokens`."""


def generate_responses(
    model: Any, tokenizer: Any, prompts: Sequence[str], options: GenerationOptions
) -> list[Response]:
    """One response per complete prompt text, in the order of `prompts`; progress on standard error.

    Batches take prompts of like length, the longest first, so that memory runs out early or never. What is
    sampled depends on the batch size too, what is greedy does not.
    """
    lengths = [len(tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in prompts]
    _check_lengths(lengths, model, options)
    order = sorted(range(len(prompts)), key=lambda row: -lengths[row])
    responses: dict[int, Response] = {}
    with tqdm(total=len(prompts), desc="responses", unit="response", dynamic_ncols=True) as progress:
        for start in range(0, len(order), options.batch_size):
            rows = order[start : start + options.batch_size]
            batch = _generate(model, tokenizer, [prompts[row] for row in rows], options)
            responses.update(zip(rows, batch, strict=True))
            progress.update(len(rows))
    return [responses[row] for row in range(len(prompts))]


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any, prompts: Sequence[str], options: GenerationOptions) -> list[Response]:
    batch = prompt_batch(prompts, tokenizer, max_prompt_length=2**31)
    end_ids = end_token_ids(model, tokenizer)
    sampled = options.temperature > 0
    config = GenerationConfig(
        do_sample=sampled,
        temperature=options.temperature if sampled else None,
        top_p=options.top_p if sampled else None,
        top_k=0 if sampled else None,
        num_beams=1,
        max_new_tokens=options.max_new_tokens,
        eos_token_id=end_ids,
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=list(options.stop) or None,
    )
    with callers_settings_alone(model):
        ids_BT = model.generate(
            input_ids=batch["input_ids_BT"].to(model.device),
            attention_mask=batch["attention_mask_BT"].to(model.device),
            generation_config=config,
            tokenizer=tokenizer if options.stop else None,
        )
    width = batch["input_ids_BT"].shape[1]
    return [_response(ids, end_ids, tokenizer, options) for ids in ids_BT[:, width:].tolist()]


def _response(ids: list[int], end_ids: list[int], tokenizer: Any, options: GenerationOptions) -> Response:
    end = next((place for place, token in enumerate(ids) if token in end_ids), None)
    kept = ids if end is None else ids[:end]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    stops = [place for stop in options.stop if (place := text.find(stop)) >= 0]
    if stops:
        # Rows that stopped first are padded while others go on, so count what the text needs.
        kept = kept[: _tokens_until_stop(kept, tokenizer, options.stop)]
        return Response(text=text[: min(stops)], tokens=len(kept), ended=True)
    return Response(text=text, tokens=len(kept) + (end is not None), ended=end is not None)


def _tokens_until_stop(ids: list[int], tokenizer: Any, stop: Sequence[str]) -> int:
    for length in range(1, len(ids)):
        text = tokenizer.decode(ids[:length], skip_special_tokens=True)
        if any(word in text for word in stop):
            return length
    return len(ids)


def _check_lengths(lengths: Sequence[int], model: Any, options: GenerationOptions) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(lengths, default=0)
    if lengths and min(lengths) == 0:
        raise UserError("a prompt has no tokens; choose a template that adds some text")
    if limit is not None and longest + options.max_new_tokens > limit:
        row = lengths.index(longest) + 1
        raise UserError(
            f"problem {row} has {longest} prompt tokens, with max_new_tokens {options.max_new_tokens} "
            f"more than the model's {limit} positions; lower max_new_tokens or drop the problem"
        )
