"""What padd-plan says, held against real ranks: memory and communication of small runs on this machine's CPU.

Every case is a run of two steps on two ranks under tools/watched_train.py. What a process holds without a model is
measured with a model of almost no size, and taken off. With --gpu: memory and time of larger runs on one GPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Qwen3Config

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from padd_ds.config.load import load_run_config
from padd_ds.errors import run_cli
from padd_ds.hf import read_config
from padd_ds.planning.cluster import Cluster, load_cluster
from padd_ds.planning.estimate import estimate_step
from padd_ds.planning.memory import plan_memory
from padd_ds.planning.shape import ModelShape, shape_of
from padd_ds.planning.traffic import step_transfers
from padd_ds.planning.workload import Layout, Workload, layout_of, workload_of
from tools.tiny_model import make_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
QUESTION, SOLUTION = "12 plus 34" * 4 + "?", "7+5=12,." * 28
SMALL_WINDOW = {"stage3_max_live_parameters": 10**6, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
Case = tuple[str, int, int, dict[str, Any], dict[str, Any]]
"""Stage, ZeRO stage, autoep_size, more of zero_optimization, overrides of the run."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A machine, the models that it is given, and the runs."""

    on_gpu: bool
    world: int
    model: Mapping[str, int]
    repeats: int
    """Of the solution, in every row of the data."""
    prompts: int
    """Of a rollout."""
    new_tokens: int
    steps: int
    cases: Mapping[str, Case]


ON_CPU = Bench(
    on_gpu=False,
    world=2,
    model={"layers": 4, "width": 512, "slice": 256, "experts": 16, "top_k": 4, "vocabulary": 8000},
    repeats=1,
    prompts=2,
    new_tokens=48,
    steps=2,
    cases={
        "warm-up, ZeRO 0, EP 2": ("warmup", 0, 2, {}, {"warmup.batch_size": 8}),
        "warm-up, ZeRO 1, EP 2": ("warmup", 1, 2, {}, {"warmup.batch_size": 8}),
        "warm-up, ZeRO 2, EP 1": ("warmup", 2, 1, {}, {}),
        "warm-up, ZeRO 2, EP 2": ("warmup", 2, 2, {}, {}),
        "warm-up, ZeRO 2, EP 2, masked": ("warmup", 2, 2, {}, {"model.expert_compute": "masked"}),
        "warm-up, ZeRO 2, EP 2, checkpointing": ("warmup", 2, 2, {}, {"activation_checkpointing": True}),
        "warm-up, ZeRO 3, EP 1": ("warmup", 3, 1, {}, {}),
        "warm-up, ZeRO 3, EP 2": ("warmup", 3, 2, {}, {"warmup.batch_size": 8}),
        "joint, ZeRO 2, EP 2": ("joint", 2, 2, {}, {}),
        "joint, ZeRO 3, EP 2": ("joint", 3, 2, SMALL_WINDOW, {}),
        "joint, ZeRO 3, EP 2, teacher sharded": ("joint", 3, 2, SMALL_WINDOW, {"model.teacher_placement": "sharded"}),
    },
)
NO_MODEL = {"layers": 1, "width": 64, "slice": 8, "experts": 2, "top_k": 1, "vocabulary": 128}
VANILLA = {"policy.objective": "grpo", "distillation.weight": 0, "balance.kind": "loss_free"}
_OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
_LARGER: dict[str, Any] = {"micro_batch_size": 4, "warmup.batch_size": 8}
ON_GPU = Bench(
    on_gpu=True,
    world=1,
    # Layers and vocabulary of Qwen2.5-7B, four layers of them.
    model={"layers": 4, "width": 3584, "slice": 1184, "experts": 15, "top_k": 7, "vocabulary": 152064},
    repeats=4,
    prompts=8,
    new_tokens=256,
    steps=4,
    cases={
        "warm-up, ZeRO 1": ("warmup", 1, 1, {}, _LARGER),
        "warm-up, ZeRO 2": ("warmup", 2, 1, {}, _LARGER),
        "warm-up, ZeRO 2, checkpointing": ("warmup", 2, 1, {}, _LARGER | {"activation_checkpointing": True}),
        "warm-up, ZeRO 3": ("warmup", 3, 1, {}, _LARGER),
        "joint, ZeRO 2": ("joint", 2, 1, {}, _LARGER),
        "joint as vanilla GRPO, ZeRO 2": ("joint", 2, 1, {}, _LARGER | VANILLA),
        "joint, ZeRO 2, optimizer offloaded": ("joint", 2, 1, _OFFLOAD, _LARGER),
        "joint, ZeRO 3": ("joint", 3, 1, {}, _LARGER),
    },
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for models and runs")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--gpu", type=Path, metavar="CLUSTER", help="run on a GPU; the cluster file that describes it")
    arguments = parser.parse_args()
    bench = ON_CPU if arguments.gpu is None else ON_GPU
    cases = {name: case for name, case in bench.cases.items() if arguments.only is None or arguments.only in name}
    folder = arguments.folder.resolve()
    # In a process of its own, that leaves nothing on the GPU.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(prepare, folder / "model", bench.model, bench).result()
    if arguments.gpu is not None:
        beside_a_gpu(folder / "model", cases, bench, load_cluster(arguments.gpu))
        return
    prepare(folder / "no-model", NO_MODEL, bench)
    print("| run | memory, plan / measured | measured, MiB | " + "sent, plan / measured | measured, MiB |")
    print("|---|---|---|---|---|")
    bare: dict[str, float] = {}
    for name, case in cases.items():
        stage = case[0]
        if stage not in bare:
            nothing = run_case(folder / "no-model", f"nothing, {stage}", (stage, 2, 2, {}, {}), bench)
            bare[stage] = nothing.memory - nothing.planned_memory
        run = run_case(folder / "model", name, case, bench)
        measured = run.memory - bare[stage]
        ratio = run.planned_sent / run.sent if run.sent else 1
        print(
            f"| {name} | {run.planned_memory / measured:.3f} | {measured / 2**20:.0f} | {ratio:.4f} "
            f"| {run.sent / 2**20:.1f} |",
            flush=True,
        )


