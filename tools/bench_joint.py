"""What a PADD step costs over one of vanilla GRPO, part by part: time in one process, memory in one each.

The same student, prompts and seed under each variant; steps are taken in turn, and the medians compared.
"""

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from deepspeed.accelerator import get_accelerator

from padd_ds.config.load import load_run_config
from padd_ds.engine.ranks import start_ranks, stop_ranks
from padd_ds.errors import run_cli
from padd_ds.launcher import launched_rank
from padd_ds.stages.build import open_stage, read_inputs
from padd_ds.train import quiet_libraries
from tools.measuring import in_own_process, peak_mib

PHASES = ("rollout", "scoring", "update")
VANILLA = ["policy.objective=grpo", "distillation.weight=0", "balance.kind=loss_free"]
VARIANTS = {
    "vanilla GRPO": VANILLA,
    "+ PR-GRPO (III)": [*VANILLA, "policy.objective=pr_grpo"],
    "+ reward-augmented balance (IV)": ["distillation.weight=0"],
    "+ distillation (II): PADD": [],
}
"""Each with all parts of those before it. The router's shift is telemetry of all of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", required=True, type=Path, help="warmed-up student")
    parser.add_argument("--teacher", required=True, type=Path, help="its dense teacher")
    parser.add_argument("--data", required=True, type=Path, help="problems (JSONL)")
    parser.add_argument("--config", type=Path, default=Path("ds_configs/runs/repro_joint.yaml"))
    parser.add_argument("--steps", type=int, default=8, help="of every variant, one more first (default %(default)s)")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all variants")
    arguments = parser.parse_intermixed_args()
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps} is too few for a spread; take 2 or more")
    if arguments.only is not None:
        measure(arguments, [arguments.only])
        print(json.dumps(peak_mib(torch.device(get_accelerator().device_name()))))
        return
    memory = {} if launched_rank() is not None else {name: in_own_process(name) for name in VARIANTS}
    seconds = measure(arguments, list(VARIANTS))
    if launched_rank() in (None, 0):
        print(table(seconds, memory))


def measure(arguments: argparse.Namespace, names: list[str]) -> dict[str, list[dict[str, float]]]:
    """Seconds by phase of every step of the variants, without the first, which warms up."""
    ranks = start_ranks()
    quiet_libraries()
    # So small a rate that all variants draw responses of the same lengths.
    same = [f"model.student={arguments.student}", f"model.teacher={arguments.teacher}"]
    same += [f"data.source={arguments.data}", "optimizer.learning_rate=1e-9", "log.gradients_every_steps=0"]
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        stages = {}
        for name in names:
            overrides = [f"run_dir={scratch}/run", *same, *VARIANTS[name], *arguments.overrides]
            config = load_run_config(arguments.config, overrides)
            stages[name] = stack.enter_context(open_stage(read_inputs(config, ranks.world), ranks))
        for step in range(arguments.steps + 1):
            for name, stage in stages.items():
                metrics = stage.step(step).metrics
                if step > 0:
                    seconds[name].append({phase: metrics[f"seconds_{phase}"] for phase in PHASES})
    stop_ranks()
    return seconds


def table(seconds: dict[str, list[dict[str, float]]], memory: dict[str, float]) -> str:
    """Median over steps of the ratio to the first variant's same step, whole and by phase as shares of its step.

    In brackets its interquartile range; `memory`: peak MiB by variant, where it was measured.
    """
    first = next(iter(seconds.values()))
    lines = ["| variant | step | " + " | ".join(PHASES) + " | peak memory |", "|---" * (3 + len(PHASES)) + "|"]
    for name, steps in seconds.items():
        pairs = [(one, other, sum(other.values())) for one, other in zip(steps, first, strict=True)]
        low, whole, high = statistics.quantiles([sum(one.values()) / base for one, _, base in pairs], n=4)
        added = [
            statistics.median((one[phase] - other[phase]) / base for one, other, base in pairs) for phase in PHASES
        ]
        shares = " | ".join(f"{100 * share:+.1f} %" for share in added)
        held = f"{memory[name]:.0f} MiB" if name in memory else ""
        lines.append(f"| {name} | {whole:.3f} ({low:.3f} to {high:.3f}) | {shares} | {held} |")
    base_s = statistics.median(sum(step.values()) for step in first)
    parts = [statistics.median(step[phase] for step in first) / base_s for phase in PHASES]
    spent = ", ".join(f"{phase} {100 * share:.0f} %" for phase, share in zip(PHASES, parts, strict=True))
    return "\n".join([*lines, "", f"{next(iter(seconds))}: {base_s:.2f} s a step ({spent})"])


if __name__ == "__main__":
    run_cli(main)
