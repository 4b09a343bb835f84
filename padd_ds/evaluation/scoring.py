"""A model's Pass@1 on a list of problems."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from padd_ds.data.answers import AnswerFormat
from padd_ds.data.problems import Problem
from padd_ds.data.prompts import PromptTemplate, render
from padd_ds.evaluation.generate import GenerationOptions, Response, greedy_responses
from padd_ds.evaluation.intervals import wilson_interval
from padd_ds.rollout.verify import AnswerChecker, Verdict


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How problems are put and responses read."""

    template: PromptTemplate = field(default_factory=PromptTemplate)
    answer_format: AnswerFormat = field(default_factory=AnswerFormat)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
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
    """Pass@1 with its 95 % Wilson interval, and every response.

    Problems whose gold answer cannot be parsed are counted apart: they are in none of the other numbers.
    """

    pass_at_1: float
    """Share of right answers among `problems`; 0 if there are none."""
    interval_95: tuple[float, float]
    problems: int
    correct: int
    truncated: int
    """Responses cut off by max_new_tokens."""
    unparsed: int
    """Responses without an answer, or whose check failed (status no_answer, timeout, error)."""
    gold_unparsable: int
    tokens_mean: float
    """Generated tokens per response."""
    by_subject: dict[str, tuple[int, int]]
    """Right answers and problems of each subject, where problems have one."""
    responses: list[ScoredResponse] = field(repr=False)


def evaluate_problems(
    model: Any, tokenizer: Any, problems: Sequence[Problem], options: EvaluationOptions
) -> EvaluationResult:
    """Greedy responses to `problems`, checked. Evaluation routing is the model's own, without noise."""
    prompts = [render(options.template, problem, tokenizer) for problem in problems]
    responses = greedy_responses(model, tokenizer, prompts, options.generation)
    pairs = [(response.text, problem.answer) for response, problem in zip(responses, problems, strict=True)]
    with AnswerChecker(
        options.answer_format, workers=options.check_workers, timeout_s=options.check_timeout_s
    ) as checker:
        verdicts = checker.check(pairs)
    scored = zip(problems, responses, verdicts, strict=True)
    return summarise([_scored(problem, response, verdict) for problem, response, verdict in scored])


def summarise(responses: Sequence[ScoredResponse]) -> EvaluationResult:
    """The headline numbers of scored responses."""
    counted = [response for response in responses if response.status != "gold_unparsable"]
    correct = sum(response.correct for response in counted)
    return EvaluationResult(
        pass_at_1=correct / max(len(counted), 1),
        interval_95=wilson_interval(correct, len(counted)),
        problems=len(counted),
        correct=correct,
        truncated=sum(not response.ended for response in counted),
        unparsed=sum(response.status != "ok" for response in counted),
        gold_unparsable=len(responses) - len(counted),
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
