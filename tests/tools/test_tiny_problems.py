"""The generated problems: right answers, right working, and no question in both splits."""

import json
import math
import random
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from tools import tiny_problems
from tools.tiny_problems import (
    ANSWER_PATTERN,
    LEVELS,
    SPLITS,
    SUBJECTS,
    Problem,
    distinct_problems,
    problem_stream,
    take,
    write_problems,
)


def solve(problem: Problem) -> int:
    """The answer by plain arithmetic from the question's text alone."""
    numbers = [int(text) for text in re.findall(r"-?\d+", problem.question)]
    if problem.subject == "linear_equation":
        slope, shift, value = numbers
        shift = shift if "plus" in problem.question else -shift
        assert (value - shift) % slope == 0
        return (value - shift) // slope
    if problem.subject == "quadratic_sequence":
        b, c, d = numbers[1:]
        return d + (d - c) + ((d - c) - (c - b))
    left, right = numbers
    return {
        "addition": left + right,
        "subtraction": left - right,
        "multiplication": left * right,
        "modulo": left % right,
        "gcd": math.gcd(left, right),
    }[problem.subject]


def working_holds(problem: Problem) -> bool:
    """Whether every equation in the working is true (`a>b` stands for the remainder after the divisor)."""
    working = problem.solution.split("#")[0]
    for step in working.split(","):
        if ">" in step:
            value, rest = map(int, step.split(">"))
            if value % int(problem.question.rstrip("?").split()[-1]) != rest:
                return False
        elif "=" in step:
            left, right = step.split("=")
            terms = re.fullmatch(r"(-?\d+)(?:([*/+-])(\d+))(?:([+-])(\d+))?", left)
            assert terms is not None, step
            total = apply(int(terms[1]), terms[2], int(terms[3]))
            total = apply(total, terms[4], int(terms[5])) if terms[4] else total
            if total != int(right):
                return False
    return True


def apply(left: int, operator: str, right: int) -> int:
    if operator == "/":
        quotient, rest = divmod(left, right)
        assert rest == 0
        return quotient
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def test_every_answer_is_right_and_ends_its_solution():
    for split in SPLITS:
        for problem in take(problem_stream(split, 0, levels=LEVELS), 4200):
            assert int(problem.answer) == solve(problem), problem
            assert re.search(ANSWER_PATTERN, problem.solution)[1] == problem.answer
            assert problem.solution.count("#") == 1


def test_worked_solutions_hold_step_by_step():
    worked = [problem for problem in take(problem_stream("train", 1, levels=LEVELS), 8400) if problem.style == "worked"]
    assert all(working_holds(problem) for problem in worked)
    assert len({problem.subject for problem in worked}) == len(SUBJECTS)


@pytest.mark.parametrize(("levels", "most"), [((1, 2, 3), 46), ((4,), 79)])
def test_solutions_are_as_long_as_learners_have_room_for(levels: tuple[int, ...], most: int):
    assert max(len(problem.solution) for problem in take(problem_stream("train", 2, levels=levels), 21000)) <= most


def test_worked_solutions_of_level_4_are_long():
    lengths = [len(problem.solution) for problem in take(problem_stream("train", 2, 0.0, levels=(4,)), 7000)]
    assert sum(lengths) / len(lengths) > 40


def test_no_question_is_in_two_splits():
    found = {split: {p.question for p in take(problem_stream(split, 0, levels=LEVELS), 9000)} for split in SPLITS}
    assert sum(map(len, found.values())) == len(set.union(*found.values()))


@pytest.mark.parametrize("level", LEVELS)
def test_levels_are_those_asked_for_and_grow(level: int):
    def largest(problem: Problem) -> int:
        return max(int(number) for number in re.findall(r"\d+", problem.question))

    problems = take(problem_stream("train", 0, levels=(level,)), 1400)
    assert {problem.level for problem in problems} == {level}
    if level > 1:
        lower = take(problem_stream("train", 0, levels=(level - 1,)), 1400)
        assert sum(map(largest, problems)) > 1.2 * sum(map(largest, lower))


def test_questions_stay_apart_when_only_words_and_digits_are_kept():
    problems = take(problem_stream("train", 0), 7000)
    bare = {}
    for problem in problems:
        words = " ".join(re.findall(r"\w+", problem.question))
        assert bare.setdefault(words, problem.question) == problem.question


def test_same_seed_gives_the_same_problems_and_another_seed_others():
    assert take(problem_stream("train", 3), 100) == take(problem_stream("train", 3), 100)
    assert take(problem_stream("train", 3), 100) != take(problem_stream("train", 4), 100)


@pytest.mark.parametrize("bare_share", [0.0, 0.3, 1.0])
def test_styles_come_in_the_share_asked_for(bare_share: float):
    styles = Counter(problem.style for problem in take(problem_stream("train", 0, bare_share), 2000))
    assert styles["bare"] / 2000 == pytest.approx(bare_share, abs=0.05 if 0 < bare_share < 1 else 0)


def test_bare_style_is_the_answer_alone():
    for problem in take(problem_stream("train", 0), 700):
        assert (problem.solution == f"#{problem.answer}") == (problem.style == "bare")


@pytest.mark.parametrize(("split", "number"), [("train", 200), ("test", 60)])
def test_every_subject_gives_the_number_of_distinct_problems_asked_for(split: str, number: int):
    problems = distinct_problems(split, number, seed=0)
    assert len({problem.question for problem in problems}) == len(problems)
    assert Counter(problem.subject for problem in problems) == dict.fromkeys(SUBJECTS, number)


def test_a_small_subject_gives_all_that_it_has(monkeypatch):
    monkeypatch.setattr(tiny_problems, "SUBJECTS", {"modulo": SUBJECTS["modulo"]})
    questions = {problem.question for split in SPLITS for problem in distinct_problems(split, 10_000, seed=0)}
    assert questions == {f"{left} mod {right}?" for left in range(10, 100) for right in range(2, 6)}


def test_subjects_draw_from_the_generator_alone():
    for sketch in SUBJECTS.values():
        assert sketch(random.Random(5), 3) == sketch(random.Random(5), 3)


def test_written_rows_read_back(tmp_path: Path):
    problems = distinct_problems("test", 5, seed=0)
    write_problems(tmp_path / "test.jsonl", problems)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert rows == [asdict(problem) for problem in problems]
