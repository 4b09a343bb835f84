import itertools

import pytest

from padd_ds.data.answers import AnswerFormat
from padd_ds.data.problems import Problem
from padd_ds.evaluation.generate import GenerationOptions
from padd_ds.evaluation.kept import ScoredResponse
from padd_ds.evaluation.scoring import EvaluationOptions, evaluate_problems, pass_at_k, summarise
from tests.data.characters import VOCABULARY, character_tokenizer
from tests.tiny import tiny_student


def scored(**changes) -> ScoredResponse:
    base = {"problem": 0, "sample": 0, "question": "q", "gold": "1", "subject": None, "level": None}
    base |= {"response": "1", "extracted": "1"}
    base |= {"correct": True, "status": "ok", "tokens": 4, "ended": True}
    return ScoredResponse(**base | changes)


def test_headline_counts_what_its_names_say():
    result = summarise(
        [
            scored(subject="sum", level="1"),
            scored(subject="sum", level="2", correct=False, ended=False, tokens=8),
            scored(subject="product", correct=False, status="no_answer"),
            scored(subject="product", correct=False, status="timeout"),
            scored(subject="product", correct=False, status="gold_unparsable", ended=False, tokens=99),
        ]
    )
    assert result.pass_at_1 == 0.25
    assert (result.problems, result.correct, result.truncated) == (4, 1, 1)
    assert (result.unparsed, result.unchecked, result.gold_unparsable, result.tokens_mean) == (1, 1, 1, 5.0)
    assert result.by_subject == {"product": (0, 2), "sum": (1, 2)}
    assert result.by_level == {"1": (1, 1), "2": (0, 1)}
    assert result.interval_95[0] < 0.25 < result.interval_95[1]
    assert len(result.responses) == 5


def test_nothing_countable_gives_the_widest_interval():
    result = summarise([scored(status="gold_unparsable", correct=False)])
    assert (result.pass_at_1, result.interval_95, result.problems) == (0.0, (0.0, 1.0), 0)


def test_samples_are_averaged_over_problems():
    wrong, unreadable = scored(correct=False), scored(correct=False, status="gold_unparsable")
    result = summarise([scored(), scored(), scored(), wrong, wrong, wrong, unreadable, wrong], samples=2)
    assert (result.pass_at_1, result.correct, result.problems, result.gold_unparsable) == (0.5, 3, 3, 1)
    # Of two drawn, one right: the two, in any order, hold it; shares as below.
    assert result.pass_at_k == {1: 0.5, 2: pytest.approx(2 / 3)}
    # Shares 1, 1/2, 0: standard deviation 1/2, standard error 1/2 / sqrt(3).
    assert result.interval_95 == (0.0, 1.0)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_model_is_scored_by_what_it_says(batch_size):
    model, tokenizer = tiny_student(vocabulary=len(VOCABULARY)), character_tokenizer()
    options = EvaluationOptions(
        answer_format=AnswerFormat(name="last_number"),
        generation=GenerationOptions(max_new_tokens=6, batch_size=batch_size),
    )
    questions = [Problem(question=text, answer="-1") for text in ("1 + 2", "12 - 7", "7")]
    first = evaluate_problems(model, tokenizer, questions, options)
    assert first.correct == 0
    said = [response.extracted for response in first.responses]
    assert all(said)
    right = [Problem(question=row.question, answer=text) for row, text in zip(questions, said, strict=True)]
    again = evaluate_problems(model, tokenizer, [*right[:2], questions[2]], options)
    assert [response.correct for response in again.responses] == [True, True, False]
    assert [response.gold for response in again.responses] == [*said[:2], "-1"]


def test_sampled_responses_differ_and_repeat_by_seed():
    model, tokenizer = tiny_student(vocabulary=len(VOCABULARY)), character_tokenizer()

    def said(seed: int) -> list[str]:
        options = EvaluationOptions(
            answer_format=AnswerFormat(name="last_number"),
            generation=GenerationOptions(max_new_tokens=6, batch_size=4, temperature=1.0, seed=seed),
            samples=3,
        )
        problems = [Problem(question="1 + 2", answer="3"), Problem(question="7", answer="7")]
        return [response.response for response in evaluate_problems(model, tokenizer, problems, options).responses]

    assert len(said(0)) == 6 and len(set(said(0)[:3])) > 1
    assert said(0) == said(0) != said(1)


@pytest.mark.parametrize(
    ("samples", "correct", "k"), [(5, 0, 2), (5, 2, 1), (5, 2, 3), (5, 4, 2), (5, 5, 5), (6, 3, 4)]
)
def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_one(samples, correct, k):
    choices = list(itertools.combinations(range(samples), k))
    holding = sum(any(place < correct for place in choice) for choice in choices)
    assert pass_at_k(samples, correct, k) == pytest.approx(holding / len(choices))


def test_pass_at_k_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="3 right of 2"):
        pass_at_k(2, 3, 1)
