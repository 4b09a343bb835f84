"""Tokens per second of a training step of the student: this trainer's expert paths beside the Hugging Face class.

The same random student, batch and loss in one process, AdamW's update included; variants take their steps in turn, and
each is compared with the same turn of the fastest Hugging Face one. Model FLOPs utilisation is against the rate of one
large matrix product, measured in the same run.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM

from padd_ds.config.schema import RunConfig
from padd_ds.engine.ranks import start_ranks, stop_ranks
from padd_ds.engine.student import build_student
from padd_ds.errors import run_cli
from padd_ds.hf import read_config
from padd_ds.planning.compute import forward_flops
from padd_ds.planning.shape import shape_of
from padd_ds.train import quiet_libraries
from tools.bench_plan import ON_CPU, ON_GPU, prepare
from tools.measuring import timed

HUGGING_FACE = ("eager", "batched_mm", "grouped_mm")
OURS = ("dispatched", "masked")
LEARNING_RATE = 1e-5
Step = Callable[[torch.Tensor], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="sequences of a batch (default: 8 on a GPU, else 2)")
    parser.add_argument("--tokens", type=int, help="of a sequence (default: 1024 on a GPU, else 128)")
    parser.add_argument("--experts", type=int, help="routed experts of a layer, at equal active and total size")
    parser.add_argument("--steps", type=int, default=6, help="of every variant, one more first (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=(*HUGGING_FACE, *OURS), default=[*HUGGING_FACE[1:], *OURS])
    arguments = parser.parse_args()
    ranks = start_ranks()
    quiet_libraries()
    on_gpu = ranks.device.type == "cuda"
    bench = ON_GPU if on_gpu else ON_CPU
    shape = dict(bench.model)
    if arguments.experts:
        factor = arguments.experts / shape["experts"]
        shape |= {
            "experts": arguments.experts,
            "top_k": round(shape["top_k"] * factor),
            "slice": round(shape["slice"] / factor),
        }
    rows, tokens = arguments.rows or (8 if on_gpu else 2), arguments.tokens or (1024 if on_gpu else 128)
    generator = torch.Generator().manual_seed(0)
    batch_BT = torch.randint(3, shape["vocabulary"], (rows, tokens), generator=generator).to(ranks.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, shape, bench)
        steps = {name: step_of(name, folder / "student", ranks, rows, on_gpu) for name in arguments.only}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(arguments.steps + 1):
            for name, step in steps.items():
                taken_s = timed(partial(step, batch_BT), ranks.device)[1]
                if turn > 0:
                    seconds[name].append(taken_s)
        model = shape_of(read_config(str(folder / "student")), "the student")
    flops = 3 * forward_flops(model, rows * tokens, tokens, rows * tokens)
    rate = gemm_rate(ranks.device)
    print(table(seconds, rows * tokens, flops, rate))
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    print(f"\n{model.parameters / 1e9:.2f}e9 parameters, {model.active_parameters / 1e9:.2f}e9 active; {shape}")
    product = f"a matrix product {rate / 1e12:.3g} TFLOP/s"
    print(f"{rows} rows of {tokens} tokens; {where}, torch {torch.__version__}, {product}")
    stop_ranks()


def step_of(name: str, student: Path, ranks: Any, rows: int, on_gpu: bool) -> Step:
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(student, dtype=dtype)
    if name in HUGGING_FACE:
        model.set_experts_implementation(name)
        model.to(ranks.device)
        # As DeepSpeed's bf16 optimizer keeps them: fp32 weights, moments and update.
        masters = [parameter.detach().float() for parameter in model.parameters()]
        optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE)
        return lambda batch_BT: plain_step(model, masters, optimizer, batch_BT)
    unused = {"run_dir": "unused", "deepspeed": "unused", "data": {"source": "unused"}, "steps": 1000}
    settings = {
        "stage": "joint",
        "micro_batch_size": rows,
        "model": {"student": str(student), "expert_compute": name},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "distillation": {"weight": 0},
    }
    config = TypeAdapter(RunConfig).validate_python(unused | settings)
    tree = {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 1.0,
        "expert_parallel": {"enabled": True, "autoep_size": 1, "use_grouped_mm": on_gpu},
        **({"bf16": {"enabled": True}} if on_gpu else {}),
    }
    ours = build_student(
        model, config, tree, ranks, trainable=lambda name: True, accumulation_steps=1, total_steps=1000
    )

    def step(batch_BT: torch.Tensor) -> None:
        ours.engine.train()
        ours.backward(loss_of(ours.engine, batch_BT))
        ours.step()

    return step


def plain_step(
    model: Any, masters: list[torch.Tensor], optimizer: torch.optim.Optimizer, batch_BT: torch.Tensor
) -> None:
    model.train()
    loss_of(model, batch_BT).backward()
    for master, parameter in zip(masters, model.parameters(), strict=True):
        master.grad, parameter.grad = parameter.grad.float(), None
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    with torch.no_grad():
        for master, parameter in zip(masters, model.parameters(), strict=True):
            parameter.copy_(master)
            master.grad = None


def loss_of(model: Any, batch_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV = model(input_ids=batch_BT, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), batch_BT[:, 1:].flatten())


def gemm_rate(device: torch.device) -> float:
    """Operations a second of a square matrix product, the best of ten."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: left @ right, device)[1] for _ in range(10))


def table(seconds: dict[str, list[float]], tokens: int, flops: float, rate: float) -> str:
    """A row per variant; ratios are medians over turns, in brackets their interquartile range."""
    theirs = [name for name in seconds if name in HUGGING_FACE] or list(seconds)
    base = min(theirs, key=lambda name: statistics.median(seconds[name]))
    lines = [f"| experts | tokens/s beside {base} | tokens/s | MFU |", "|---|---|---|---|"]
    for name, taken in seconds.items():
        ratios = [other / one for one, other in zip(taken, seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        step_s = statistics.median(taken)
        who = "transformers" if name in HUGGING_FACE else "padd_ds"
        lines.append(
            f"| {who}, {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {tokens / step_s:.0f} "
            f"| {flops / step_s / rate:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
