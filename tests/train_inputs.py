"""What padd_ds/train.py needs on disk for a tiny joint run, and the starting of it."""

import contextlib
import io
import json
from pathlib import Path

import yaml

from padd_ds import train
from tests.commands import REPOSITORY, Command
from tests.tiny import tiny_student
from tools.tiny_model import make_tiny_model, make_tokenizer, save_teacher


def make_inputs(folder: Path) -> Path:
    """Student, teacher, data, run.yaml, and a DeepSpeed JSON each for one rank and two."""
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


def start_training(inputs: Path, *arguments: str) -> Command:
    """One rank of padd_ds/train.py."""
    return Command(REPOSITORY / "padd_ds" / "train.py", "--config", inputs / "run.yaml", *arguments)


def train_here(inputs: Path, *arguments: str) -> tuple[int, str]:
    """padd_ds/train.py in this process, a rank of `run_ranks`: its exit code and what it said on standard error."""
    code, told = 0, io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            train.main(["--config", f"{inputs}/run.yaml", "log.tensorboard=false", *arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return code, told.getvalue()
