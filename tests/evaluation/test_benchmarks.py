import json

import pytest

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
    with pytest.raises(UserError, match=r"pass --data-dir with aime24\.jsonl"):
        load_benchmark("aime24")
