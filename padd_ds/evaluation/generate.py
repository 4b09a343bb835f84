"""Responses to many prompts, greedy or sampled.

Legend: B rows of a batch, T tokens.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessorList

from padd_ds.data.batches import prompt_batch
from padd_ds.errors import UserError
from padd_ds.evaluation.rolling import SEGMENT, RollingBatch, can_roll
from padd_ds.hf import end_token_ids
from padd_ds.rollout.drawing import DrawByRow, numbers_of
from padd_ds.rollout.settings import callers_settings_alone
from padd_ds.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How responses are made, how far, and how many at once."""

    max_new_tokens: int = 512
    batch_size: int = 32
    stop: tuple[str, ...] = ()
    """Texts that end a response, beside the end token; they are cut off."""
    temperature: float = 0.0
    """0 takes the likeliest token; above it, tokens are drawn."""
    top_p: float = 1.0
    seed: int = 0
    """Of what is drawn: each response has its own from it and its place."""

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

    In fp32 the responses are those of any other batch size, the drawn ones too.
    """
    check_prompts(prompts, model, tokenizer, options)
    seeds = [derive_seed(options.seed, row) for row in range(len(prompts))]
    responses: dict[int, Response] = {}
    for batch in generate_batches(model, tokenizer, prompts, options, seeds):
        responses.update(batch)
    return [responses[row] for row in range(len(prompts))]


def generate_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    options: GenerationOptions,
    seeds: Sequence[int],
    show_progress: bool = True,
) -> Iterator[dict[int, Response]]:
    """As they are done, the responses by the row of their prompts. `seeds`: of what is drawn, one for each prompt.

    Prompts come in the longest first, so that memory runs out early or never. Where the model's cache allows it the
    next ones take the places of finished responses, else a whole batch follows the other.
    """
    lengths = _lengths(prompts, tokenizer)
    order = sorted(range(len(prompts)), key=lambda row: -lengths[row])
    work = _Work(model=model, tokenizer=tokenizer, prompts=prompts, options=options, seeds=seeds)
    with progress_bar(len(prompts), show_progress) as progress:
        for responses in work.rolling(order) if can_roll(model) else work.batch_after_batch(order):
            yield responses
            progress.update(len(responses))


def progress_bar(total: int, shown: bool) -> Any:
    """Of responses, on standard error: how many, how fast, how long still."""
    return tqdm(total=total, desc="responses", unit="response", dynamic_ncols=True, disable=not shown)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Prompts and how they are answered."""

    model: Any
    tokenizer: Any
    prompts: Sequence[str]
    options: GenerationOptions
    seeds: Sequence[int]

    def rolling(self, order: Sequence[int]) -> Iterator[dict[int, Response]]:
        """Finished responses, a batch that is always full as long as prompts wait. `order`: of the prompts' rows."""
        options, longest, end_ids = self.options, self.options.max_new_tokens, self._end_ids
        waiting, numbers = deque(order), dict[int, torch.Tensor]()
        # Some places at once: prompts are read faster together, and answers judged.
        some = max(options.batch_size // 8, 1)

        def draw(made: Mapping[int, int], n_steps: int) -> DrawByRow:
            coming = [numbers[row][place : place + n_steps] for row, place in made.items()]
            return DrawByRow(torch.stack(coming), options.temperature, options.top_p)

        batch = RollingBatch(self.model, self._settings(), longest, draw if options.temperature > 0 else None)
        done: dict[int, Response] = {}
        while waiting or len(batch):
            free = min(options.batch_size - len(batch), len(waiting))
            if free and (free == len(waiting) or free >= some):
                rows = [waiting.popleft() for _ in range(free)]
                if options.temperature > 0:
                    numbers |= {row: numbers_of(self.seeds[row], longest) for row in rows}
                batch.admit(rows, *self._encoded(rows))
            read = {
                row: read_response(ids, end_ids, self.tokenizer, options)
                for row, ids in batch.grow().items()
                if _may_be_done(ids, end_ids, self.tokenizer, options)
            }
            ended = {row: response for row, response in read.items() if response.ended or response.tokens == longest}
            if ended:
                batch.drop(set(ended))
                done |= ended
            if len(done) >= some or (done and not len(batch)):
                yield done
                done = {}

    def batch_after_batch(self, order: Sequence[int]) -> Iterator[dict[int, Response]]:
        """The responses of each batch when all of it are done."""
        for start in range(0, len(order), self.options.batch_size):
            rows = order[start : start + self.options.batch_size]
            yield dict(zip(rows, self._whole_batch(rows), strict=True))

    @torch.inference_mode()
    def _whole_batch(self, rows: Sequence[int]) -> list[Response]:
        options, config = self.options, self._settings()
        config.max_new_tokens, config.stop_strings = options.max_new_tokens, list(options.stop) or None
        draws = []
        if options.temperature > 0:
            numbers_BT = torch.stack([numbers_of(self.seeds[row], options.max_new_tokens) for row in rows])
            draws.append(DrawByRow(numbers_BT, options.temperature, options.top_p))
        ids_BT, mask_BT = self._encoded(rows)
        with callers_settings_alone(self.model):
            sequences_BT = self.model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=config,
                tokenizer=self.tokenizer if options.stop else None,
                logits_processor=LogitsProcessorList(draws),
            )
        responses = sequences_BT[:, ids_BT.shape[1] :].tolist()
        return [read_response(ids, self._end_ids, self.tokenizer, options) for ids in responses]

    def _encoded(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of their prompts, left-padded."""
        batch = prompt_batch([self.prompts[row] for row in rows], self.tokenizer, max_prompt_length=2**31)
        return batch["input_ids_BT"].to(self.model.device), batch["attention_mask_BT"].to(self.model.device)

    @property
    def _end_ids(self) -> list[int]:
        return end_token_ids(self.model, self.tokenizer)

    def _settings(self) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            eos_token_id=self._end_ids,
            pad_token_id=self.tokenizer.pad_token_id,
        )


def _may_be_done(ids: list[int], end_ids: Collection[int], tokenizer: Any, options: GenerationOptions) -> bool:
    """Whether an end is seen in the last SEGMENT tokens of a response, whose whole text is read only then."""
    if len(ids) == options.max_new_tokens or any(token in end_ids for token in ids[-SEGMENT:]):
        return True
    if not options.stop:
        return False
    # A stop text may have begun before them; no character takes more tokens than its four bytes.
    tail = tokenizer.decode(ids[-SEGMENT - 4 * max(map(len, options.stop)) :], skip_special_tokens=True)
    return any(stop in tail for stop in options.stop)


def read_response(ids: list[int], end_ids: Collection[int], tokenizer: Any, options: GenerationOptions) -> Response:
    """The text of generated tokens up to the first end token or stop text."""
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


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """The tokens of a complete prompt text, none added."""
    return list(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)


def longest_prompt(prompts: Sequence[str], tokenizer: Any) -> int:
    """In tokens."""
    return max(_lengths(prompts, tokenizer), default=0)


def check_prompts(prompts: Sequence[str], model: Any, tokenizer: Any, options: GenerationOptions) -> None:
    """UserError for a prompt without tokens, or with more than the model has positions for."""
    lengths = _lengths(prompts, tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(lengths, default=0)
    if lengths and min(lengths) == 0:
        raise UserError("a prompt has no tokens; choose a template that adds some text")
    if lengths and limit is not None and longest + options.max_new_tokens > limit:
        row = lengths.index(longest) + 1
        raise UserError(
            f"problem {row} has {longest} prompt tokens, with max_new_tokens {options.max_new_tokens} "
            f"more than the model's {limit} positions; lower max_new_tokens or drop the problem"
        )


def _lengths(prompts: Sequence[str], tokenizer: Any) -> list[int]:
    return [len(prompt_ids(prompt, tokenizer)) for prompt in prompts]
