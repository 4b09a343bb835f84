"""Inference of a student beside its teacher."""

import sys

import pytest

from padd_ds.errors import UserError
from tests.tiny import tiny_student
from tools import bench_infer
from tools.bench_infer import rate_table, time_batch
from tools.tiny_model import make_tiny_model, make_tokenizer


def test_rates_are_compared_round_by_round():
    rates = {("teacher", 4, "decode"): [10.0, 20.0, 40.0], ("student", 4, "decode"): [20.0, 40.0, 40.0]}
    row = rate_table(rates).splitlines()[-1]
    assert row == "| 4 | decode | 2.00 (1.00 to 2.00) | 20 |"


def test_every_token_is_a_forward_pass():
    model, seen = make_tiny_model(), []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    assert all(rate > 0 for rate in time_batch(model, 2, 5, 3))
    assert seen == [(2, 5), (2, 1), (2, 1), (2, 1)]


@pytest.fixture
def command(tmp_path, monkeypatch):
    for name, model in (("teacher", make_tiny_model()), ("student", tiny_student(vocabulary=len(make_tokenizer())))):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    words = ["--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "student"), "--batch-sizes", "1", "2"]
    words += ["--prompt-tokens", "8", "--new-tokens", "2", "--rounds", "2", "--device", "cpu"]
    return lambda *more: monkeypatch.setattr(sys, "argv", ["bench_infer.py", *words, *more])


def test_costs_and_rates_are_told(command, monkeypatch, capsys):
    monkeypatch.setattr(bench_infer, "in_own_process", lambda name: 12.4)
    command()
    bench_infer.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| model", "| teacher", "| student", "| batch", *["| 1", "| 1", "| 2", "| 2"]]
    assert rows[1][-1] == rows[2][-1] == "12 MiB |"
    assert rows[1][1] == rows[1][2] and rows[2][1] != rows[2][2]


def test_the_process_of_one_model_tells_its_peak_memory(command, capsys):
    command("--only", "student")
    bench_infer.main()
    assert float(capsys.readouterr().out) > 50


def test_more_tokens_than_positions_are_refused(command):
    command("--prompt-tokens", "100000")
    with pytest.raises(UserError, match=r"the teacher has .* positions; lower --prompt-tokens or --new-tokens"):
        bench_infer.main()


def test_too_few_rounds_are_refused(command):
    command("--rounds", "1")
    with pytest.raises(UserError, match="at least 2"):
        bench_infer.main()
