"""The card of an export tells what its run left, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.repocard import metadata_load
from transformers import LlamaConfig, LlamaForCausalLM

from padd_ds.checkpoint import export
from padd_ds.checkpoint.export import ExportOptions, export_run
from padd_ds.checkpoint.layout import MANIFEST
from padd_ds.errors import UserError
from padd_ds.run.folder import keep_student_files
from tests.checkpoint.made_up_run import SIZES, random_student, write_run
from tools.tiny_model import make_tokenizer

CONFIG = {
    "stage": "joint",
    "steps": 600,
    "seed": 7,
    "model": {"student": "/secret/place/warmed-up", "teacher": "/secret/place/big|teacher"},
    "data": {"source": "/secret/place/train.jsonl", "part": "C", "template": "boxed", "max_prompt_tokens": 64},
    "optimizer": {"learning_rate": 1e-06, "schedule": "constant", "weight_decay": 0.01},
    "rollout": {"prompts": 32, "group_size": 8, "max_new_tokens": 48},
    "policy": {"objective": "pr_grpo", "updates_per_rollout": 4},
    "distillation": {"weight": 0.1},
    "balance": {"kind": "reward_augmented"},
}
CONVERSION = {
    "teacher": {"source": "/secret/place/teacher"},
    "options": {"cluster": "activations", "router": "calibrated", "calibration": "/secret/place/part_a.jsonl"},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with everything that training leaves."""
    folder = write_run(tmp_path / "run", random_student())
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    packages = {"torch": "2.13.0", "deepspeed": "0.19.8", "padd-ds": None}
    (folder / "environment.json").write_text(json.dumps({"packages": packages, "commit": "abc123", "ranks": 4}))
    lines = [{"step": 0, "reward": 0.25, "loss_kd": None}, {"step": 1, "reward": 0.75}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    earlier = {"run": "warm", "step": 1000, "stage": "warmup", "check": "fine", "earlier": []}
    (folder / "student" / "padd_conversion.json").write_text(json.dumps(CONVERSION))
    (folder / "student" / "padd_export.json").write_text(json.dumps(earlier))
    (folder / "student" / "README.md").write_text("---\nbase_model: Owner/Dense\nlicense: mit\n---\n# converted\n")
    (folder / "student" / "LICENSE").write_text("MIT License")
    return folder


def exported_card(run: Path, **options: Any) -> str:
    output = run.parent / "my_student"
    export_run(ExportOptions(run=run, output=output, **options))
    return (output / "README.md").read_text(encoding="utf-8")


def test_the_card_tells_the_runs_facts(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 2, "rew')
    card = exported_card(run)
    assert metadata_load(run.parent / "my_student" / "README.md") == {
        "base_model": "Owner/Dense",
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["padd", "moe", "distillation"],
    }
    model = random_student()
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 3 * (6 - 3) * 3 * SIZES["hidden_size"] * SIZES["moe_intermediate_size"]
    for told in (
        "# my\\_student",
        f"| parameters | {total:,} |",
        f"| of which active per token | {total - idle:,} (",
        "| routed experts per layer | 6, 3 per token |",
        "1. `padd-convert` of `teacher`, groups `activations`, router `calibrated`, calibrated on `part_a.jsonl`",
        "2. warm-up on given text (`stage: warmup`), 1000 steps, run `warm`",
        "3. joint training with rollouts (`stage: joint`), 1 step, run `run`: this model.",
        "| teacher | `big\\|teacher` |",
        "| data | `train.jsonl, part C` |",
        "| steps | `1 of 600` |",
        "| learning rate | `1e-06` |",
        "| `policy.objective` | `pr_grpo` |",
        "| versions | `torch 2.13.0, deepspeed 0.19.8` |",
        "| commit of padd_ds | `abc123` |",
        "Step 0, counted from 0",
        "| reward per response (`reward`) | 0.25 |",
        'AutoTokenizer.from_pretrained("my_student")',
        "vllm serve my_student",
        "prompts of at most 64 tokens and responses of at most 48",
        "Export: its logits are off",
        "That of the model it was made from: `mit` (`LICENSE`).",
    ):
        assert told in card, told
    assert "secret" not in card and "loss_kd" not in card and "0.75" not in card
    assert (run.parent / "my_student" / "LICENSE").read_text() == "MIT License"


def test_stages_are_handed_on(run: Path) -> None:
    exported_card(run)
    told = json.loads((run.parent / "my_student" / "padd_export.json").read_text())
    assert [one["stage"] for one in [*told["earlier"], told]] == ["warmup", "joint"]


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2))
    card = exported_card(write_run(tmp_path / "run", model))
    keys = metadata_load(tmp_path / "my_student" / "README.md")
    assert keys == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["padd"]}
    assert "expert" not in card and "None" not in card and "learning rate" not in card and "Step " not in card
    assert "(100%)" in card and "## Licence\n\nUnknown: " in card


