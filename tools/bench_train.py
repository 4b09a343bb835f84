"""Tokens per second of a training step of the student: this trainer's expert paths beside the Hugging Face class.

The same random student, batch and loss in one process, the update by torch's fused AdamW included; variants take their
steps in turn, and each is compared with the same turn of the fastest Hugging Face one. Model FLOPs utilisation is
against the rate of one large matrix product, measured in the same run. With several --experts, a table for each.

With --config, steps of that warm-up in place of it, by the losses and batches of training itself, the teacher left
out; transformers' class takes the same problems in the order in which they are drawn, padded, by its own loss, and
trains the same parameters.
"""

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM

from padd_ds.config.load import load_run_config
from padd_ds.config.schema import RunConfig
from padd_ds.data.batches import SupervisedBatch
from padd_ds.engine.families import is_dense
from padd_ds.engine.ranks import Ranks, start_ranks, stop_ranks
from padd_ds.engine.student import build_student
from padd_ds.errors import UserError, run_cli
from padd_ds.hf import read_config
from padd_ds.planning.compute import forward_flops
from padd_ds.planning.shape import shape_of
from padd_ds.stages.build import Inputs, open_stage, read_inputs
from padd_ds.stages.materials import TrainingData
from padd_ds.stages.supervision import ProblemSupervision
from padd_ds.stages.warmup import is_trained
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
Backward = Callable[[Any], None]
"""Adds a batch's gradients to a model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="sequences of a batch (default: 8 on a GPU, else 2)")
    parser.add_argument("--tokens", type=int, help="of a sequence (default: 1024 on a GPU, else 128)")
    parser.add_argument(
        "--experts", type=int, nargs="+", help="routed experts of a layer, at equal active and total size (default: 16)"
    )
    parser.add_argument("--vocabulary", type=int, help="of the model (default: 152064 on a GPU, else 8000)")
    parser.add_argument("--config", type=Path, help="run file of a warm-up on problems, as of padd_ds/train.py")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of --config")
    parser.add_argument("--steps", type=int, default=6, help="of every variant, one more first (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=(*HUGGING_FACE, *OURS), default=["grouped_mm", *OURS])
    arguments = parser.parse_intermixed_args()
    if arguments.config is None and arguments.overrides:
        raise UserError(f"{arguments.overrides[0]}: is for --config")
    if arguments.config is not None and any(
        (arguments.rows, arguments.tokens, arguments.experts, arguments.vocabulary)
    ):
        raise UserError(
            "--rows, --tokens, --experts and --vocabulary are not for --config, whose student and batches stand in it"
        )
    ranks = start_ranks()
    quiet_libraries()
    on_gpu = ranks.device.type == "cuda"
    rows, tokens = arguments.rows or (8 if on_gpu else 4), arguments.tokens or (1024 if on_gpu else 128)
    rate = gemm_rate(ranks.device)
    if arguments.config is not None:
        compare_as_trained(arguments, ranks, rate)
        what = f"a warm-up of {arguments.config}"
    else:
        shape = SHAPES[ranks.device.type]
        shape = {**shape, "vocabulary": arguments.vocabulary or shape["vocabulary"]}
        for n_experts in arguments.experts or [16]:
            compare(with_experts(shape, n_experts), arguments, ranks, rows, tokens, rate)
        what = f"{rows} rows of {tokens} tokens"
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    product = f"a matrix product {rate / 1e12:.3g} TFLOP/s"
    print(f"\n{what}; {where}, torch {torch.__version__}, {product}")
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
        seconds = take_turns(
            arguments.only,
            lambda name: step_of(name, folder / "student", ranks, rows, on_gpu),
            [batch_BT] * (arguments.steps + 1),
            ranks.device,
        )
    flops = 3 * forward_flops(model, rows * tokens, tokens, rows * tokens)
    print(f"{model.parameters / 1e9:.2f}e9 parameters, {model.active_parameters / 1e9:.2f}e9 active; {shape}\n")
    print(table(seconds, rows * tokens, flops, rate), flush=True)


def take_turns(
    names: Sequence[str],
    opened: Callable[[str], AbstractContextManager[Callable[[Any], Any]]],
    batches: Sequence[Any],
    device: torch.device,
) -> dict[str, list[float]]:
    """Seconds of every variant's steps on the batches but the first, which warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    # Models of a GPU's size do not stand in it beside each other.
    for together in [[name] for name in names] if device.type == "cuda" else [names]:
        with ExitStack() as stack:
            steps = {name: stack.enter_context(opened(name)) for name in together}
            for turn, batch in enumerate(batches):
                for name, step in steps.items():
                    taken_s = timed(partial(step, batch), device)[1]
                    if turn > 0:
                        seconds[name].append(taken_s)
            del steps, step
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return seconds


