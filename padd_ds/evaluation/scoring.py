"""A model's Pass@1 on a list of problems."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from padd_ds.data.answers import AnswerFormat
from padd_ds.data.problems import Problem
from padd_ds.data.prompts import PromptTemplate, render
from padd_ds.evaluation.generate import GenerationOptions, Response, generate_responses
from padd_ds.evaluation.intervals import mean_interval, wilson_interval
from padd_ds.rollout.verify import AnswerChecker, Verdict


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
class ScoredResponse:
    """One problem, what the model answered, and the verdict."""

    question: str
    gold: str
    subject: str | None
    response: str
    extracted: str
    correct: bool
    status: str
    tokens: int
    ended: bool


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Pass@1 with its 95 % interval, and every response.

    Problems whose gold answer cannot be parsed are counted apart: they are in none of the other numbers.
    """

    pass_at_1: float
    """Share of right answers among all responses to `problems`; 0 if there are none."""
    interval_95: tuple[float, float]
    """Wilson's for one response per problem; for more, the normal one over the problems' own shares."""
    problems: int
    samples: int
    """Responses per problem."""
    correct: int
    """Right responses."""
    truncated: int
    """Responses cut off by max_new_tokens."""
    unparsed: int
    """Responses without an answer, or whose check failed (status no_answer, timeout, error)."""
    gold_unparsable: int
    """Problems left out."""
    tokens_mean: float
    """Generated tokens per response."""
    by_subject: dict[str, tuple[int, int]]
    """Right responses and responses of each subject, where problems have one."""
    responses: list[ScoredResponse] = field(repr=False)
    """In the order of the problems, those to one problem next to each other."""


def evaluate_problems(
    model: Any, tokenizer: Any, problems: Sequence[Problem], options: EvaluationOptions
) -> EvaluationResult:
    """Responses to `problems`, checked. Evaluation routing is the model's own, without noise."""
    asked = [problem for problem in problems for _ in range(options.samples)]
    prompts = [render(options.template, problem, tokenizer) for problem in asked]
    responses = generate_responses(model, tokenizer, prompts, options.generation)
    pairs = [(response.text, problem.answer) for response, problem in zip(responses, asked, strict=True)]
    with AnswerChecker(
        options.answer_format, workers=options.check_workers, timeout_s=options.check_timeout_s
    ) as checker:
        verdicts = checker.check(pairs)
    scored = zip(asked, responses, verdicts, strict=True)
    return summarise([_scored(problem, response, verdict) for problem, response, verdict in scored], options.samples)


def summarise(responses: Sequence[ScoredResponse], samples: int = 1) -> EvaluationResult:
    """The headline numbers of scored responses, `samples` to each problem in a row."""
    asked = [responses[start : start + samples] for start in range(0, len(responses), samples)]
    kept = [group for group in asked if all(response.status != "gold_unparsable" for response in group)]
    counted = [response for group in kept for response in group]
    correct = sum(response.correct for response in counted)
    shares = [sum(response.correct for response in group) / samples for group in kept]
    return EvaluationResult(
        pass_at_1=correct / max(len(counted), 1),
        interval_95=wilson_interval(correct, len(counted)) if samples == 1 else mean_interval(shares),
        problems=len(kept),
        samples=samples,
        correct=correct,
        truncated=sum(not response.ended for response in counted),
        unparsed=sum(response.status != "ok" for response in counted),
        gold_unparsable=len(asked) - len(kept),
        tokens_mean=sum(response.tokens for response in counted) / max(len(counted), 1),
        by_subject=_by_subject(counted),
        responses=list(responses),
    )


def _scored(problem: Problem, response: Response, verdict: Verdict) -> ScoredResponse:
    return ScoredResponse(
        question=problem.question,
        gold=problem.answer,
        subject=problem.subject,
        response=response.text,
        extracted=verdict.extracted,
        correct=verdict.correct,
        status=verdict.status,
        tokens=response.tokens,
        ended=response.ended,
    )


def _by_subject(responses: Sequence[ScoredResponse]) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for response in responses:
        if response.subject is not None:
            right, total = counts.get(response.subject, (0, 0))
            counts[response.subject] = (right + response.correct, total + 1)
    return dict(sorted(counts.items()))
