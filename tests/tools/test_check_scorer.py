import json

import pytest

from padd_ds.errors import UserError
from padd_ds.rollout.verify import AnswerChecker
from tools import check_scorer
from tools.check_scorer import KINDS, cases_of, other_count, other_digit, other_option, other_sign, reworded

ROWS = {
    "gsm8k_test.jsonl": [{"question": "q", "answer": "so <<3*6=18>>18\n#### 1,018"}],
    "math500.jsonl": [
        {"problem": "q", "solution": r"so \boxed{\frac{14}{3}}", "answer": r"\frac{14}{3}", "subject": "A", "level": 1},
        {"problem": "q", "solution": r"so \boxed{p-q}", "answer": "p - q", "subject": "A", "level": 1},
        {"problem": "q", "solution": r"so \boxed{\text{(B)}}", "answer": r"\text{(B)}", "subject": "A", "level": 2},
        {"problem": "q", "solution": r"so \boxed{\text{even}}", "answer": r"\text{even}", "subject": "A", "level": 2},
    ],
    "aime24.jsonl": [{"problem": "q", "answer": "073"}],
    "amc23.jsonl": [{"problem": "q", "answer": 27.0}],
    "minerva_math.jsonl": [
        {"problem": "q", "solution": r"is \boxed{4.5e33} \mathrm{ergs}", "type": "Astronomy"},
        {"problem": "q", "solution": r"is \boxed{7.4e-12}", "type": "Chemistry"},
        {"problem": "q", "solution": r"is \boxed{m \frac{d v}{d t}+b v=f}", "type": "Dynamics"},
    ],
    "olympiadbench.jsonl": [
        {"question": "q", "final_answer": ["$1$,$\\frac{3 + \\sqrt{21}}{2}$"], "solution": ["w"], "subfield": "A"},
        {"question": "q", "final_answer": ["4.2"], "solution": ["w"], "subfield": "A", "error": "1e-1"},
        {"question": "q", "final_answer": ["$[-1,-\\frac{1}{2}]$"], "solution": ["w"], "subfield": "A"},
    ],
}


@pytest.fixture
def folder(tmp_path):
    for name, rows in ROWS.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_every_benchmark_is_judged_as_it_should_be(folder, capsys):
    check_scorer.main(["--data", str(folder), "--output", str(folder / "table.md")])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == f"| benchmark | {' | '.join(KINDS)} |"
    assert lines[2] == "| gsm8k | 1 of 1 | 1 of 1 | 1 of 1 | 1 of 1 | - | - |"
    assert lines[3] == "| math500 | 4 of 4 | 4 of 4 | 2 of 2 | 1 of 1 | - | 2 of 2 |"
    assert lines[7] == "| olympiadbench | 3 of 3 | 3 of 3 | 2 of 2 | 3 of 3 | 1 of 1 | - |"
    assert len(lines) == 8
    assert (folder / "table.md").read_text().strip().splitlines() == lines


def test_a_checker_that_is_wrong_is_told(folder, monkeypatch, capsys):
    check = AnswerChecker.check

    def lenient(self, pairs, tolerances):
        return [type(said)(correct=True, status="ok", extracted="x") for said in check(self, pairs, tolerances)]

    monkeypatch.setattr(AnswerChecker, "check", lenient)
    with pytest.raises(UserError, match=r"aime24: fewer than 99\.5 %"):
        check_scorer.main(["--data", str(folder), "--benchmark", "aime24"])
    assert "- aime24 1, sign: `073`, found `x` (ok)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "gold", "made"),
    [
        (reworded, "4.5e33", r"4.5 \times 10^{33}"),
        (reworded, "1,3", "3, 1"),
        (reworded, "1250", "1,250.0"),
        (reworded, "1.6", "1.60"),
        (reworded, r"\frac{1}{2}", r"\dfrac{1}{2}"),
        (other_sign, "-3", "3"),
        (other_sign, "p - q", "p + q"),
        (other_sign, "f(x)=x^2", "f(x)=-x^2"),
        (other_sign, "y'-r=0", "y'-r=0".replace("-", "+")),
        (other_sign, r"1 \pm 2", None),
        (other_sign, "0", None),
        (other_sign, "x=0", None),
        (other_digit, "0.05", "0.06"),
        (other_digit, "x_{1}+2", "x_{1}+3"),
        (other_digit, r"\pi", None),
        (other_count, "1,2,3", "1, 2"),
        (other_count, "(1,2)", None),
    ],
)
def test_answers_are_made_from_the_gold_one(make, gold, made):
    assert make(gold) == made


def test_options_are_swapped_with_those_of_other_problems():
    assert other_option("B", ["B", r"\text{(C)}"]) == r"\text{(C)}"
    assert other_option("12", ["B"]) is None


def test_the_gold_solution_is_the_datas_own_where_it_says_its_answer():
    from padd_ds.data.problems import Problem

    boxed = next(cases_of(1, Problem(question="q", answer="2", solution=r"hence \boxed{2}"), []))
    bare = next(cases_of(1, Problem(question="q", answer="2", solution="hence two"), []))
    assert boxed.response == r"hence \boxed{2}"
    assert bare.response.endswith(r"$\boxed{2}$.")
