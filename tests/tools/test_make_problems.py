import json
import subprocess
import sys

import pytest

pytest.importorskip("reasoning_gym")

SUMS = "chain_sum:subject=sum2,min_terms=2,max_terms=2,min_digits=1,max_digits=1"


@pytest.fixture
def make(repository, tmp_path):
    def run(*arguments: str, output: str = "out.jsonl") -> tuple[int, str, list[dict]]:
        path = tmp_path / output
        command = [sys.executable, str(repository / "tools" / "make_problems.py"), "--output", str(path)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        lines = path.read_text().splitlines() if path.exists() else []
        return done.returncode, done.stderr, [json.loads(line) for line in lines]

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
    _, _, rows = make(*arguments)
    assert len({row["question"] for row in rows}) == 60
    assert {row["subject"] for row in rows} == {"sum2", "chain_sum"}
    for row in rows:
        terms = (
            row["question"].removeprefix("What is ").removesuffix("?").replace("- ", "-").replace("+ ", "")
        )
        assert sum(map(int, terms.split())) == int(row["answer"])
    assert make(*arguments, output="again.jsonl")[2] == rows


def test_excluded_questions_are_not_made(make, tmp_path):
    _, _, first = make(SUMS, "--count", "100")
    _, _, second = make(SUMS, "--count", "100", "--exclude", str(tmp_path / "out.jsonl"), output="b.jsonl")
    assert {row["question"] for row in first}.isdisjoint(row["question"] for row in second)
    assert len(second) == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SUMS, "--count", "201"), "only 200 distinct questions"),
        (("no_such_task",), "not registered"),
        (("chain_sum:max_term=2",), "max_term"),
        (("chain_sum:max_terms",), "is not option=value"),
        ((SUMS, "--question", "{formula}"), "'formula' is not one of question"),
        ((SUMS, "--count", "0"), "--count 0 must be at least 1"),
        ((SUMS, "--exclude", "./none.jsonl"), "no such file"),
    ],
)
def test_mistakes_end_with_code_2_and_no_file(make, arguments, message):
    code, stderr, rows = make(*arguments)
    assert (code, rows) == (2, [])
    assert message in stderr
    assert len(stderr.splitlines()) == 1
