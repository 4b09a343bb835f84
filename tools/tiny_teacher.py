"""A dense teacher of about a million parameters, trained from scratch on generated arithmetic.

Shapes: B problems in a batch, T tokens of the longest, R response tokens of the whole batch, V vocabulary.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from padd_ds.errors import UserError, run_cli
from padd_ds.files import check_output_free, staged_directory, write_text_whole

# Lets the tool run by its path, where only its own folder is importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.tiny_model import make_tiny_model, make_tokenizer, save_teacher
from tools.tiny_problems import (
    ANSWER_PATTERN,
    LEVELS,
    SPLITS,
    Problem,
    distinct_problems,
    problem_stream,
    take,
    write_problems,
)

LONGEST_RESPONSES = {1: 48, 2: 48, 3: 48, 4: 96}
"""Tokens, by level."""
RANK_STRIDE = 1_000_003  # keeps the problem streams of ranks and seeds apart
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the teacher is trained; exactly one of `steps` and `seconds` is set.

    batch_size: problems in a step of one process. peak_lr: of AdamW. bucket_batches: batches whose problems are sorted
    by length together, so that little of a batch is padding. Same seed, steps and threads: same weights.
    """

    steps: int | None = None
    seconds: float | None = None
    seed: int = 0
    batch_size: int = 16
    peak_lr: float = 4e-3
    weight_decay: float = 0.01
    bare_share: float = 0.15
    levels: tuple[int, ...] = (1,)
    bucket_batches: int = 16

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise UserError("set exactly one of steps and minutes")
        if (1 if self.steps is None else self.steps) < 1 or (1 if self.seconds is None else self.seconds) <= 0:
            raise UserError(f"steps={self.steps}, seconds={self.seconds}: must be positive")


def learning_rate(progress: float, peak_lr: float) -> float:
    """Linear rise over the first 5 % of the training, level, then linear fall to 0 over the last 40 %."""
    return peak_lr * min(1.0, progress / 0.05 + 0.02, max(0.0, 1.0 - progress) / 0.4)


def bucketed_batches(
    tokenizer: PreTrainedTokenizerFast, options: TrainingOptions, rank: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (tokens_BT, labels_BT), padded on the right; labels only on the response and its end token."""
    stream = problem_stream("train", options.seed + RANK_STRIDE * rank, options.bare_share, options.levels)
    generator = torch.Generator().manual_seed(options.seed + RANK_STRIDE * rank)
    while True:
        problems = take(stream, options.batch_size * options.bucket_batches)
        encoded = sorted(_encode(tokenizer, problems), key=lambda pair: len(pair[0]))
        for index in torch.randperm(options.bucket_batches, generator=generator).tolist():
            yield _pad(encoded[index * options.batch_size : (index + 1) * options.batch_size])


def response_loss(model: Qwen3ForCausalLM, tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over response tokens, in nats.

    Padding is on the right, where causal attention never looks, so the fused kernel runs without a mask.
    """
    hidden_BTD = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
    targets_BT = labels_BT[:, 1:]
    counted_BT = targets_BT != IGNORED
    logits_RV = model.lm_head(hidden_BTD[:, :-1][counted_BT])
    return functional.cross_entropy(logits_RV, targets_BT[counted_BT])


def launched() -> tuple[int, int]:
    """(rank, world size) under torchrun, with the process group started; (0, 1) without."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def average_over_ranks(model: Qwen3ForCausalLM, seconds: float) -> float:
    """Average the gradients over the ranks; returns the average of `seconds`, the same on all of them."""
    if not dist.is_initialized():
        return seconds
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor([seconds])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return float(flat[-1])


def train(
    model: Qwen3ForCausalLM, options: TrainingOptions, report: Callable[[str], None] | None = None
) -> dict[str, float]:
    """Fit the model in place; returns steps, tokens, seconds and the mean loss of the last 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=options.weight_decay, fused=True)
    rank, world = launched()
    start, step, tokens, losses, progress = time.monotonic(), 0, 0, [], 0.0
    model.train()
    for tokens_BT, labels_BT in bucketed_batches(make_tokenizer(), options, rank):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, options.peak_lr)
        loss = response_loss(model, tokens_BT, labels_BT)
        loss.backward()
        elapsed = average_over_ranks(model, time.monotonic() - start)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step, tokens = step + 1, tokens + tokens_BT.numel() * world
        progress = step / options.steps if options.steps else elapsed / (options.seconds or 1.0)
        if report and rank == 0 and step % 50 == 0:
            report(_progress_line(step, tokens, elapsed, progress, _mean(losses[-50:])))
        if progress >= 1.0:
            break
    if not math.isfinite(losses[-1]):
        raise UserError(f"the teacher's loss is {losses[-1]} after {step} steps; choose a lower --peak-lr")
    model.eval()
    return {"steps": step, "tokens": tokens, "seconds": elapsed, "loss_nats": _mean(losses[-50:])}


@torch.no_grad()
def evaluate(
    model: Any, problems: list[Problem], *, samples: int = 1, batch_size: int = 128, seed: int = 0
) -> dict[str, list[float]]:
    """Share of right responses for every problem, by subject, in the order of `problems`.

    One greedy response each, or the mean of `samples` drawn at temperature 1 when there are several.
    """
    tokenizer = make_tokenizer()
    shares: dict[str, list[float]] = defaultdict(list)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(problems), batch_size):
            batch = problems[start : start + batch_size]
            responses = _respond(model, tokenizer, batch, samples)
            for index, problem in enumerate(batch):
                group = responses[index * samples : (index + 1) * samples]
                shares[problem.subject].append(_mean([float(is_right(text, problem.answer)) for text in group]))
    return dict(shares)


