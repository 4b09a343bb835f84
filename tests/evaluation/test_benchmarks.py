import json

import pytest

from padd_ds.data.answers import Tolerance
from padd_ds.data.problems import Problem
from padd_ds.errors import UserError
from padd_ds.evaluation.benchmarks import BENCHMARKS, load_benchmark

ROWS = {
    "gsm8k": ({"question": "q", "answer": "work\n#### 18"}, "18"),
    "math500": ({"problem": "q", "solution": "w", "answer": r"\pi", "subject": "Algebra"}, r"\pi"),
    "aime24": ({"problem": "q", "answer": "204"}, "204"),
    "amc23": ({"problem": "q", "answer": 27.0}, "27"),
    "minerva": ({"problem": "q", "solution": r"so \boxed{1.6} cm", "type": "Astronomy"}, "1.6"),
    "olympiadbench": ({"question": "q", "final_answer": ["2", "3"], "subfield": "Algebra"}, "2, 3"),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_of_each_benchmark_become_problems(tmp_path, name):
    row, gold = ROWS[name]
    (tmp_path / BENCHMARKS[name].file).write_text(json.dumps(row) + "\n")
    (problem,) = load_benchmark(name, tmp_path)
    assert isinstance(problem, Problem)
    assert (problem.question, problem.answer) == ("q", gold)


def test_unknown_and_absent_benchmarks_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="choose one of gsm8k, math500"):
        load_benchmark("gsm9k", tmp_path)
    with pytest.raises(UserError, match=r"gsm8k_test\.jsonl: no such file"):
        load_benchmark("gsm8k", tmp_path)
    with pytest.raises(UserError, match=r"HuggingFaceH4/aime_2024: no such file, and not to be had from the hub"):
        load_benchmark("aime24")


def test_errors_and_levels_come_along(tmp_path):
    olympiad = {
        "question": "q",
        "final_answer": ["4.2"],
        "subfield": "Algebra",
        "solution": ["w"],
        "error": "1e-1,1e-2",
    }
    math = {"problem": "q", "solution": "w", "answer": "1", "subject": "Algebra", "level": 5}
    minerva = {"question": "q", "answer": "1.6"}
    files = {"olympiadbench.jsonl": olympiad, "math500.jsonl": math, "minerva_math.jsonl": minerva}
    for file, row in files.items():
        (tmp_path / file).write_text(json.dumps(row) + "\n")
    problems = {name: load_benchmark(name, tmp_path)[0] for name in ("olympiadbench", "math500", "minerva")}
    assert problems["olympiadbench"].tolerance == Tolerance(absolute=0.1)
    assert (problems["math500"].level, problems["math500"].subject, problems["math500"].tolerance) == (
        "5",
        "Algebra",
        Tolerance(),
    )
    # As the hub has it, without a solution.
    assert (problems["minerva"].answer, problems["minerva"].tolerance) == ("1.6", Tolerance(relative=0.01))


def test_a_bad_row_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "olympiadbench.jsonl"
    good = {"question": "q", "final_answer": ["4.2"], "error": None}
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(good | {"error": "some"}) + "\n")
    with pytest.raises(UserError, match=r"olympiadbench\.jsonl, line 3: error 'some' is no number"):
        load_benchmark("olympiadbench", tmp_path)
    path.write_text(json.dumps(good) + "\n" + json.dumps({"question": "q"}) + "\n")
    with pytest.raises(UserError, match=r"olympiadbench\.jsonl, line 2 has no 'final_answer' \(fields: question\)"):
        load_benchmark("olympiadbench", tmp_path)
