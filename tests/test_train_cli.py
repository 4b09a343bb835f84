"""Bad input to padd_ds/train.py: one line, exit code 2, nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import tiny_student
from tools.tiny_model import make_tiny_model, make_tokenizer, save_teacher


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student, teacher, data and a DeepSpeed JSON for one rank."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_student(vocabulary=len(make_tokenizer())).save_pretrained(folder / "student")
    make_tokenizer().save_pretrained(folder / "student")
    (folder / "teacher").mkdir()
    save_teacher(folder / "teacher", make_tiny_model())
    rows = [{"question": f"{a} plus {b}?", "answer": str(a + b)} for a in range(20) for b in range(20)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    tree = {"zero_optimization": {"stage": 2}, "expert_parallel": {"enabled": True, "autoep_size": 1}}
    (folder / "one.json").write_text(json.dumps(tree))
    (folder / "two.json").write_text(json.dumps(tree | {"expert_parallel": {"enabled": True, "autoep_size": 2}}))
    run = {
        "stage": "joint",
        "run_dir": str(folder / "run"),
        "deepspeed": str(folder / "one.json"),
        "steps": 1,
        "model": {"student": str(folder / "student"), "teacher": str(folder / "teacher")},
        "data": {"source": str(folder / "data.jsonl")},
        "optimizer": {"learning_rate": 1e-4},
        "rollout": {"prompts": 2, "group_size": 2, "max_new_tokens": 4},
        "policy": {"updates_per_rollout": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def start(repository: Path, inputs: Path, *overrides: str) -> Any:
    command = [sys.executable, "padd_ds/train.py", "--config", str(inputs / "run.yaml"), *overrides]
    return subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


CASES = {
    "policy.updates_per_rolout=2": "did you mean updates_per_rollout?",
    "deepspeed={inputs}/two.json": "1 ranks cannot be split into groups of autoep_size 2",
    "deepspeed={inputs}/none.json": "none.json: no such file",
    "model.student={inputs}/nowhere": "nowhere: no such folder",
    "data.fields.answer=target": "has no 'target' (fields: question, answer); set data.fields.answer",
    "data.source={inputs}/none.jsonl": "none.jsonl: no such file",
    "reward.answer_format=bogus": "answer format 'bogus' is unknown",
    "run_dir={inputs}/student": "already exists; choose another run_dir",
    "stage=warmup": "padd_targets.safetensors",
}


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_2(repository: Path, inputs: Path) -> None:
    before = sorted(path.name for path in inputs.rglob("*"))
    cases = list(CASES.items())
    for pair in (cases[index : index + 2] for index in range(0, len(cases), 2)):
        processes = [start(repository, inputs, case.replace("{inputs}", str(inputs))) for case, _ in pair]
        for process, (case, message) in zip(processes, pair, strict=True):
            _, told = process.communicate(timeout=120)
            lines = [line for line in told.splitlines() if line.startswith("error: ")]
            assert process.returncode == 2, (case, told)
            assert len(lines) == 1 and message in lines[0], (case, told)
            assert "Traceback" not in told, case
    assert sorted(path.name for path in inputs.rglob("*")) == before
