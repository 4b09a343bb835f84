"""Tokens per second of a training step of the student: this trainer's expert paths beside the Hugging Face class.

The same random student, batch and loss in one process, the update by torch's fused AdamW included; variants take their
steps in turn, and each is compared with the same turn of the fastest Hugging Face one. Model FLOPs utilisation is
against the rate of one large matrix product, measured in the same run. With several --experts, a table for each.
"""

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM

from padd_ds.config.schema import RunConfig
from padd_ds.engine.ranks import Ranks, start_ranks, stop_ranks
from padd_ds.engine.student import build_student
from padd_ds.errors import UserError, run_cli
from padd_ds.hf import read_config
from padd_ds.planning.compute import forward_flops
from padd_ds.planning.shape import shape_of
from padd_ds.train import quiet_libraries
from tools.bench_plan import ON_CPU, ON_GPU, prepare
from tools.measuring import timed

HUGGING_FACE = ("eager", "batched_mm", "grouped_mm")
OURS = {"dispatched": ("dispatched", 0), "masked": ("masked", 0), "dispatched-zero2": ("dispatched", 2)}
"""Name, to model.expert_compute and the ZeRO stage."""
SHAPES = {
    # Four layers of Qwen2.5-7B's width and vocabulary; widths that grouped products take, for 8 to 64 experts.
    "cuda": {"layers": 4, "width": 3584, "slice": 1152, "experts": 16, "top_k": 8, "vocabulary": 152064},
    "cpu": ON_CPU.model,
}
LEARNING_RATE = 1e-5
Step = Callable[[torch.Tensor], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="sequences of a batch (default: 8 on a GPU, else 2)")
    parser.add_argument("--tokens", type=int, help="of a sequence (default: 1024 on a GPU, else 128)")
    parser.add_argument(
        "--experts", type=int, nargs="+", default=[16], help="routed experts of a layer, at equal active and total size"
    )
    parser.add_argument("--steps", type=int, default=6, help="of every variant, one more first (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=(*HUGGING_FACE, *OURS), default=["grouped_mm", *OURS])
    arguments = parser.parse_args()
    ranks = start_ranks()
    quiet_libraries()
    on_gpu = ranks.device.type == "cuda"
    rows, tokens = arguments.rows or (8 if on_gpu else 4), arguments.tokens or (1024 if on_gpu else 128)
    rate = gemm_rate(ranks.device)
    for n_experts in arguments.experts:
        shape = with_experts(SHAPES[ranks.device.type], n_experts)
        compare(shape, arguments, ranks, rows, tokens, rate)
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    product = f"a matrix product {rate / 1e12:.3g} TFLOP/s"
    print(f"\n{rows} rows of {tokens} tokens; {where}, torch {torch.__version__}, {product}")
    stop_ranks()


def with_experts(shape: Mapping[str, int], n_experts: int) -> dict[str, int]:
    """The shape with so many routed experts of equal active and total size."""
    slice_width, rest = divmod(shape["slice"] * shape["experts"], n_experts)
    top_k, odd = divmod(shape["top_k"] * n_experts, shape["experts"])
    if rest or odd:
        raise UserError(f"--experts {n_experts}: {shape} cannot be cut into so many at equal size")
    return {**shape, "experts": n_experts, "top_k": top_k, "slice": slice_width}


def compare(
    shape: dict[str, int], arguments: argparse.Namespace, ranks: Ranks, rows: int, tokens: int, rate: float
) -> None:
    """Print the table of one shape."""
    generator = torch.Generator().manual_seed(0)
    batch_BT = torch.randint(3, shape["vocabulary"], (rows, tokens), generator=generator).to(ranks.device)
    on_gpu = ranks.device.type == "cuda"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, shape, ON_GPU if on_gpu else ON_CPU)
        model = shape_of(read_config(str(folder / "student")), "the student")
        seconds: dict[str, list[float]] = {name: [] for name in arguments.only}
        # Models of a GPU's size do not stand in it beside each other.
        for together in [[name] for name in arguments.only] if on_gpu else [arguments.only]:
            with ExitStack() as stack:
                steps = {
                    name: stack.enter_context(step_of(name, folder / "student", ranks, rows, on_gpu))
                    for name in together
                }
                for turn in range(arguments.steps + 1):
                    for name, step in steps.items():
                        taken_s = timed(partial(step, batch_BT), ranks.device)[1]
                        if turn > 0:
                            seconds[name].append(taken_s)
                del steps, step
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
    flops = 3 * forward_flops(model, rows * tokens, tokens, rows * tokens)
    print(f"{model.parameters / 1e9:.2f}e9 parameters, {model.active_parameters / 1e9:.2f}e9 active; {shape}\n")
    print(table(seconds, rows * tokens, flops, rate), flush=True)


@contextmanager
def step_of(name: str, student: Path, ranks: Any, rows: int, on_gpu: bool) -> Iterator[Step]:
    """A training step of that name; its model goes with the block."""
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(student, dtype=dtype)
    if name in HUGGING_FACE:
        model.set_experts_implementation(name)
        model.to(ranks.device)
        # As DeepSpeed's bf16 optimizer keeps them: fp32 weights, moments and update.
        masters = [parameter.detach().float() for parameter in model.parameters()]
        optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, fused=True)
        yield lambda batch_BT: plain_step(model, masters, optimizer, batch_BT)
        return
    expert_compute, zero_stage = OURS[name]
    unused = {"run_dir": "unused", "deepspeed": "unused", "data": {"source": "unused"}, "steps": 1000}
    settings = {
        "stage": "joint",
        "micro_batch_size": rows,
        "model": {"student": str(student), "expert_compute": expert_compute},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "distillation": {"weight": 0},
    }
    config = TypeAdapter(RunConfig).validate_python(unused | settings)
    tree = {
        "zero_optimization": {"stage": zero_stage},
        "gradient_clipping": 1.0,
        "expert_parallel": {"enabled": True, "autoep_size": 1, "use_grouped_mm": True},
        **({"bf16": {"enabled": True}} if on_gpu else {}),
    }
    ours = build_student(
        model, config, tree, ranks, trainable=lambda name: True, accumulation_steps=1, total_steps=1000
    )

    def step(batch_BT: torch.Tensor) -> None:
        ours.engine.train()
        ours.backward(loss_of(ours.engine, batch_BT))
        ours.step()

    yield step
    ours.engine.destroy()


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
