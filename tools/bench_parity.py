"""Losses and gradient norms of every layout of a small run against the same run elsewhere, as a table.

The warm-up is held against one process. Joint training is held against ZeRO 1 without expert parallelism on as many
ranks, since every rank draws its own responses.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from padd_ds.errors import run_cli
from tools.bench_plan import ON_CPU, ONE_THREAD_CPU, launch, prepare

MODEL = {"layers": 2, "width": 64, "slice": 16, "experts": 8, "top_k": 2, "vocabulary": 128}
RANKS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
"""(ranks, ranks that share the experts)."""
ZERO_STAGES = (0, 1, 2, 3)
STEPS = 3
LOSSES = {"warmup": ("loss_lm", "loss_kd"), "joint": ("loss_policy", "loss_kd")}
SIZES = {"loss_policy": 1.0}
"""Of what a loss sums up, where that cancels: ratios near 1 times advantages with standard deviation 1."""
Layout = tuple[int, int, int]
"""Ranks, ranks that share the experts, ZeRO stage."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for models and runs")
    parser.add_argument("--most-ranks", type=int, default=4, help="leave out layouts of more ranks")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    prepare(folder, MODEL, ON_CPU)
    layouts = [(*ranks, stage) for ranks in RANKS for stage in ZERO_STAGES if ranks[0] <= arguments.most_ranks]
    cases = [(stage, layout) for stage in LOSSES for layout in layouts]
    found = {case: run_case(folder, *case) for case in tqdm(cases, unit="run", dynamic_ncols=True)}
    print(
        "| ranks | experts over | ZeRO | "
        + " | ".join(f"{stage}: {what}" for stage in LOSSES for what in COLUMNS)
        + " |"
    )
    print("|---" * (3 + len(LOSSES) * len(COLUMNS)) + "|")
    for layout in layouts:
        cells = [
            cell for stage in LOSSES for cell in compared(stage, found[stage, layout], found[reference(stage, layout)])
        ]
        print(f"| {layout[0]} | {layout[1]} | {layout[2]} | " + " | ".join(cells) + " |")


COLUMNS = ("first losses", "first gradient", f"losses of {STEPS} steps")


def reference(stage: str, layout: Layout) -> tuple[str, Layout]:
    return stage, (1 if stage == "warmup" else layout[0], 1, 1)


def compared(stage: str, found: list[dict[str, float]], expected: list[dict[str, float]]) -> list[str]:
    """The largest deviations, for `COLUMNS`, relative to what is expected or to `SIZES`; of a gradient's norm."""

    def off(steps: int, names: tuple[str, ...]) -> str:
        pairs = list(zip(found, expected, strict=True))[:steps]
        deviations = [
            abs(mine[name] - theirs[name]) / SIZES.get(name, abs(theirs[name]))
            for mine, theirs in pairs
            for name in names
        ]
        return f"{max(deviations):.0e}"

    told = "grad_norm" in found[0]
    return [off(1, LOSSES[stage]), off(1, ("grad_norm",)) if told else "not told", off(STEPS, LOSSES[stage])]


def run_case(folder: Path, stage: str, layout: Layout) -> list[dict[str, float]]:
    """The metrics of every step."""
    world, experts_over, zero_stage = layout
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    path = write_run(folder, run_dir, stage, experts_over, zero_stage)
    launch(world, ["padd_ds/train.py", "--config", str(path)], ONE_THREAD_CPU)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def write_run(folder: Path, run_dir: Path, stage: str, experts_over: int, zero_stage: int) -> Path:
    spread = {"stage3_param_persistence_threshold": 0} if zero_stage == 3 else {}
    tree = {
        "zero_optimization": {"stage": zero_stage, **spread},
        "gradient_clipping": 1.0,
        "expert_parallel": {"enabled": True, "autoep_size": experts_over, "use_grouped_mm": False},
    }
    (folder / "deepspeed.json").write_text(json.dumps(tree))
    run: dict[str, Any] = {
        "stage": stage,
        "run_dir": str(run_dir),
        "deepspeed": str(folder / "deepspeed.json"),
        "steps": STEPS,
        "micro_batch_size": 2,
        "model": {"student": str(folder / "student"), "teacher": str(folder / "teacher")},
        "data": {"source": str(folder / "data.jsonl"), "part": "all", "fields": {"solution": "solution"}},
        "optimizer": {"learning_rate": 1e-3},
        "warmup": {"batch_size": 8, "init_weight": 0},
        "rollout": {"prompts": 4, "group_size": 4, "max_new_tokens": 12},
        # Digits are common in what a random model says, so that rewards differ within a group.
        "reward": {"answer_format": "pattern", "answer_pattern": r"(\d)", "format_weight": 1.0},
        "policy": {"updates_per_rollout": 2},
        "log": {"gradients_every_steps": 0, "tensorboard": False, "report": False},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


if __name__ == "__main__":
    run_cli(main)
