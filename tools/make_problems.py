"""Make checkable problems with reasoning-gym, as JSON Lines of question, answer, subject and, if asked, solution.

Example: make_problems.py --output train.jsonl --count 500 --question "What is {expression}?"
    chain_sum:subject=sum2,max_terms=2,max_digits=1
Several tasks take turns. The option `subject` names a task's problems (default: its name).
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from padd_ds.data.sources import read_rows
from padd_ds.data.split import normalise_question
from padd_ds.errors import UserError, run_cli
from padd_ds.files import check_output_free, write_text_whole

_DRAWS_AT_ONCE = 1000
_DRAWS_WITHOUT_NEWS = 5000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="name, or name:option=value,option=value")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--count", type=int, default=500, help="distinct questions (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--question",
        default="{question}",
        metavar="TEXT",
        help="of {question}, {answer} and entries of the task's metadata (default %(default)s)",
    )
    parser.add_argument("--solution", metavar="TEXT", help="a field solution, of the same (default: no such field)")
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="FILE", help="make no question that is in this file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_output_free(args.output, args.overwrite)
    if args.count < 1:
        raise UserError(f"--count {args.count} must be at least 1")
    taken = {normalise_question(row["question"]) for file in args.exclude for row in read_rows(file)}
    streams = [entries(task, args.seed) for task in args.tasks]
    texts = {"question": args.question} | ({} if args.solution is None else {"solution": args.solution})
    problems = distinct(streams, texts, args.count, taken)
    write_text_whole(args.output, "".join(json.dumps(problem) + "\n" for problem in problems))
    print(f"wrote {len(problems)} problems to {args.output}")


def entries(task: str, seed: int) -> Iterator[dict[str, Any]]:
    """Endless entries of one task, each with its subject added; a function of (task, seed)."""
    import reasoning_gym

    name, _, text = task.partition(":")
    # Tasks draw their operands alike: with one seed, `3 + 4` and `3 * 4` would always come together.
    first = random.Random(f"{seed} {task}").randrange(2**31)
    options = dict(_option(task, item) for item in text.split(",") if item)
    subject = str(options.pop("subject", name))
    start = 0
    while True:
        try:
            block = reasoning_gym.create_dataset(name, seed=first + start, size=_DRAWS_AT_ONCE, **options)
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"task {task!r}: {error}; see reasoning-gym's list of tasks and options") from error
        yield from ({**entry, "subject": subject} for entry in block)
        start += _DRAWS_AT_ONCE


def distinct(
    streams: list[Iterator[dict[str, Any]]], texts: Mapping[str, str], count: int, taken: set[str]
) -> list[dict[str, str]]:
    """`count` problems from the streams in turn, no question twice and none of `taken` (normalised text).

    `texts`: the fields that are filled in from an entry, the question among them. UserError if the streams run dry,
    that is if thousands of draws bring no new question.
    """
    problems: list[dict[str, str]] = []
    seen, idle = set(taken), 0
    while len(problems) < count:
        entry = next(streams[len(problems) % len(streams)])
        filled = {field: _filled(field, text, entry) for field, text in texts.items()}
        normalised = normalise_question(filled["question"])
        idle = idle + 1 if normalised in seen else 0
        if idle == 0:
            seen.add(normalised)
            problems.append({**filled, "answer": str(entry["answer"]), "subject": entry["subject"]})
        elif idle >= _DRAWS_WITHOUT_NEWS:
            found = len(problems)
            raise UserError(f"only {found} distinct questions found; lower --count {count} or widen a task")
    return problems


def _filled(option: str, text: str, entry: dict[str, Any]) -> str:
    values = {"question": entry["question"], "answer": entry["answer"], **entry["metadata"]}
    try:
        return text.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"--{option} {text!r}: {error} is not one of {', '.join(values)}") from error


def _option(task: str, item: str) -> tuple[str, Any]:
    name, mark, value = item.partition("=")
    if not mark:
        raise UserError(f"task {task!r}: {item!r} is not option=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    run_cli(main)
