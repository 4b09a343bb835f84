"""Bad input to padd_ds/train.py: one line, exit code 2, nothing left behind."""

from pathlib import Path

import pytest

from tests.train_inputs import make_inputs, start_training


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


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
def test_bad_input_is_one_line_and_exit_code_2(inputs: Path) -> None:
    before = sorted(path.name for path in inputs.rglob("*"))
    cases = list(CASES.items())
    for pair in (cases[index : index + 2] for index in range(0, len(cases), 2)):
        processes = [start_training(inputs, case.replace("{inputs}", str(inputs))) for case, _ in pair]
        for process, (case, message) in zip(processes, pair, strict=True):
            _, told = process.communicate(timeout=120)
            lines = [line for line in told.splitlines() if line.startswith("error: ")]
            assert process.returncode == 2, (case, told)
            assert len(lines) == 1 and message in lines[0], (case, told)
            assert "Traceback" not in told, case
    assert sorted(path.name for path in inputs.rglob("*")) == before
