"""A model's Pass@1 and Pass@k on a list of problems."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import comb
from statistics import fmean
from typing import Any

from padd_ds.data.answers import AnswerFormat
from padd_ds.data.problems import Problem
from padd_ds.data.prompts import PromptTemplate, render
from padd_ds.evaluation.generate import GenerationOptions, Response, check_prompts, generate_batches
from padd_ds.evaluation.intervals import mean_interval, wilson_interval
from padd_ds.evaluation.kept import KeptResponses, Key, ScoredResponse, Share
from padd_ds.rollout.verify import AnswerChecker, Verdict
from padd_ds.seeds import derive_seed

Draw = Callable[[Sequence[str], GenerationOptions, Sequence[int], bool], Iterator[dict[int, Response]]]
"""As `generate_batches` from its third argument on."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How problems are put and responses read."""

    template: PromptTemplate = field(default_factory=PromptTemplate)
    answer_format: AnswerFormat = field(default_factory=AnswerFormat)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    samples: int = 1
    """Responses per problem; more than one makes sense where generation.temperature is above 0."""
    check_workers: int = 1
    check_timeout_s: float = 5.0


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Pass@1 with its 95 % interval, and every response.

    Problems whose gold answer cannot be parsed are counted apart: they are in none of the other numbers.
    """

    pass_at_1: float
    """Share of right answers among all responses to `problems`; 0 if there are none."""
    interval_95: tuple[float, float]
    """Wilson's for one response per problem; for more, the normal one over the problems' own shares."""
    pass_at_k: dict[int, float]
    """Mean over problems of the unbiased estimate; k = 1, 2, 4, ... and `samples`."""
    problems: int
    samples: int
    """Responses per problem."""
    correct: int
    """Right responses."""
    truncated: int
    """Responses cut off by max_new_tokens."""
    unparsed: int
    """Responses in which no answer was found; cut off ones among them."""
    unchecked: int
    """Responses whose comparison took too long or failed; they count as wrong."""
    gold_unparsable: int
    """Problems left out."""
    tokens_mean: float
    """Generated tokens per response."""
    by_subject: dict[str, tuple[int, int]]
    """Right responses and responses of each subject, where problems have one."""
    by_level: dict[str, tuple[int, int]]
    """The same of each level."""
    responses: list[ScoredResponse] = field(repr=False)
    """In the order of the problems, those to one problem next to each other."""


def evaluate_problems(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    options: EvaluationOptions,
    kept: KeptResponses | None = None,
    draw: Draw | None = None,
) -> EvaluationResult:
    """Responses to `problems`, checked; by `draw`, else by the model. Evaluation routing is its own, without noise.

    What `kept` has already is not asked again. On several ranks, all of which call this, each has its share of the
    rest and all return the same result. In fp32 it is that of any other batch size and number of ranks. UserError as
    `check_prompts`.
    """
    kept = kept or KeptResponses()
    prompts = [render(options.template, problem, tokenizer) for problem in problems]
    check_prompts(prompts, model, tokenizer, options.generation)
    first = 1 if options.generation.temperature > 0 else 0
    keys = [(place, first + sample) for place in range(len(problems)) for sample in range(options.samples)]
    draw = draw or partial(generate_batches, model, tokenizer)
    for batch in _scored_batches(draw, problems, prompts, kept.missing(keys), options, kept.share):
        kept.add(batch)
    return summarise(kept.all_of(keys), options.samples)


def _scored_batches(
    draw: Draw,
    problems: Sequence[Problem],
    prompts: Sequence[str],
    keys: Sequence[Key],
    options: EvaluationOptions,
    share: Share,
) -> Iterator[list[ScoredResponse]]:
    """This rank's share of the responses of `keys`, batch by batch."""
    # Long prompts and short ones for every rank.
    mine = sorted(keys, key=lambda key: -len(prompts[key[0]]))[share.rank :: share.world]
    seeds = [derive_seed(options.generation.seed, *key) for key in mine]
    asked = [prompts[place] for place, _ in mine]
    with AnswerChecker(
        options.answer_format, workers=options.check_workers, timeout_s=options.check_timeout_s
    ) as checker:
        for batch in draw(asked, options.generation, seeds, share.rank == 0):
            rows = [(mine[row], problems[mine[row][0]], response) for row, response in batch.items()]
            verdicts = checker.check(
                [(response.text, problem.answer) for _, problem, response in rows],
                [problem.tolerance for _, problem, _ in rows],
            )
            yield [_scored(*row, verdict) for row, verdict in zip(rows, verdicts, strict=True)]


def summarise(responses: Sequence[ScoredResponse], samples: int = 1) -> EvaluationResult:
    """The headline numbers of scored responses, `samples` to each problem in a row."""
    asked = [responses[start : start + samples] for start in range(0, len(responses), samples)]
    kept = [group for group in asked if all(response.status != "gold_unparsable" for response in group)]
    counted = [response for group in kept for response in group]
    right = [sum(response.correct for response in group) for group in kept]
    shares = [count / samples for count in right]
    return EvaluationResult(
        pass_at_1=sum(right) / max(len(counted), 1),
        interval_95=wilson_interval(sum(right), len(counted)) if samples == 1 else mean_interval(shares),
        pass_at_k={k: fmean([pass_at_k(samples, count, k) for count in right] or [0.0]) for k in _sizes(samples)},
        problems=len(kept),
        samples=samples,
        correct=sum(right),
        truncated=sum(not response.ended for response in counted),
        unparsed=sum(response.status == "no_answer" for response in counted),
        unchecked=sum(response.status in ("timeout", "error") for response in counted),
        gold_unparsable=len(asked) - len(kept),
        tokens_mean=sum(response.tokens for response in counted) / max(len(counted), 1),
        by_subject=_by(lambda response: response.subject, counted),
        by_level=_by(lambda response: response.level, counted),
        responses=list(responses),
    )


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that at least one of k of the samples is right, k drawn without replacement.

    The unbiased estimate of Pass@k: 1 - C(n - c, k) / C(n, k). Source: Chen et al. 2021 (arXiv 2107.03374), eq. 1.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"{correct} right of {samples}, {k} taken")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def _sizes(samples: int) -> list[int]:
    """The k that Pass@k is told for: powers of two, and all samples."""
    return sorted({2**power for power in range(samples.bit_length()) if 2**power <= samples} | {samples})


def _scored(key: Key, problem: Problem, response: Response, verdict: Verdict) -> ScoredResponse:
    return ScoredResponse(
        problem=key[0],
        sample=key[1],
        question=problem.question,
        gold=problem.answer,
        subject=problem.subject,
        level=problem.level,
        response=response.text,
        extracted=verdict.extracted,
        correct=verdict.correct,
        status=verdict.status,
        tokens=response.tokens,
        ended=response.ended,
    )


def _by(
    label: Callable[[ScoredResponse], str | None], responses: Sequence[ScoredResponse]
) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for response in responses:
        if (name := label(response)) is not None:
            right, total = counts.get(name, (0, 0))
            counts[name] = (right + response.correct, total + 1)
    return dict(sorted(counts.items()))
