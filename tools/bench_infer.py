"""What inference costs a student beside its teacher: prefill and decoding of transformers' own classes.

Both models are in one process and take turns on the same random tokens, so that what else the machine does meets both;
speeds are ratios of the same turn. Peak memory is that of a process of its own for each.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from padd_ds.errors import UserError, run_cli
from padd_ds.hf import DTYPES, load_causal_lm, read_config
from padd_ds.planning.compute import forward_bytes, forward_flops
from padd_ds.planning.shape import ModelShape, shape_of
from padd_ds.report.numbers import scaled

STUDENT, TEACHER = "student", "teacher"
PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is measured: a prompt read at once, then `new_tokens` forward passes of a token per row."""

    batch: int
    prompt_tokens: int
    new_tokens: int


@dataclass(kw_only=True)
class Seconds:
    """Of every turn, by phase."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="Hugging Face folder of the MoE student")
    parser.add_argument("--teacher", required=True, help="Hugging Face folder of its dense teacher")
    parser.add_argument(
        "--batch-sizes", type=_count, nargs="+", default=[1, 8, 32], metavar="N", help="default: 1 8 32"
    )
    parser.add_argument("--prompt-tokens", type=_count, help="default: 512 on a GPU, else 64")
    parser.add_argument("--new-tokens", type=_count, help="default: 64 on a GPU, else 16")
    parser.add_argument("--turns", type=_count, default=6, help="of each, one more first (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--experts", help="how transformers runs the experts: eager, batched_mm or grouped_mm")
    parser.add_argument("--only", choices=(STUDENT, TEACHER), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turns < 2:
        parser.error(f"--turns {arguments.turns} is too few for a spread; take 2 or more")
    on_gpu = torch.cuda.is_available()
    tokens = arguments.prompt_tokens or (512 if on_gpu else 64), arguments.new_tokens or (64 if on_gpu else 16)
    loads = [Load(batch=batch, prompt_tokens=tokens[0], new_tokens=tokens[1]) for batch in arguments.batch_sizes]
    sources = {STUDENT: arguments.student, TEACHER: arguments.teacher}
    configs = {who: read_config(source) for who, source in sources.items()}
    shapes = {who: shape_of(config, sources[who]) for who, config in configs.items()}
    check_context(configs, sources, sum(tokens))
    dtype = DTYPES[arguments.dtype or ("bfloat16" if on_gpu else "float32")]
    names = [arguments.only] if arguments.only else [STUDENT, TEACHER]
    memory_mib = {} if arguments.only else {name: memory_of(name) for name in names}
    busy_before = os.getloadavg()[0]
    models = {name: load(sources[name], dtype, arguments.experts, on_gpu) for name in names}
    vocabulary = min(shape.vocabulary for shape in shapes.values())
    taken = [take_turns(models, one, vocabulary, 1 if arguments.only else arguments.turns) for one in loads]
    if arguments.only:
        print(json.dumps(peak_mib(on_gpu)))
        return
    print(table(loads, taken, shapes, dtype.itemsize))
    ratio = memory_mib[STUDENT] / memory_mib[TEACHER]
    print(f"\npeak memory: student {memory_mib[STUDENT]:.0f} MiB, teacher {memory_mib[TEACHER]:.0f} MiB ({ratio:.2f})")
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of a CPU"
    busy = f"load average {busy_before:.1f} before, {os.getloadavg()[0]:.1f} after, on {os.cpu_count()} cores"
    print(f"{tokens[0]} tokens of prompt, {tokens[1]} decoded; {arguments.turns} turns; {where}, {busy}")


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def check_context(configs: dict[str, Any], sources: dict[str, str], tokens: int) -> None:
    """UserError where prompt and new tokens are more than a model's context."""
    for who, config in configs.items():
        if tokens > config.max_position_embeddings:
            raise UserError(
                f"{sources[who]}: prompt and new tokens are {tokens}, its context {config.max_position_embeddings}; "
                "lower --prompt-tokens or --new-tokens"
            )


