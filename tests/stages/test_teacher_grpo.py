"""GRPO of a dense teacher, from the command line to a checkpoint that transformers loads."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from padd_ds.checkpoint.export import ExportOptions, export_run
from tests.commands import run_command
from tests.tiny import tiny_student
from tools.tiny_model import make_tiny_model, make_tokenizer, save_teacher


def write_inputs(folder: Path, *, tied: bool) -> dict[str, Any]:
    model = make_tiny_model()
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    (folder / "teacher").mkdir()
    save_teacher(folder / "teacher", model)
    rows = [{"question": f"{a} plus {b}", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}))
    return {
        "stage": "teacher_grpo",
        "run_dir": str(folder / "run"),
        "deepspeed": str(folder / "zero2.json"),
        "steps": 2,
        "model": {"student": str(folder / "teacher")},
        "data": {"source": str(folder / "data.jsonl"), "part": "all"},
        "optimizer": {"learning_rate": 1e-3},
        "rollout": {"prompts": 4, "group_size": 4, "max_new_tokens": 6},
        # Random responses: about one in ten is a lone digit, so groups differ in their reward.
        "reward": {"answer_format": "pattern", "answer_pattern": r"(\d)", "correct_weight": 1.0},
        "policy": {"updates_per_rollout": 2},
    }


def train(folder: Path, run: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return run_command("padd_ds/train.py", "--config", folder / "run.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_model_trains_and_its_export_is_the_trained_model(tmp_path: Path, tied: bool) -> None:
    done = train(tmp_path, write_inputs(tmp_path, tied=tied))
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and any(one["ratio_deviation"] > 0 for one in metrics)
    assert not any("load" in name or "router_flips" in name for name in metrics[0])
    export_run(ExportOptions(run=tmp_path / "run", output=tmp_path / "tuned"))
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("teacher", "tuned"))
    assert type(after) is type(before) and after.config.tie_word_embeddings == tied
    moved = {
        name: float((tensor - before.state_dict()[name]).abs().max()) for name, tensor in after.state_dict().items()
    }
    assert all(change > 0 for change in moved.values()), moved
    with safe_open(next((tmp_path / "tuned").glob("*.safetensors")), framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    tokens_BT = torch.tensor([[3, 5, 8, 2]])
    assert torch.isfinite(after(tokens_BT).logits).all()


@pytest.mark.slow
def test_a_model_with_experts_is_refused(tmp_path: Path) -> None:
    run = write_inputs(tmp_path, tied=True)
    tiny_student(vocabulary=len(make_tokenizer())).save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    done = train(tmp_path, run | {"model": {"student": str(tmp_path / "student")}})
    assert done.returncode == 2
    assert "student: has experts, but stage teacher_grpo trains a dense model" in done.stderr
    assert not (tmp_path / "run").exists()
