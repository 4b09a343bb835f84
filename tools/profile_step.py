"""Where the seconds of a training step go, and how near it is to the rate of its own matrix products.

Takes steps of a run's configuration, of any stage, first by the clock and then under torch's profiler, whose times of
operations are summed by kind: the CPU's where that computes, else the GPU's. The products of the step are then run
alone, at the same shapes (grouped ones as one of all their rows), in bf16 on a GPU and fp32 on a CPU: their time over
the step's says how near it is to the rate at which the machine does them. All of the step's products count, those of
the teacher, of scoring and of what is computed twice too; fused attention does not.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from padd_ds.config.load import load_run_config
from padd_ds.engine.ranks import start_ranks, stop_ranks
from padd_ds.errors import UserError, run_cli
from padd_ds.stages.build import open_stage, read_inputs
from padd_ds.train import quiet_libraries
from tools.measuring import timed

PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1, "aten::_grouped_mm": 0}
"""Operations, to the place of their left factor; the right one follows."""
KINDS = {
    "attention": ("attention",),
    "optimizer": ("adamw", "Optimizer"),
    "communication": ("c10d", "gloo", "nccl", "comms"),
    "softmax and cross-entropy": ("softmax", "logsumexp", "nll_loss", "cross_entropy"),
    "gathering and scattering": (
        *("index", "gather", "scatter", "sort", "topk", "cumsum", "repeat_interleave", "aten::cat", "embedding"),
        *("nonzero", "bincount", "histc"),
    ),
    "copies": ("copy", "clone", "contiguous", "fill_", "zero", "aten::to"),
}
"""Parts of the names of operations; what fits none is `OTHERS`."""
OTHERS, PYTHON = "elementwise and others", "Python, waiting"
ALONE_SHARE = 0.98
"""Of the operations that is run alone; the smallest products are taken to be as fast as these."""


@dataclass(frozen=True)
class Product:
    """A matrix product of [batch, rows, inner] and [batch, inner, columns]."""

    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.rows * self.inner * self.columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="run file, as of padd_ds/train.py")
    parser.add_argument("--steps", type=int, default=3, help="by the clock, and as many profiled (default %(default)s)")
    parser.add_argument("--skip", type=int, default=2, help="steps before, which warm up (default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as of padd_ds/train.py")
    arguments = parser.parse_intermixed_args()
    if arguments.steps < 1 or arguments.skip < 0:
        raise UserError(f"--steps {arguments.steps} must be at least 1 and --skip {arguments.skip} at least 0")
    ranks = start_ranks()
    quiet_libraries()
    on_gpu = ranks.device.type == "cuda"
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        config = load_run_config(arguments.config, [*arguments.overrides, f"run_dir={scratch}/run"])
        stage = stack.enter_context(open_stage(read_inputs(config, ranks.world), ranks))
        for step in range(arguments.skip):
            stage.step(step)
        clocked = range(arguments.skip, arguments.skip + arguments.steps)
        steps = [timed(lambda step=step: stage.step(step), ranks.device) for step in clocked]  # type: ignore[misc]
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities, record_shapes=True) as profiled:
            # The same ones again, so that both ways do the same work.
            walls_s = [timed(lambda step=step: stage.step(step), ranks.device)[1] for step in clocked]  # type: ignore[misc]
    step_s = statistics.median(taken for _, taken in steps)
    phases = mean_phases([report.metrics for report, _ in steps])
    if ranks.is_main:
        events = [event for event in profiled.key_averages(group_by_input_shape=True) if of_host(event)]
        shares = shares_by_kind(events, sum(walls_s), on_gpu)
        products = products_of(events)
        alone_s = seconds_alone(products, ranks.device, torch.bfloat16 if on_gpu else torch.float32) / len(walls_s)
        flops = sum(product.flops * count for product, count in products.items()) / len(walls_s)
        print(report_of(config.stage, step_s, phases, shares, flops, alone_s))
        where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
        print(f"{where}, {ranks.world} ranks, torch {torch.__version__}; {len(walls_s)} steps each way")
    stop_ranks()


def mean_phases(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds by phase, as the steps themselves tell them."""
    names = [name for name in metrics[0] if name.startswith("seconds_")]
    return {name.removeprefix("seconds_"): statistics.fmean(one[name] for one in metrics) for name in names}


def of_host(event: Any) -> bool:
    """Kernels are told under the operations that start them."""
    return bool(event.device_type == DeviceType.CPU)


def shares_by_kind(events: Iterable[Any], wall_s: float, on_gpu: bool) -> dict[str, float]:
    """Share of the wall time by kind of operation; what no operation takes is PYTHON."""
    seconds = dict.fromkeys(("matrix products", *KINDS, OTHERS), 0.0)
    for event in events:
        taken_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[kind_of(event.key)] += taken_us / 1e6
    shares = {kind: taken_s / wall_s for kind, taken_s in seconds.items()}
    return shares | {PYTHON: 1 - sum(shares.values())}


def kind_of(name: str) -> str:
    """The kind of an operation."""
    if name in PRODUCTS:
        return "matrix products"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHERS)


def products_of(events: Iterable[Any]) -> dict[Product, int]:
    """The matrix products among the operations, with their counts."""
    counts: dict[Product, int] = {}
    for event in events:
        if event.key in PRODUCTS:
            product = product_of(event.input_shapes[PRODUCTS[event.key] :])
            counts[product] = counts.get(product, 0) + event.count
    return counts


def product_of(shapes: Sequence[Sequence[int]]) -> Product:
    """From the shapes of its factors; a grouped one is told as the product of all its rows."""
    left, right = shapes[0], shapes[1]
    batch = left[0] if len(left) == len(right) == 3 else 1
    return Product(batch, left[-2], left[-1], right[-1])


def seconds_alone(products: Mapping[Product, int], device: torch.device, dtype: torch.dtype) -> float:
    """Of all products, each the best of five by itself."""
    whole = sum(product.flops * count for product, count in products.items())
    taken_s = done = 0.0
    for product, count in sorted(products.items(), key=lambda item: -item[0].flops * item[1]):
        if done >= ALONE_SHARE * whole:
            break
        left = torch.randn(product.batch, product.rows, product.inner, device=device, dtype=dtype)
        right = torch.randn(product.batch, product.inner, product.columns, device=device, dtype=dtype)
        if product.batch == 1:
            left, right = left[0], right[0]
        taken_s += count * min(timed(lambda a=left, b=right: a @ b, device)[1] for _ in range(5))  # type: ignore[misc]
        done += product.flops * count
    return taken_s * whole / done if done else 0.0


def report_of(
    stage: str, step_s: float, phases: Mapping[str, float], shares: Mapping[str, float], flops: float, alone_s: float
) -> str:
    """The table, and the utilisation."""
    whole_s = sum(phases.values())
    lines = [f"{stage}: {step_s:.3g} s a step", ""]
    if len(phases) > 1:
        lines[0] += " (" + ", ".join(f"{name} {100 * taken / whole_s:.0f} %" for name, taken in phases.items()) + ")"
    lines += ["| what | share of the step's time |", "|---|---|"]
    lines += [f"| {kind} | {100 * share:.1f} % |" for kind, share in shares.items()]
    lines += ["", f"Matrix products: {flops / 1e9:.4g} GFLOP a step; alone at the same shapes they take"]
    lines.append(f"{alone_s:.3g} s ({flops / alone_s / 1e9:.4g} GFLOP/s), {alone_s / step_s:.3f} of the step.")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
