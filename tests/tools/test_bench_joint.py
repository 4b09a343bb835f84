"""The joint step's benchmark runs and tells time and memory of every variant."""

import json
import re
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest

from padd_ds.engine.ranks import Ranks
from tests.commands import run_command
from tests.ranks import run_ranks
from tests.tiny import tiny_student
from tests.world import problems
from tools import bench_joint, measuring
from tools.bench_joint import VARIANTS, table
from tools.tiny_model import make_tiny_model, make_tokenizer, save_teacher

MEASURE = bench_joint.measure


def test_ratios_are_those_of_the_same_step() -> None:
    vanilla = [{"rollout": 1.0, "scoring": 0.0, "update": 1.0 * factor} for factor in (1, 3, 5)]
    padd = [{"rollout": 1.0, "scoring": 0.0, "update": 1.0 * factor + 0.5} for factor in (1, 3, 5)]
    text = table({"vanilla": vanilla, "padd": padd}, {"padd": 12.4})
    assert "| vanilla | 1.000 (1.000 to 1.000) | +0.0 % | +0.0 % | +0.0 % |  |" in text
    assert re.search(r"\| padd \| 1\.125 \(1\.083 to 1\.250\) \| .* \| \+12\.5 % \| 12 MiB \|", text)
    assert "vanilla: 4.00 s a step (rollout 25 %, scoring 0 %, update 75 %)" in text


def measured(ranks: Ranks, arguments: Namespace, names: list[str]) -> dict[str, list[dict[str, float]]]:
    return MEASURE(arguments, names)


@pytest.mark.slow
def test_every_variant_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher, data = tmp_path / "student", tmp_path / "teacher", tmp_path / "data.jsonl"
    tiny_student(vocabulary=len(make_tokenizer())).save_pretrained(student)
    make_tokenizer().save_pretrained(student)
    teacher.mkdir()
    save_teacher(teacher, make_tiny_model())
    data.write_text("\n".join(json.dumps(asdict(problem)) for problem in problems()) + "\n", encoding="utf-8")
    words = ["tools/bench_joint.py", "--student", str(student), "--teacher", str(teacher), "--data", str(data)]
    words += ["--steps", "2", "rollout.prompts=2", "data.part=all", "rollout.max_new_tokens=4"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(bench_joint, "measure", lambda *given: run_ranks(measured, 1, *given)[0])
    monkeypatch.setattr(measuring.subprocess, "run", lambda command, **_: run_command(*command[1:]))
    bench_joint.main()
    told = capsys.readouterr().out
    for name in VARIANTS:
        assert re.search(rf"\| {re.escape(name)} \| \d\.\d{{3}} \(.*\| \d+ MiB \|", told), name
