"""What padd-plan says, held against real ranks: memory and communication of small runs on this machine.

Every case is a run of two steps on two ranks under tools/watched_train.py. What a process holds without a model is
measured with a model of almost no size, and taken off.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, Qwen3Config, Qwen3ForCausalLM

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from padd_ds.config.load import load_run_config
from padd_ds.errors import run_cli
from padd_ds.hf import read_config
from padd_ds.planning.memory import plan_memory
from padd_ds.planning.shape import ModelShape, shape_of
from padd_ds.planning.traffic import step_transfers
from padd_ds.planning.workload import layout_of, workload_of
from tools.tiny_model import make_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
WORLD = 2
MODEL = {"layers": 4, "width": 512, "slice": 256, "experts": 16, "top_k": 4, "vocabulary": 8000}
NO_MODEL = {"layers": 1, "width": 64, "slice": 8, "experts": 2, "top_k": 1, "vocabulary": 128}
QUESTION, SOLUTION = "12 plus 34" * 4 + "?", "7+5=12,." * 28
SMALL_WINDOW = {"stage3_max_live_parameters": 10**6, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
CASES: dict[str, tuple[str, int, int, dict[str, Any], dict[str, Any]]] = {
    # name: stage, ZeRO stage, autoep_size, more of zero_optimization, overrides of the run
    "warm-up, ZeRO 0, EP 2": ("warmup", 0, 2, {}, {"warmup.batch_size": 8}),
    "warm-up, ZeRO 1, EP 2": ("warmup", 1, 2, {}, {"warmup.batch_size": 8}),
    "warm-up, ZeRO 2, EP 1": ("warmup", 2, 1, {}, {}),
    "warm-up, ZeRO 2, EP 2": ("warmup", 2, 2, {}, {}),
    "warm-up, ZeRO 2, EP 2, checkpointing": ("warmup", 2, 2, {}, {"activation_checkpointing": True}),
    "warm-up, ZeRO 3, EP 1": ("warmup", 3, 1, {}, {}),
    "warm-up, ZeRO 3, EP 2": ("warmup", 3, 2, {}, {"warmup.batch_size": 8}),
    "joint, ZeRO 2, EP 2": ("joint", 2, 2, {}, {}),
    "joint, ZeRO 3, EP 2": ("joint", 3, 2, SMALL_WINDOW, {}),
    "joint, ZeRO 3, EP 2, teacher sharded": ("joint", 3, 2, SMALL_WINDOW, {"model.teacher_placement": "sharded"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for models and runs")
    parser.add_argument("--only", help="cases whose name contains this")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    prepare(folder / "model", MODEL)
    prepare(folder / "no-model", NO_MODEL)
    print("| run | memory, plan / measured | measured, MiB | " + "sent, plan / measured | measured, MiB |")
    print("|---|---|---|---|---|")
    bare: dict[str, float] = {}
    for name, case in CASES.items():
        if arguments.only is not None and arguments.only not in name:
            continue
        stage = case[0]
        if stage not in bare:
            measured, planned, *_ = run_case(folder / "no-model", f"nothing, {stage}", (stage, 2, 2, {}, {}))
            bare[stage] = measured - planned
        measured, planned, sent, expected = run_case(folder / "model", name, case)
        measured -= bare[stage]
        print(
            f"| {name} | {planned / measured:.3f} | {measured / 2**20:.0f} | {expected / sent if sent else 1:.4f} "
            f"| {sent / 2**20:.1f} |",
            flush=True,
        )


def prepare(folder: Path, sizes: Mapping[str, int]) -> None:
    """A random student with a shared expert, a teacher of the same FFN width, and rows of equal length."""
    common: dict[str, Any] = {
        "vocab_size": sizes["vocabulary"],
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["width"] // 64,
        "num_key_value_heads": max(1, sizes["width"] // 128),
        "head_dim": 64,
        "intermediate_size": (sizes["experts"] + 1) * sizes["slice"],
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    student = Glm4MoeConfig(
        **common,
        moe_intermediate_size=sizes["slice"],
        n_routed_experts=sizes["experts"],
        n_shared_experts=1,
        num_experts_per_tok=sizes["top_k"],
        routed_scaling_factor=float(sizes["top_k"]),
        first_k_dense_replace=0,
        norm_topk_prob=True,
        use_qk_norm=True,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0},
    )
    student.partial_rotary_factor = 1.0
    torch.manual_seed(0)
    for name, model in {
        "student": Glm4MoeForCausalLM(student),
        "teacher": Qwen3ForCausalLM(Qwen3Config(**common)),
    }.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    rows = [{"question": f"{n:03d}{QUESTION}", "solution": SOLUTION, "answer": str(n)} for n in range(64)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_case(
    folder: Path, name: str, case: tuple[str, int, int, dict[str, Any], dict[str, Any]]
) -> tuple[float, float, float, float]:
    """(memory measured, planned, bytes sent measured, planned) of a rank, on the mean of ranks."""
    stage, zero_stage, experts_over, zero, overrides = case
    label = name.replace(", ", "-").replace(" ", "")
    tree = {
        "zero_optimization": {"stage": zero_stage, **zero},
        "gradient_clipping": 1.0,
        "expert_parallel": {"enabled": True, "autoep_size": experts_over, "use_grouped_mm": False},
    }
    shutil.rmtree(folder / label, ignore_errors=True)  # of an earlier benchmark
    run = write_run(folder, label, stage, tree)
    options = [f"{key}={value}" for key, value in overrides.items()]
    ranks = watched_run(WORLD, folder, label, run, options)
    config = load_run_config(run, options)
    student, teacher = (shape(folder / name) for name in ("student", "teacher"))
    layout = layout_of(tree, WORLD, experts_over)
    prompt, response = lengths(stage, config.rollout.max_new_tokens)
    work = workload_of(config, WORLD, prompt, response)
    memory = [max(v for k, v in rank["memory"]["peaks"].items() if k == "step 1") for rank in ranks]
    started = [rank["memory"]["peaks"]["imported"] for rank in ranks]
    measured = sum(peak - start for peak, start in zip(memory, started, strict=True)) / WORLD
    sent = sum(sent_by_kind(ranks).values())
    expected = step_transfers(student, teacher, layout, work)
    planned = plan_memory(student, teacher, layout, work, on_cpu=True).peak
    return measured, planned, sent, sum(one.sent for one in expected)


def shape(folder: Path) -> ModelShape:
    return shape_of(read_config(str(folder)), str(folder))


def lengths(stage: str, max_new_tokens: int) -> tuple[int, int]:
    """Tokens of prompt and response of every row; a random model does not end a response before it must."""
    tokenizer = make_tokenizer()
    prompt = len(tokenizer(f"000{QUESTION}").input_ids)
    return prompt, len(tokenizer(SOLUTION).input_ids) + 1 if stage == "warmup" else max_new_tokens


def write_run(folder: Path, label: str, stage: str, tree: dict[str, Any]) -> Path:
    (folder / f"{label}.json").write_text(json.dumps(tree))
    run = {
        "stage": stage,
        "run_dir": str(folder / label / "run"),
        "deepspeed": str(folder / f"{label}.json"),
        "steps": 2,
        "micro_batch_size": 2,
        "model": {"student": str(folder / "student"), "teacher": str(folder / "teacher")},
        "data": {"source": str(folder / "data.jsonl"), "part": "all", "fields": {"solution": "solution"}},
        "optimizer": {"learning_rate": 1e-5},
        "warmup": {"batch_size": 4, "init_weight": 0},
        "rollout": {"prompts": 2, "group_size": 4, "max_new_tokens": 48},
        "policy": {"updates_per_rollout": 2},
        "log": {"gradients_every_steps": 0, "tensorboard": False},
    }
    path = folder / f"{label}.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def watched_run(world: int, folder: Path, label: str, run: Path, options: list[str]) -> list[dict[str, Any]]:
    """What tools/watched_train.py tells of every rank.

    Memory that is given back goes back to the system at once, so that what a process holds is what it uses.
    """
    at_once = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "MALLOC_ARENA_MAX": "1",
    }
    launch(world, ["tools/watched_train.py", str(folder / label), "--config", str(run), *options], at_once)
    return [json.loads((folder / label / f"rank_{rank}.json").read_text()) for rank in range(world)]


def sent_by_kind(ranks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bytes that a rank sends on the mean, by kind of collective, each run as a ring, which sends a sum twice."""
    sent: Counter[str] = Counter()
    for rank in ranks:
        for moved, count in rank["traffic"].items():
            kind, _, size = moved.partition(" over ")
            times = (2 if kind == "all_reduce" else 1) * (int(size) - 1) / int(size)
            sent[kind] += times * count / len(ranks)
    return dict(sent)


def launch(world: int, command: list[str], environment: Mapping[str, str]) -> None:
    """A Python script of this repository on CPU ranks of one thread; RuntimeError with its last words if it fails."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    on_cpu = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    variables = os.environ | on_cpu | dict(environment)
    done = subprocess.run([*torchrun, *command], cwd=REPOSITORY, env=variables, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    run_cli(main)
