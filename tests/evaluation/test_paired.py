import json
from math import sqrt

import pytest
from scipy.stats import binomtest

from padd_ds.errors import UserError
from padd_ds.evaluation.paired import compare_results, difference, sign_test


def test_difference_worked_by_hand():
    # Differences 1, 1, 0, -1: mean 1/4, variance (2 * .75^2 + .25^2 + 1.25^2) / 3 = 11 / 12.
    found = difference([0, 0, 1, 1], [1, 1, 1, 0])
    half = 1.959963984540054 * sqrt(11 / 12 / 4)
    assert (found.mean, found.better, found.worse) == (0.25, 2, 1)
    assert found.interval_95 == (pytest.approx(0.25 - half), 1.0)
    assert found.p_value == 1.0
    assert difference([0.5], [1.0]).interval_95 == (-1.0, 1.0)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (5, 5), (3, 12), (40, 20)])
def test_sign_test_is_scipys(better, worse):
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert sign_test(better, worse) == pytest.approx(expected)


def result(path, greedy: str, drawn: str = "", problems: str = "a"):
    rows = {
        "responses": [{"problem": place, "correct": mark == "1", "status": "ok"} for place, mark in enumerate(greedy)],
        "sampled_responses": [
            {"problem": place // 2, "correct": mark == "1", "status": "gold_unparsable" if mark == "?" else "ok"}
            for place, mark in enumerate(drawn)
        ],
    }
    path.write_text(json.dumps({"settings": {"problems_sha256": problems}, **rows}))
    return path


def test_results_are_paired_question_by_question(tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    result(first, "0011", "0011??11")
    result(second, "1111", "0111??00")
    lines = compare_results(first, second).splitlines()
    assert lines[1].startswith("greedy: +50.0 points")
    assert "more right on 2 and less on 0 of 4 questions, sign test p = 0.5" in lines[1]
    assert "more right on 1 and less on 1 of 3 questions" in lines[2]


def test_other_questions_and_other_files_are_refused(tmp_path):
    first = result(tmp_path / "first.json", "01")
    with pytest.raises(UserError, match="are not on the same questions"):
        compare_results(first, result(tmp_path / "second.json", "01", problems="b"))
    (tmp_path / "other.json").write_text("[]")
    for name in ("none.json", "other.json"):
        with pytest.raises(UserError, match=f"{name}: is no result of padd-eval"):
            compare_results(first, tmp_path / name)
