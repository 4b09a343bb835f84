"""A student's inference beside its teacher's: prefill and decoding at several batch sizes, in one process by turns.

Legend: B rows, T prompt tokens.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from padd_ds.errors import UserError, run_cli
from padd_ds.evaluate import load
from padd_ds.evaluation.costs import decode_bytes_per_token, token_costs
from padd_ds.report.numbers import scaled
from tools.measuring import in_own_process, peak_mib, timed

PHASES = ("prefill", "decode")
Rates = dict[tuple[str, int, str], list[float]]
"""Tokens per second of every round, by model, batch size and phase."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, help="dense checkpoint folder")
    parser.add_argument("--student", required=True, help="checkpoint folder of a mixture of experts")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=256, help="random ones (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="decoded, no end heeded (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of both models, one more first (default %(default)s)")
    parser.add_argument("--device", help="default: an accelerator if there is one")
    parser.add_argument("--dtype", help="default: float32 on cpu, bfloat16 elsewhere")
    parser.add_argument("--only", choices=("teacher", "student"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if (
        min(arguments.batch_sizes) < 1
        or arguments.prompt_tokens < 1
        or arguments.new_tokens < 2
        or arguments.rounds < 2
    ):
        raise UserError("--batch-sizes and --prompt-tokens must be at least 1, --new-tokens and --rounds at least 2")
    names = [arguments.only] if arguments.only else ["teacher", "student"]
    models = {name: load(getattr(arguments, name), arguments.device, arguments.dtype)[0] for name in names}
    for name, model in models.items():
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and arguments.prompt_tokens + arguments.new_tokens > limit:
            raise UserError(f"the {name} has {limit} positions; lower --prompt-tokens or --new-tokens")
    if arguments.only:
        time_batch(models[arguments.only], max(arguments.batch_sizes), arguments.prompt_tokens, arguments.new_tokens)
        print(json.dumps(peak_mib(models[arguments.only].device)))
        return
    memory = {name: in_own_process(name) for name in models}
    rates = measure(models, arguments)
    print(cost_table(models, memory, arguments.batch_sizes, arguments.prompt_tokens + arguments.new_tokens // 2))
    print(rate_table(rates))


def measure(models: dict[str, Any], arguments: argparse.Namespace) -> Rates:
    """The models take turns in every round; a first round that warms up is left out."""
    rates: Rates = {}
    for number in range(arguments.rounds + 1):
        for batch in arguments.batch_sizes:
            for name, model in models.items():
                found = time_batch(model, batch, arguments.prompt_tokens, arguments.new_tokens, seed=number)
                for phase, rate in zip(PHASES, found, strict=True):
                    if number > 0:
                        rates.setdefault((name, batch, phase), []).append(rate)
    return rates


@torch.inference_mode()
def time_batch(model: Any, batch: int, prompt_tokens: int, new_tokens: int, seed: int = 0) -> tuple[float, float]:
    """Tokens per second of a prefill of `batch` random prompts, and of the greedy decoding behind it."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(model.config.vocab_size, (batch, prompt_tokens), generator=generator).to(model.device)
    output, prefill_s = timed(lambda: model(input_ids=ids_BT, use_cache=True, logits_to_keep=1), model.device)

    def decode() -> None:
        result = output
        for _ in range(new_tokens):
            next_B1 = result.logits[:, -1:].argmax(-1)
            result = model(input_ids=next_B1, past_key_values=result.past_key_values, use_cache=True)

    _, decode_s = timed(decode, model.device)
    return batch * prompt_tokens / prefill_s, batch * new_tokens / decode_s


def cost_table(models: dict[str, Any], memory: dict[str, float], batches: list[int], context: int) -> str:
    """What follows from the shapes, and the measured peak memory."""
    heads = ["model", "parameters", "active", "FLOPs per token", *(f"bytes per token, batch {b}" for b in batches)]
    lines = [f"| {' | '.join([*heads, 'peak memory'])} |", "|---" * (len(heads) + 1) + "|"]
    for name, model in models.items():
        costs = token_costs(model)
        cells = [costs["total_parameters"], costs["active_parameters"], costs["flops_per_token"]]
        cells += [decode_bytes_per_token(model, batch, context) for batch in batches]
        lines.append(f"| {' | '.join([name, *map(scaled, cells), f'{memory[name]:.0f} MiB'])} |")
    return "\n".join(lines) + "\n"


def rate_table(rates: Rates) -> str:
    """Median over rounds of the student's tokens per second over the teacher's, in brackets its interquartile range."""
    lines = ["| batch | phase | student / teacher | teacher, tokens/s |", "|---|---|---|---|"]
    for (name, batch, phase), teachers in rates.items():
        if name == "teacher":
            pairs = zip(rates["student", batch, phase], teachers, strict=True)
            low, middle, high = statistics.quantiles([student / teacher for student, teacher in pairs], n=4)
            rate = statistics.median(teachers)
            lines.append(f"| {batch} | {phase} | {middle:.2f} ({low:.2f} to {high:.2f}) | {rate:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