def load(source: str, dtype: torch.dtype, experts: str | None, on_gpu: bool) -> Any:
    """The model on the device that is there."""
    model = load_causal_lm(source, dtype)
    if experts is not None and shape_of(model.config, source).experts:
        try:
            model.set_experts_implementation(experts)
        except (KeyError, ValueError) as error:
            raise UserError(f"--experts {experts}: transformers has no such way to run them ({error})") from error
    return model.to("cuda" if on_gpu else "cpu")


def take_turns(models: dict[str, Any], one: Load, vocabulary: int, turns: int) -> dict[str, Seconds]:
    """Seconds of each model in every turn but the first, which warms up."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (one.batch, one.prompt_tokens + one.new_tokens), generator=generator)
    seconds = {name: Seconds() for name in models}
    for turn in range(turns + 1):
        for name, model in models.items():
            prefill_s, decode_s = measure(model, ids_BT.to(model.device), one.prompt_tokens)
            if turn > 0:
                seconds[name].prefill.append(prefill_s)
                seconds[name].decode.append(decode_s)
    return seconds


@torch.inference_mode()
def measure(model: Any, ids_BT: torch.Tensor, prompt_tokens: int) -> tuple[float, float]:
    """Seconds of the prompt's forward pass and of those of all further tokens, one by one behind its cache."""
    prompt_BT, rest_BT = ids_BT[:, :prompt_tokens], ids_BT[:, prompt_tokens:]
    prefill_s, read = timed(lambda: model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1))

    def decode() -> None:
        for token_B in rest_BT.unbind(1):
            model(input_ids=token_B[:, None], past_key_values=read.past_key_values, use_cache=True)

    return prefill_s, timed(decode)[0]


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device is done, and what came of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started_s = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started_s, result


def peak_mib(on_gpu: bool) -> float:
    """The most memory that this process has held: of the GPU where there is one, else resident."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def memory_of(name: str) -> float:
    """Peak memory of one model in a process of its own, MiB."""
    own = subprocess.run([sys.executable, *sys.argv, "--only", name], stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(own.stdout.splitlines()[-1]))


def flops_per_token(model: ModelShape, one: Load, phase: str) -> float:
    """Of matrix products and attention, mean over the phase's tokens; only the last of a prompt has logits."""
    if phase == "prefill":
        return forward_flops(model, one.prompt_tokens, one.prompt_tokens, 1) / one.prompt_tokens
    return forward_flops(model, 1, one.prompt_tokens + one.new_tokens / 2, 1)


def bytes_per_token(model: ModelShape, one: Load, phase: str, value_bytes: int) -> float:
    """Weights and caches read, mean over the phase's tokens, if each expert is as likely as any."""
    tokens, cached = one.batch, one.batch * (one.prompt_tokens + one.new_tokens / 2)
    if phase == "prefill":
        tokens, cached = one.batch * one.prompt_tokens, 0
    # An embedding of its own is looked up, not read.
    looked_up = 0 if model.tied else model.vocabulary * model.width * value_bytes
    return (forward_bytes(model, tokens, cached, value_bytes) - looked_up) / tokens


def table(loads: list[Load], taken: list[dict[str, Seconds]], shapes: dict[str, ModelShape], value_bytes: int) -> str:
    """A row per batch size and phase, the student over the teacher.

    Speed is the median over turns, in brackets its interquartile range.
    """
    lines = ["| batch | phase | tokens/s | FLOPs per token | bytes read per token |", "|---|---|---|---|---|"]
    for one, seconds in zip(loads, taken, strict=True):
        for phase in PHASES:
            pairs = zip(getattr(seconds[STUDENT], phase), getattr(seconds[TEACHER], phase), strict=True)
            low, middle, high = statistics.quantiles([theirs / ours for ours, theirs in pairs], n=4)
            flops = beside(*(flops_per_token(shapes[who], one, phase) for who in (STUDENT, TEACHER)))
            read = beside(*(bytes_per_token(shapes[who], one, phase, value_bytes) for who in (STUDENT, TEACHER)))
            lines.append(f"| {one.batch} | {phase} | {middle:.2f} ({low:.2f} to {high:.2f}) | {flops} | {read} |")
    return "\n".join(lines)


def beside(ours: float, theirs: float) -> str:
    """The ratio, with both."""
    return f"{ours / theirs:.2f} ({scaled(ours)} of {scaled(theirs)})"


if __name__ == "__main__":
    run_cli(main)