def beside_a_gpu(folder: Path, cases: Mapping[str, Case], bench: Bench, cluster: Cluster) -> None:
    """Memory of the allocator and the time of a step, the median of all but the first."""
    head = ("run", "memory, plan / measured", "measured, GiB", "beside it, GiB", "time, plan / measured", "measured, s")
    print(f"| {' | '.join(head)} | MFU | device |\n{'|---' * 8}|")
    for name, case in cases.items():
        run = run_case(folder, name, case, bench)
        estimate = estimate_step(run.student, run.teacher, run.layout, run.work, cluster)
        utilisation = sum(estimate.flops.values()) / run.seconds / estimate.peak_flops_per_s
        print(
            f"| {name} | {run.planned_memory / run.memory:.3f} | {run.memory / 2**30:.2f} | {run.overhead / 2**30:.2f} "
            f"| {estimate.step_s / run.seconds:.2f} | {run.seconds:.2f} | {utilisation:.3f} | {run.device} |",
            flush=True,
        )


def prepare(folder: Path, sizes: Mapping[str, int], bench: Bench) -> None:
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
    for name, config in {"student": student, "teacher": Qwen3Config(**common)}.items():
        with torch.device("cuda" if bench.on_gpu else "cpu"):
            dtype = torch.bfloat16 if bench.on_gpu else torch.float32
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    solution = SOLUTION * bench.repeats
    rows = [{"question": f"{n:03d}{QUESTION}", "solution": solution, "answer": str(n)} for n in range(64)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a rank used in the second step, and what the plan says of it; means over ranks, bytes and seconds."""

    memory: float
    planned_memory: float
    sent: float
    planned_sent: float
    seconds: float
    """A step's, the median of all but the first."""
    device: str
    """Name of the GPU."""
    overhead: float
    """That it gave out beside the allocator's."""
    student: ModelShape
    teacher: ModelShape
    layout: Layout
    work: Workload


def run_case(folder: Path, name: str, case: Case, bench: Bench) -> Run:
    stage, zero_stage, experts_over, zero, overrides = case
    label = name.replace(", ", "-").replace(" ", "")
    tree = {
        "zero_optimization": {"stage": zero_stage, **zero},
        "gradient_clipping": 1.0,
        "expert_parallel": {"enabled": True, "autoep_size": experts_over, "use_grouped_mm": bench.on_gpu},
        **({"bf16": {"enabled": True}} if bench.on_gpu else {}),
    }
    shutil.rmtree(folder / label, ignore_errors=True)  # of an earlier benchmark
    run = write_run(folder, label, stage, tree, bench)
    options = [f"{key}={value}" for key, value in overrides.items()]
    ranks = watched_run(folder, label, run, options, bench)
    config = load_run_config(run, options)
    student, teacher = (shape(folder / name) for name in ("student", "teacher"))
    layout = layout_of(tree, bench.world, experts_over)
    prompt, response = lengths(stage, config.rollout.max_new_tokens, bench)
    work = workload_of(config, bench.world, prompt, response)
    return Run(
        memory=mean([rank["memory"]["step 1"] - rank["memory"]["imported"] for rank in ranks]),
        planned_memory=plan_memory(student, teacher, layout, work, on_cpu=not bench.on_gpu).peak,
        sent=sum(sent_by_kind(ranks).values()),
        planned_sent=sum(one.sent for one in step_transfers(student, teacher, layout, work)),
        seconds=mean([median(rank["seconds"][1:]) for rank in ranks]),
        device=ranks[0].get("device", ""),
        overhead=mean([rank.get("overhead", 0) for rank in ranks]),
        student=student,
        teacher=teacher,
        layout=layout,
        work=work,
    )


def shape(folder: Path) -> ModelShape:
    return shape_of(read_config(str(folder)), str(folder))


def lengths(stage: str, max_new_tokens: int, bench: Bench) -> tuple[int, int]:
    """Tokens of prompt and response of every row; a random model does not end a response before it must."""
    tokenizer = make_tokenizer()
    prompt = len(tokenizer(f"000{QUESTION}").input_ids)
    return prompt, len(tokenizer(SOLUTION * bench.repeats).input_ids) + 1 if stage == "warmup" else max_new_tokens


def write_run(folder: Path, label: str, stage: str, tree: dict[str, Any], bench: Bench) -> Path:
    (folder / f"{label}.json").write_text(json.dumps(tree))
    run = {
        "stage": stage,
        "run_dir": str(folder / label / "run"),
        "deepspeed": str(folder / f"{label}.json"),
        "steps": bench.steps,
        "micro_batch_size": 2,
        "model": {"student": str(folder / "student"), "teacher": str(folder / "teacher")},
        "data": {
            "source": str(folder / "data.jsonl"),
            "part": "all",
            "fields": {"solution": "solution"},
            "max_target_tokens": 1024,
        },
        "optimizer": {"learning_rate": 1e-5},
        "warmup": {"batch_size": 4, "init_weight": 0},
        "rollout": {"prompts": bench.prompts, "group_size": 4, "max_new_tokens": bench.new_tokens},
        "policy": {"updates_per_rollout": 2},
        "log": {"gradients_every_steps": 0, "tensorboard": False},
    }
    path = folder / f"{label}.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def watched_run(folder: Path, label: str, run: Path, options: list[str], bench: Bench) -> list[dict[str, Any]]:
    """What tools/watched_train.py tells of every rank.

    Memory that is given back goes back to the system at once, so that what a process holds is what it uses.
    """
    at_once = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "MALLOC_ARENA_MAX": "1",
    }
    command = ["tools/watched_train.py", str(folder / label), "--config", str(run), *options]
    launch(bench.world, command, {} if bench.on_gpu else {**at_once, **ONE_THREAD_CPU})
    return [json.loads((folder / label / f"rank_{rank}.json").read_text()) for rank in range(bench.world)]


def sent_by_kind(ranks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bytes that a rank sends on the mean, by kind of collective, each run as a ring, which sends a sum twice."""
    sent: Counter[str] = Counter()
    for rank in ranks:
        for moved, count in rank["traffic"].items():
            kind, _, size = moved.partition(" over ")
            times = (2 if kind == "all_reduce" else 1) * (int(size) - 1) / int(size)
            sent[kind] += times * count / len(ranks)
    return dict(sent)


ONE_THREAD_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def launch(world: int, command: list[str], environment: Mapping[str, str]) -> None:
    """A Python script of this repository on `world` ranks; RuntimeError with its last words if it fails."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    variables = os.environ | dict(environment)
    done = subprocess.run([*torchrun, *command], cwd=REPOSITORY, env=variables, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    run_cli(main)