def is_right(response: str, answer: str) -> bool:
    """Whether the response ends in `#` and exactly this answer."""
    found = re.search(ANSWER_PATTERN, response)
    return found is not None and found.group(1) == answer


def _respond(model: Any, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], samples: int) -> list[str]:
    prompts = tokenizer([problem.question for problem in problems], padding=True, return_tensors="pt")
    sampling = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "num_return_sequences": samples,
    }
    tokens_BT = model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        max_new_tokens=max(LONGEST_RESPONSES[problem.level] for problem in problems),
        **(sampling if samples > 1 else {"do_sample": False}),
    )
    return tokenizer.batch_decode(tokens_BT[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def _print_table(shares: dict[str, list[float]]) -> dict[str, float]:
    """Print and return Pass@1 in percent, by subject and over all problems."""
    table = {subject: 100 * _mean(values) for subject, values in shares.items()}
    table["all"] = 100 * _mean([value for values in shares.values() for value in values])
    for subject, value in table.items():
        print(f"{subject:20s} {value:5.1f} %")
    return table


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _progress_line(step: int, tokens: int, elapsed: float, progress: float, loss: float) -> str:
    left_s = elapsed * (1 - progress) / progress
    return f"step {step}  {tokens / elapsed:,.0f} tokens/s  loss {loss:.3f}  {max(0.0, left_s):.0f} s left"


def _encode(tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> list[tuple[list[int], int]]:
    """Token ids of question, solution and end token, with the length of the question, for every problem."""
    questions = tokenizer([problem.question for problem in problems])["input_ids"]
    solutions = tokenizer([problem.solution for problem in problems])["input_ids"]
    end = [tokenizer.eos_token_id]
    return [(question + solution + end, len(question)) for question, solution in zip(questions, solutions, strict=True)]


def _pad(encoded: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids, _ in encoded)
    tokens = [ids + [0] * (longest - len(ids)) for ids, _ in encoded]
    labels = [[IGNORED] * length + ids[length:] + [IGNORED] * (longest - len(ids)) for ids, length in encoded]
    return torch.tensor(tokens), torch.tensor(labels)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a tiny dense teacher, alone or under torchrun (one thread per process is fastest).",
        epilog="example: torchrun --nproc_per_node 2 tools/tiny_teacher.py --output teacher --data-output data",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the teacher")
    parser.add_argument("--data-output", type=Path, required=True, help="for train, validation and test.jsonl")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="training time (default 2)")
    length.add_argument("--steps", type=int, help="training steps, for a result that a seed repeats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process (default 1)")
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--ffn-size", type=int, default=384)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=TrainingOptions.batch_size)
    parser.add_argument("--peak-lr", type=float, default=TrainingOptions.peak_lr)
    parser.add_argument("--bare-share", type=float, default=TrainingOptions.bare_share)
    parser.add_argument(
        "--levels", type=int, nargs="+", choices=LEVELS, default=[1], help="levels of difficulty (default 1)"
    )
    parser.add_argument("--train-problems", type=int, default=1000, help="at most, per subject (default 1000)")
    parser.add_argument("--test-problems", type=int, default=100, help="at most, per subject (default 100)")
    parser.add_argument("--validation-problems", type=int, default=50, help="at most, per subject (default 50)")
    parser.add_argument("--evaluate", action="store_true", help="print Pass@1 on the test problems")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args()


def _options(args: argparse.Namespace) -> TrainingOptions:
    minutes = 2.0 if args.minutes is None and args.steps is None else args.minutes
    return TrainingOptions(
        steps=args.steps,
        seconds=None if minutes is None else 60 * minutes,
        seed=args.seed,
        batch_size=args.batch_size,
        peak_lr=args.peak_lr,
        bare_share=args.bare_share,
        levels=tuple(args.levels),
    )


def main() -> None:
    """Parse, check, train, evaluate, write."""
    args = _parse()
    options = _options(args)
    check_output_free(args.output, args.overwrite)
    check_output_free(args.data_output, args.overwrite)
    torch.set_num_threads(args.threads)
    splits = {
        split: distinct_problems(split, count, args.seed, args.bare_share, options.levels)
        for split, count in zip(
            SPLITS, (args.test_problems, args.validation_problems, args.train_problems), strict=True
        )
    }
    model = make_tiny_model(
        hidden_size=args.hidden_size,
        layers=args.layers,
        ffn_size=args.ffn_size,
        heads=args.heads,
        kv_heads=args.kv_heads,
        seed=args.seed,
    )
    rank, _ = launched()
    try:
        result = {"options": asdict(options), **train(model, options, lambda line: print(line, flush=True))}
    finally:
        # Left to the interpreter's end, the group's threads may abort the process.
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank != 0:
        return
    if args.evaluate:
        result["pass_at_1"] = _print_table(evaluate(model, splits["test"]))
    with (
        staged_directory(args.output, args.overwrite) as teacher,
        staged_directory(args.data_output, args.overwrite) as data,
    ):
        save_teacher(teacher, model)
        write_text_whole(teacher / "tiny_teacher.json", json.dumps(result, indent=2) + "\n")
        for split, problems in splits.items():
            write_problems(data / f"{split}.jsonl", problems)
    counts = ", ".join(f"{len(problems)} {split}" for split, problems in splits.items())
    print(f"teacher: {args.output}; problems ({counts}): {args.data_output}")


if __name__ == "__main__":
    run_cli(main)
