"""Targets of the Makefile that only hand their variables on."""

import json
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder whose lm_eval tells its arguments, one a line."""
    program = tmp_path / "bin" / "lm_eval"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "[%s]\\n" "$@"\n')
    program.chmod(0o755)
    return program.parent


def make(
    repository: Path, programs: Path, *settings: str, target: str = "eval-general"
) -> subprocess.CompletedProcess[str]:
    # The environment counts as built.
    command = ["make", "--silent", "--old-file=.venv/.ready", target, f"BIN={programs}", *settings]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)


def test_general_tasks_go_to_lm_eval(repository: Path, programs: Path) -> None:
    done = make(repository, programs, "MODEL=my students/joint/", "TASKS=mmlu_pro,mbpp", "EVAL_ARGS=--limit 8")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[:5] == ["[run]", "[--model]", "[hf]", "[--model_args]", "[pretrained=my students/joint/,dtype=auto]"]
    assert told[5:8] == ["[--tasks]", "[mmlu_pro,mbpp]", "[--log_samples]"]
    assert told[-2:] == ["[--limit]", "[8]"]


def test_results_of_another_model_of_the_same_name_are_not_taken_for_this_ones(
    repository: Path, programs: Path, tmp_path: Path
) -> None:
    names = ("gsm8k", "math500", "aime24", "amc23", "minerva", "olympiadbench")
    files = [tmp_path / f"{name}-joint.json" for name in names]
    for file in files:
        file.write_text(json.dumps({"settings": {"model": "a/joint"}, "model": {"parameters": 1}}, indent=1))
    same = make(repository, programs, "MODEL=a/joint/", f"RESULTS={tmp_path}", target="eval-all")
    told = [f"{name}: {file} is there already" for name, file in zip(names, files, strict=True)]
    assert (same.returncode, same.stdout.splitlines()) == (0, told), same.stderr
    other = make(repository, programs, "MODEL=b/joint", f"RESULTS={tmp_path}", target="eval-all")
    assert other.returncode == 2 and not other.stdout
    assert f"error: {files[0]} is of another model than b/joint; set RESULTS" in other.stderr


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["TASKS=mbpp"], "error: MODEL is not set"),
        (["MODEL=a"], "error: TASKS is not set"),
        (["MODEL=a", "TASKS=mbpp", "BIN=nowhere"], "error: lm-eval is not installed; run nowhere/pip install"),
    ],
)
def test_what_is_missing_is_told(repository: Path, programs: Path, settings: list[str], told: str) -> None:
    done = make(repository, programs, *settings)
    assert done.returncode == 2 and told in done.stderr and not done.stdout
