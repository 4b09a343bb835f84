import random
from collections import Counter

import pytest

from padd_ds.data.problems import Problem
from padd_ds.data.split import (
    DEFAULT_FRACTIONS,
    decontaminate,
    normalise_question,
    part_of,
    split_problems,
)
from padd_ds.errors import UserError


def problems(count: int) -> list[Problem]:
    return [Problem(question=f"What is {n} + 7?", answer=str(n + 7)) for n in range(count)]


def test_shares_come_out_as_asked():
    parts = split_problems(problems(5000)).parts
    for part, share in DEFAULT_FRACTIONS.items():
        assert abs(len(parts[part]) / 5000 - share) < 0.02


def test_parts_share_nothing_and_lose_nothing():
    split = split_problems(problems(1000))
    counts = Counter(problem.question for part in split.parts.values() for problem in part)
    assert set(counts.values()) == {1}
    assert len(counts) == 1000


def test_part_depends_neither_on_order_nor_on_growth():
    small, large = problems(300), problems(600)
    random.Random(0).shuffle(large)
    before, after = split_problems(small).parts, split_problems(large).parts
    for part, rows in before.items():
        assert {row.question for row in rows} <= {row.question for row in after[part]}


def test_known_hashes_stay_where_they_are():
    # A changed rule would leak questions between the parts of a set that was cut before.
    where = "".join(part_of(f"What is {n} + 7?", DEFAULT_FRACTIONS) for n in range(12))
    assert where == "BACCCCCCACCA"


def test_repeats_are_dropped_and_counted_however_they_are_written():
    rows = [Problem(question=text, answer="7") for text in ("What is $3 + 4$?", "what is  3+4", "What is 3 - 4?")]
    split = split_problems(rows)
    assert split.duplicates == 1
    assert sum(map(len, split.parts.values())) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3 + 4", "3 - 4"),
        ("13 + 4", "1 + 34"),
        ("(1 + 2) * 3", "1 + 2 * 3"),
        ("1.5", "15"),
        ("3 > 4", "3 < 4"),
        ("?!", "..."),
    ],
)
def test_different_problems_stay_different(one, other):
    assert normalise_question(one) != normalise_question(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 + 4?", "what is 3+4"),
        ("$x^{2}$", "x^2"),
        ("5 \u2212 2", "5 - 2"),
        ("A,  B\nand C.", "a b and c"),
    ],
)
def test_spelling_variants_are_the_same(one, other):
    assert normalise_question(one) == normalise_question(other)


def test_a_question_can_stay_once_for_each_of_its_solutions():
    rows = [
        Problem(question=question, answer="7", solution=solution)
        for question, solution in (("3 + 4", "a"), ("3+4", "b"), ("3 + 4 ", "a"), ("3 + 5", "a"))
    ]
    once, every = split_problems(rows), split_problems(rows, every_solution=True)
    assert (once.duplicates, every.duplicates) == (2, 1)
    kept = [problem.solution for part in every.parts.values() for problem in part if problem.question != "3 + 5"]
    assert kept == ["a", "b"]
    # Each solution of a question in the same part.
    assert sorted(len(part) for part in every.parts.values() if part) in ([1, 2], [3])


def test_an_empty_part_gets_nothing():
    split = split_problems(problems(200), {"A": 0.0, "B": 1.0})
    assert [len(split.parts[part]) for part in "AB"] == [0, 200]


def test_part_does_not_depend_on_the_order_of_the_fractions():
    turned = dict(reversed(DEFAULT_FRACTIONS.items()))
    assert split_problems(problems(50), turned).parts == split_problems(problems(50)).parts


@pytest.mark.parametrize("fractions", [{"A": 0.5, "B": 0.4}, {"A": 1.5, "B": -0.5}])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(UserError, match="add up to 1"):
        split_problems(problems(1), fractions)


def test_benchmark_questions_are_dropped_and_listed():
    rows = problems(10)
    kept, dropped = decontaminate(rows, ["what is  3 + 7", "something else"])
    assert dropped == [rows[3]]
    assert kept == rows[:3] + rows[4:]