def test_the_teachers_own_folder_is_asked_where_the_student_came_without_a_licence(run: Path, tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE"):
        (run / "student" / name).unlink()
    teacher = tmp_path / "dense"
    teacher.mkdir()
    (teacher / "LICENSE").write_text("Terms of ours")
    model = {"student": "gone", "teacher": str(teacher)}
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": model}))
    exported_card(run)
    keys = metadata_load(tmp_path / "my_student" / "README.md")
    assert keys is not None and keys["license"] == "other" and keys["license_link"] == "LICENSE"
    assert "base_model" not in keys and (tmp_path / "my_student" / "LICENSE").is_file()


def test_megatron_has_a_card_of_its_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "check_megatron", lambda student, names: None)
    monkeypatch.setitem(export.WRITERS, "megatron", lambda weights, staged, options: None)
    card = exported_card(run, format="megatron", check=False)
    keys = metadata_load(run.parent / "my_student" / "README.md")
    assert keys is not None and "library_name" not in keys
    assert "megatron_config.json" in card and "AutoModelForCausalLM" not in card


@pytest.mark.parametrize(
    ("stage", "keys"), [("warmup", ["warmup.responses", "warmup.teacher_cache"]), ("joint", ["rollout.guidance"])]
)
def test_the_card_tells_what_was_recorded(run: Path, stage: str, keys: list[str]) -> None:
    config: dict[str, Any] = CONFIG | {"stage": stage}
    for key in keys:
        section, name = key.split(".")
        config = config | {section: config.get(section, {}) | {name: f"/secret/{name}_of_c"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    manifest = run / "checkpoints" / "step_1" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"stage": stage}))
    card = exported_card(run)
    for key in keys:
        assert f"| recorded teacher (`{key}`) | `{key.split('.')[1]}_of_c` |" in card
    assert card.count("recorded teacher") == len(keys) and "secret" not in card


def test_a_generation_config_that_came_without_a_folder_is_written_as_it_was_loaded(tmp_path: Path) -> None:
    model = random_student()
    model.generation_config.temperature = 0.9
    keep_student_files(tmp_path / "run", model, make_tokenizer(), Path("owner/name"))
    kept = json.loads((tmp_path / "run" / "student" / "generation_config.json").read_text())
    assert (kept["temperature"], kept["eos_token_id"]) == (0.9, 1)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("config.yaml", "a: [", "config.yaml: cannot be read"),
        ("environment.json", "[]", "environment.json: holds no keys"),
        ("metrics.jsonl", '{"step": 0}\n{"st\n{"step": 1}\n', "metrics.jsonl, line 2: not an object"),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_written(run: Path, name: str, text: str, told: str) -> None:
    (run / name).write_text(text)
    with pytest.raises(UserError, match=told):
        exported_card(run)
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_a_run_keeps_the_companions_of_its_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("README.md", "LICENSE.txt", "NOTICE", "padd_conversion.json", "notes.txt"):
        (source / name).write_text("x")
    model = random_student()
    # transformers loads this, and refuses to save it.
    (source / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_student_files(tmp_path / "run", model, make_tokenizer(), Path("~/source"))
    kept = {path.name for path in (tmp_path / "run" / "student").iterdir()}
    assert (tmp_path / "run" / "student" / "generation_config.json").read_text() == '{"temperature": 0.9, "top_p": 0.6}'
    assert {"README.md", "LICENSE.txt", "NOTICE", "padd_conversion.json"} <= kept and "notes.txt" not in kept
