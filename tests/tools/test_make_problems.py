import importlib.util
import json
from types import ModuleType

import pytest

from padd_ds.errors import UserError

pytest.importorskip("reasoning_gym")

SUMS = "chain_sum:subject=sum2,min_terms=2,max_terms=2,min_digits=1,max_digits=1"


@pytest.fixture(scope="module")
def tool(repository) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_problems", repository / "tools" / "make_problems.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make(tool, tmp_path):
    def run(*arguments: str, output: str = "out.jsonl") -> list[dict]:
        tool.main(["--output", str(tmp_path / output), *arguments])
        return [json.loads(line) for line in (tmp_path / output).read_text().splitlines()]

    return run


def test_problems_are_distinct_right_and_reproducible(make):
    arguments = (
        SUMS,
        "chain_sum:min_terms=3,max_terms=3",
        "--count",
        "60",
        "--question",
        "What is {expression}?",
    )
    rows = make(*arguments)
    assert len({row["question"] for row in rows}) == 60
    assert {row["subject"] for row in rows} == {"sum2", "chain_sum"}
    for row in rows:
        terms = row["question"].removeprefix("What is ").removesuffix("?").replace("- ", "-").replace("+ ", "")
        assert sum(map(int, terms.split())) == int(row["answer"])
    assert make(*arguments, output="again.jsonl") == rows


def test_a_solution_is_filled_in_beside_the_question(make):
    (row,) = make(SUMS, "--count", "1", "--question", "{expression}?", "--solution", "{expression} = {answer}")
    assert row["solution"] == row["question"].removesuffix("?") + " = " + row["answer"]


def test_excluded_questions_are_not_made(make, tmp_path):
    first = make(SUMS, "--count", "100")
    second = make(SUMS, "--count", "100", "--exclude", str(tmp_path / "out.jsonl"), output="b.jsonl")
    assert {row["question"] for row in first}.isdisjoint(row["question"] for row in second)
    assert len(second) == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SUMS, "--count", "201"), "only 200 distinct questions found"),
        (("no_such_task",), "not registered"),
        (("chain_sum:max_term=2",), "max_term"),
        (("chain_sum:max_terms",), "is not option=value"),
        ((SUMS, "--question", "{formula}"), "'formula' is not one of question"),
        ((SUMS, "--solution", "{formula}"), "--solution '{formula}': 'formula' is not one of question"),
        ((SUMS, "--count", "0"), "--count 0 must be at least 1"),
        ((SUMS, "--exclude", "./none.jsonl"), "no such file"),
    ],
)
def test_mistakes_are_told_and_leave_no_file(make, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        make(*arguments)
    assert list(tmp_path.iterdir()) == []
