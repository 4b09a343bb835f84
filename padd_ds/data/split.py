"""The cut of one training set into parts that share no question."""

import argparse
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from padd_ds.data.problems import Problem
from padd_ds.errors import UserError

DEFAULT_FRACTIONS = {"A": 0.10, "B": 0.20, "C": 0.65, "D": 0.05}
"""Shares of the training set. A: activation statistics and clustering. B: warm-up. C: joint training.
D: held-out evaluation. Source: PADD."""

# Numbers, words, and the signs that tell one formula from another.
# Spacing, quotes, commas, dollars and braces go.
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[-+*/=<>^%!|()\[\]]")
_MINUS_SIGNS = str.maketrans("\u2212\u2013\u2014", "---")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Problems by part."""

    parts: dict[str, list[Problem]]
    """Every key of the fractions; each part in the order of the data."""
    duplicates: int
    """Repeats that were dropped."""


def normalise_question(question: str) -> str:
    """The question without case, spacing and punctuation, but with its operators and brackets.

    Choice: arithmetic signs stay, since `3 + 4` and `3 - 4` are two questions.
    """
    text = unicodedata.normalize("NFKC", question).casefold().translate(_MINUS_SIGNS)
    tokens = _TOKEN.findall(text) or [text.strip()]
    return " ".join(tokens)


def part_of(question: str, fractions: Mapping[str, float]) -> str:
    """The part that `question` belongs to, from a hash of its normalised text alone.

    Choice: independent of order and size of the set, so that a grown set moves no question.
    """
    digest = hashlib.sha256(normalise_question(question).encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    edge, last = 0.0, ""
    for part, share in sorted(fractions.items()):
        edge, last = edge + share, part if share > 0 else last
        if share > 0 and position < edge:
            return part
    return last  # rounding left a gap below 1


def split_problems(
    problems: Iterable[Problem],
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    *,
    every_solution: bool = False,
) -> Split:
    """Each distinct question in its part, the first of several equal ones kept.

    With `every_solution` a question stays once for each of its solutions. UserError unless the fractions are >= 0 and
    add up to 1.
    """
    check_fractions(fractions)
    parts: dict[str, list[Problem]] = {part: [] for part in fractions}
    seen: set[tuple[str, str | None]] = set()
    duplicates = 0
    for problem in problems:
        key = (normalise_question(problem.question), problem.solution if every_solution else None)
        if key in seen:
            duplicates += 1
            continue
        seen.add(key)
        parts[part_of(problem.question, fractions)].append(problem)
    return Split(parts=parts, duplicates=duplicates)


def check_fractions(fractions: Mapping[str, float]) -> None:
    """UserError unless the shares are >= 0 and add up to 1."""
    total = sum(fractions.values())
    if any(share < 0 for share in fractions.values()) or abs(total - 1) > 1e-9:
        named = ", ".join(f"{part} {share}" for part, share in fractions.items())
        raise UserError(f"part fractions ({named}) must be >= 0 and add up to 1, not {total:g}")


def add_part_fractions(group: argparse._ArgumentGroup) -> None:
    """The option of programs that take a part of a training set."""
    group.add_argument(
        "--part-fractions",
        type=parse_fractions,
        metavar="A,B,C,D",
        help="shares of the parts, as data.part_fractions of the runs says (default 0.1,0.2,0.65,0.05)",
    )


def parse_fractions(text: str) -> dict[str, float]:
    """The shares of A, B, C and D as an option gives them: four numbers, separated by commas. UserError where they
    are not."""
    try:
        fractions = dict(zip("ABCD", map(float, text.split(",")), strict=True))
    except ValueError as error:
        raise UserError(
            f"--part-fractions {text}: give four shares, of A, B, C and D, such as 0.1,0.2,0.65,0.05"
        ) from error
    check_fractions(fractions)
    return fractions


def decontaminate(
    problems: Sequence[Problem], benchmark_questions: Iterable[str]
) -> tuple[list[Problem], list[Problem]]:
    """`problems` as (kept, dropped): dropped are those whose normalised question is also a benchmark's."""
    banned = {normalise_question(question) for question in benchmark_questions}
    kept: list[Problem] = []
    dropped: list[Problem] = []
    for problem in problems:
        (dropped if normalise_question(problem.question) in banned else kept).append(problem)
    return kept, dropped