def compare_as_trained(arguments: argparse.Namespace, ranks: Ranks, rate: float) -> None:
    """Print the table of a warm-up's own steps."""
    with tempfile.TemporaryDirectory() as scratch:
        alone = ["model.teacher=null", "warmup.kd_weight=0", "warmup.init_weight=0", "warmup.routing=routed"]
        alone += ["activation_checkpointing=false", "log.gradients_every_steps=0", f"run_dir={scratch}/run"]

        def inputs_of(*overrides: str) -> Inputs:
            config = load_run_config(arguments.config, [*arguments.overrides, *alone, *overrides])
            if config.stage != "warmup" or config.reads_corpora:
                raise UserError(f"{arguments.config}: must be a warm-up on problems, without corpora")
            if is_dense(read_config(config.model.student)):
                raise UserError(f"{config.model.student}: has no experts, and this is about them")
            return read_inputs(config, ranks.world)

        def opened(name: str) -> AbstractContextManager[Callable[[int], Any]]:
            if name in HUGGING_FACE:
                return plain_warmup(name, inputs, ranks)
            expert_compute, zero_stage = OURS[name]
            return our_warmup(inputs_of(f"model.expert_compute={expert_compute}"), zero_stage, ranks)

        inputs = inputs_of()
        seconds = take_turns(arguments.only, opened, range(arguments.steps + 1), ranks.device)
        batches = [batch for step in range(1, arguments.steps + 1) for batch in drawn_batches(inputs, step)]
    tokens = sum(int(batch["attention_mask_BT"].sum()) for batch in batches)
    learnt = sum(int(batch["target_mask_BR"].sum()) for batch in batches)
    rows = sum(len(batch["input_ids_BT"]) for batch in batches)
    padded = sum(batch["input_ids_BT"].numel() for batch in batches)
    model = shape_of(read_config(inputs.config.model.student), "the student")
    trained = 3 * model.width * model.active_ffn_width * model.moe_layers
    flops = (2 * forward_flops(model, tokens, tokens / rows, learnt) + 2 * trained * tokens) / arguments.steps
    print(
        f"{rows / arguments.steps:.0f} rows a step, {tokens / rows:.0f} tokens a row, {learnt / rows:.0f} to be learnt;"
    )
    print(f"in the order drawn {100 * (1 - tokens / padded):.0f} % of what transformers' class reads is padding\n")
    print(table(seconds, tokens // arguments.steps, flops, rate), flush=True)


def drawn_batches(inputs: Inputs, step: int) -> list[SupervisedBatch]:
    """The micro-batches of a step, of its problems in the order in which they are drawn."""
    assert isinstance(inputs.data, TrainingData)
    supervision = ProblemSupervision(problems=inputs.data.problems, tokenizer=inputs.tokenizer, config=inputs.config)
    rows = supervision.drawn(step)
    size = inputs.config.micro_batch_size
    return [supervision.batch(rows[start : start + size]) for start in range(0, len(rows), size)]


@contextmanager
def plain_warmup(name: str, inputs: Inputs, ranks: Ranks) -> Iterator[Callable[[int], None]]:
    """Steps by transformers' own class and loss."""
    config = inputs.config
    clip = float(inputs.deepspeed_tree.get("gradient_clipping", 1.0))

    def trained(parameter: str) -> bool:
        return is_trained(parameter, config.warmup.train_shared_experts)

    with plain_model(name, Path(config.model.student), ranks, inputs.dtype, trained, clip) as update:

        def backward(step: int, model: Any) -> None:
            batches = drawn_batches(inputs, step)
            learnt = sum(int(batch["target_mask_BR"].sum()) for batch in batches)
            for batch in batches:
                ids_BT = batch["input_ids_BT"].to(ranks.device)
                labels_BT = torch.full_like(ids_BT, -100)
                labels_BR = batch["target_ids_BR"].masked_fill(~batch["target_mask_BR"], -100)
                labels_BT[:, -labels_BR.shape[1] :] = labels_BR.to(ranks.device)
                mask_BT = batch["attention_mask_BT"].to(ranks.device)
                given = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
                model(**given, num_items_in_batch=learnt, use_cache=False).loss.backward()

        yield lambda step: update(partial(backward, step))


@contextmanager
def our_warmup(inputs: Inputs, zero_stage: int, ranks: Ranks) -> Iterator[Callable[[int], Any]]:
    """Steps of training itself."""
    tree = {**inputs.deepspeed_tree, "zero_optimization": {"stage": zero_stage}}
    with open_stage(replace(inputs, deepspeed_tree=tree), ranks) as stage:
        yield stage.step
        stage.student.engine.destroy()


@contextmanager
def step_of(name: str, student: Path, ranks: Any, rows: int, on_gpu: bool) -> Iterator[Step]:
    """A training step of that name; its model goes with the block."""
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if name in HUGGING_FACE:
        with plain_model(name, student, ranks, dtype) as update:
            yield lambda batch_BT: update(lambda model: loss_of(model, batch_BT).backward())
        return
    model = AutoModelForCausalLM.from_pretrained(student, dtype=dtype)
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


@contextmanager
def plain_model(
    name: str,
    student: Path,
    ranks: Ranks,
    dtype: torch.dtype,
    trained: Callable[[str], bool] = lambda parameter: True,
    clip: float = 1.0,
) -> Iterator[Callable[[Backward], None]]:
    """transformers' own class; what it yields takes a step of the parameters whose names are `trained`."""
    model: Any = AutoModelForCausalLM.from_pretrained(student, dtype=dtype)
    model.set_experts_implementation(name)
    model.to(ranks.device)
    # As DeepSpeed's bf16 optimizer keeps them: fp32 weights, moments and update.
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(parameter_name))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [parameter.detach().float() for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, fused=True)

    def update(backward: Backward) -> None:
        model.train()
        backward(model)
        for master, parameter in zip(masters, parameters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, clip)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)
                master.grad = None

    yield update


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
