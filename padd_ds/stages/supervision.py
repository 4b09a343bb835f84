"""What a step of the warm-up learns from: answers to problems, or packed documents.

Both are pure functions of the step, so that a resumed run goes on at the sequence where it stopped.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from padd_ds.config.schema import RunConfig
from padd_ds.data.batches import SupervisedBatch, batch_indices, packed_batch, supervised_batch
from padd_ds.data.blend import Blend
from padd_ds.data.problems import Problem
from padd_ds.data.prompts import render
from padd_ds.stages.materials import prompt_template, supervised_target


class Supervision(Protocol):
    """Where a warm-up's batches come from."""

    def micro_batches(self, step: int, rank: int, world: int) -> list[SupervisedBatch]:
        """This rank's share of the batch of a step; all ranks together have the same batch whatever their number."""


@dataclass(frozen=True, kw_only=True)
class ProblemSupervision:
    """Problems with their targets, those of like length together, on all ranks at once: where ranks share experts, each
    layer waits for the rank with the most tokens."""

    problems: list[Problem]
    tokenizer: Any
    config: RunConfig

    def micro_batches(self, step: int, rank: int, world: int) -> list[SupervisedBatch]:
        mine = sorted(
            self.drawn(step), key=lambda problem: len(problem.question) + len(problem.solution or problem.answer)
        )[rank::world]
        size = self.config.micro_batch_size
        return [self.batch(mine[start : start + size]) for start in range(0, len(mine), size)]

    def drawn(self, step: int) -> list[Problem]:
        """The problems of a step, in the order in which they are drawn."""
        rows = batch_indices(step, self.config.warmup.batch_size, len(self.problems), self.config.seed)
        return [self.problems[row] for row in rows]

    def batch(self, problems: list[Problem]) -> SupervisedBatch:
        """Problems with their targets as training reads them."""
        data = self.config.data
        template = prompt_template(data)
        prompts = [render(template, problem, self.tokenizer) for problem in problems]
        targets = [supervised_target(data, problem) for problem in problems]
        return supervised_batch(prompts, targets, self.tokenizer, data.max_prompt_tokens + data.max_target_tokens)


@dataclass(frozen=True, kw_only=True)
class CorpusSupervision:
    """Packed documents of the blended corpora."""

    blend: Blend
    pad_token_id: int
    config: RunConfig

    def micro_batches(self, step: int, rank: int, world: int) -> list[SupervisedBatch]:
        batch, size = self.config.warmup.batch_size, self.config.micro_batch_size
        mine = self.blend.sequences(range(step * batch, (step + 1) * batch)[rank::world])
        return [packed_batch(mine[start : start + size], self.pad_token_id) for start in range(0, len(mine), size)]
