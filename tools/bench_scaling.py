"""Weak scaling on CPU ranks: the same work for every rank, on one rank and on more.

A rank's tokens per second, beside those of one rank alone, and the bytes that it sends for a token that it trains on,
by kind of collective: counted in the second step by tools/watched_train.py, each collective run as a ring. With more
ranks than cores the speeds tell of the cores; the bytes are exact.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tqdm import tqdm

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from padd_ds.errors import run_cli
from tools.bench_plan import ON_CPU, ONE_THREAD_CPU, SMALL_WINDOW, launch, prepare, sent_by_kind, watched_run, write_run

MODEL = {"layers": 4, "width": 256, "slice": 128, "experts": 16, "top_k": 4, "vocabulary": 2000}
RANKS = (1, 2, 4)
ROWS = {"warmup": ("warmup.batch_size", 4), "joint": ("rollout.prompts", 2)}
"""Stage -> the option that says how much a step has to do, and its value for one rank."""
KINDS = {
    "all_reduce": ("all_reduce",),
    "all_gather": ("all_gather", "all_gather_into_tensor"),
    "reduce_scatter": ("reduce", "reduce_scatter", "reduce_scatter_tensor"),
    "all_to_all": ("all_to_all_single",),
    "broadcast": ("broadcast",),
}
"""Column of the table -> collectives of torch."""


class Case(NamedTuple):
    stage: str
    zero_stage: int
    world: int
    experts_over: int


class Measured(NamedTuple):
    tokens_per_s: float | None
    """Of a rank, the median of the steps behind the first; None where no speed was asked for."""
    sent: dict[str, float]
    """Bytes of a rank for a token that it trains on, by column."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for models and runs")
    parser.add_argument("--most-ranks", type=int, default=RANKS[-1], help="leave out layouts of more ranks")
    parser.add_argument("--steps", type=int, default=6, help="of a run whose speed is measured; the first is left out")
    parser.add_argument("--bytes-only", action="store_true", help="measure no speed, for a machine that is not idle")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2")
    folder = arguments.folder.resolve()
    prepare(folder, MODEL, ON_CPU)
    steps = 0 if arguments.bytes_only else arguments.steps
    found = {
        case: measure(folder, case, steps)
        for case in tqdm(all_cases(arguments.most_ranks), unit="layout", dynamic_ncols=True)
    }
    print(f"{os.cpu_count()} cores, a thread a rank\n")
    print(table(found))


def all_cases(most_ranks: int) -> list[Case]:
    """Every stage at ZeRO 2 and 3, the experts of a rank its own or those of all ranks."""
    return [
        Case(stage, zero_stage, world, experts_over)
        for stage in ROWS
        for zero_stage in (2, 3)
        for world in RANKS
        if world <= most_ranks
        for experts_over in sorted({1, world})
    ]


def measure(folder: Path, case: Case, steps: int) -> Measured:
    """Bytes, by a run of two steps that is watched, and with `steps` the speed too, by one that is left alone."""
    label = f"{case.stage}-zero{case.zero_stage}-ep{case.experts_over}-of-{case.world}"
    # The whole of ZeRO-3: nothing stays gathered because it is small or will be wanted again.
    spread = {"stage3_param_persistence_threshold": 0, **SMALL_WINDOW} if case.zero_stage == 3 else {}
    tree = {
        "zero_optimization": {"stage": case.zero_stage, **spread},
        "gradient_clipping": 1.0,
        "expert_parallel": {"enabled": True, "autoep_size": case.experts_over, "use_grouped_mm": False},
    }
    shutil.rmtree(folder / label, ignore_errors=True)  # of an earlier benchmark
    bench = replace(ON_CPU, world=case.world)
    run = write_run(folder, label, case.stage, tree, bench)
    key, rows = ROWS[case.stage]
    options = [f"{key}={rows * case.world}", f"checkpoint.every_steps={max(steps, 2)}"]
    ranks = watched_run(folder, label, run, options, bench)
    tokens = trained_tokens(metrics(folder / label / "run")[1]) / case.world
    by_kind = sent_by_kind(ranks)
    sent = {name: sum(by_kind.get(kind, 0.0) for kind in kinds) / tokens for name, kinds in KINDS.items()}
    if steps == 0:
        return Measured(None, sent)
    shutil.rmtree(folder / label / "run")
    launch(case.world, ["padd_ds/train.py", "--config", str(run), *options, f"steps={steps}"], ONE_THREAD_CPU)
    speeds = [trained_tokens(line) / step_seconds(line) / case.world for line in metrics(folder / label / "run")[1:]]
    return Measured(median(speeds), sent)


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def trained_tokens(line: dict[str, float]) -> int:
    """Of all ranks in a step, prompts included."""
    return round(line["tokens_per_second_update"] * line["seconds_update"])


def step_seconds(line: dict[str, float]) -> float:
    """Rollout, scoring and updates."""
    return sum(value for name, value in line.items() if name.startswith("seconds_"))


def table(found: dict[Case, Measured]) -> str:
    """A row per layout; the speed beside that of one rank of the same stage and ZeRO stage."""
    sent = " | ".join(f"{name}, bytes a token" for name in KINDS)
    lines = [f"| stage | ZeRO | ranks | experts over | tokens/s of a rank, to one rank | {sent} |"]
    lines.append("|---" * (5 + len(KINDS)) + "|")
    for case, measured in found.items():
        alone: Any = found[case._replace(world=1, experts_over=1)].tokens_per_s
        speed = "" if measured.tokens_per_s is None else f"{measured.tokens_per_s / alone:.2f}"
        cells = [case.stage, case.zero_stage, case.world, case.experts_over, speed]
        cells += [f"{measured.sent[name]:,.0f}" for name in KINDS]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
