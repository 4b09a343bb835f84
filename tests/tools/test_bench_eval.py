"""padd-eval beside lm-eval."""

import importlib.util
import sys

import pytest

from padd_ds.errors import UserError
from tools import bench_eval
from tools.bench_eval import Item, judge, report


def test_both_places_of_an_answer_are_judged():
    texts = ["6 * 7 = 42\n#### 42", "so 1,042 in all", "#### 41\nno, 42", ""]
    assert judge(texts, ["42", "1042", "42", "42"]) == [(True, True), (False, True), (False, True), (False, False)]


def test_differences_are_listed_with_their_reason():
    same = Item(theirs=" 42", ours="42", their_verdicts=(True, True), our_verdicts=(True, False))
    other = Item(theirs="41", ours="42", their_verdicts=(False, False), our_verdicts=(False, True))
    text = report([same, other], {"lm-eval": [6.0, 9.0], "padd-eval": [3.0, 3.0]}, {"lm-eval": "1", "padd-eval": "2"})
    assert "| lm-eval | 1 of 2 (9.5 to 90.5 %) | 1 of 2 (9.5 to 90.5 %) | 6.0, 9.0 | 1 |" in text
    assert "2.50 times as many problems per second\n(2.00, 3.00)" in text
    assert text.splitlines()[-3:] == [
        "1 of 2 responses differ; verdicts differ on:",
        "- problem 1, flexible-extract: lm-eval True, padd-eval False: the same response, judged otherwise",
        "- problem 2, flexible-extract: lm-eval False, padd-eval True: the responses differ",
    ]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_missing_harness_is_told_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    words = ["--model", "nowhere", "--test", str(tmp_path / "rows.jsonl"), "--shots", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", ["bench_eval.py", *words])
    with pytest.raises(UserError, match="lm-eval is missing"):
        bench_eval.main()


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    words = ["--model", "nowhere", "--test", str(tmp_path / "test.jsonl"), "--shots", str(tmp_path / "test.jsonl")]
    monkeypatch.setattr(sys, "argv", ["bench_eval.py", *words])
    with pytest.raises(UserError, match=r"test\.jsonl: no such file"):
        bench_eval.main()


def test_numbers_that_measure_nothing_are_refused(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    words = ["--model", "nowhere", "--test", str(tmp_path / "rows.jsonl"), "--shots", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", ["bench_eval.py", *words, "--rounds", "0"])
    with pytest.raises(UserError, match="--rounds 0 must be at least 1"):
        bench_eval.main()
