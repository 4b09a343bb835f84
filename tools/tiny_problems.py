"""Generated arithmetic problems in seven subjects and four levels, for a language model of a million parameters.

A question is a short line such as `47 plus 85?`; a solution is worked digit by digit, or bare, and ends
in `#` and the answer: `7+5=12,4+8+1=13#132` or `#132`. A learner that has seen both styles can gain by
reinforcement, since the worked one is right more often. The fourth level has numbers of eight digits where the
working has a step for each, so its worked solutions are long.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice, pairwise
from pathlib import Path

from padd_ds.files import write_text_whole

ANSWER_PATTERN = r"#(-?\d+)$"
STYLES = ("bare", "worked")
LEVELS = (1, 2, 3, 4)
SPLITS = {"test": 0.25, "validation": 0.1, "train": 0.65}
"""Shares of all questions; a question's hash decides to which it belongs."""
_DRAWS_WITHOUT_NEWS = 5000
_EIGHT_DIGITS = (10**7, 10**8 - 1)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question with its demonstration; `solution` ends in `#` and `answer`, `style` is one of STYLES."""

    question: str
    solution: str
    answer: str
    subject: str
    level: int
    """One of LEVELS: how large its numbers are."""
    style: str


@dataclass(frozen=True, kw_only=True)
class _Sketch:
    """A question, its working without the answer, and the answer."""

    question: str
    working: str
    answer: int


def _addition(rng: random.Random, level: int) -> _Sketch:
    left = rng.randint(*{1: (10, 89), 2: (10, 99), 3: (100, 999), 4: _EIGHT_DIGITS}[level])
    right = rng.randint(*{1: (2, 9), 2: (10, 99), 3: (10, 999), 4: _EIGHT_DIGITS}[level])
    steps, carry = [], 0
    for a, b in _columns(left, right):
        total = a + b + carry
        steps.append(f"{a}+{b}{'+1' if carry else ''}={total}")
        carry = total // 10
    return _Sketch(question=f"{left} plus {right}?", working=",".join(steps), answer=left + right)


def _subtraction(rng: random.Random, level: int) -> _Sketch:
    left = rng.randint(*{1: (20, 99), 2: (20, 99), 3: (100, 999), 4: _EIGHT_DIGITS}[level])
    right = rng.randint(*{1: (2, 9), 2: (10, left), 3: (10, left), 4: (10**7, left)}[level])
    steps, borrow = [], 0
    for a, b in _columns(left, right):
        lent = 10 if a - b - borrow < 0 else 0
        steps.append(f"{a + lent}-{b}{'-1' if borrow else ''}={a + lent - b - borrow}")
        borrow = 1 if lent else 0
    return _Sketch(question=f"{left} minus {right}?", working=",".join(steps), answer=left - right)


def _multiplication(rng: random.Random, level: int) -> _Sketch:
    left = rng.randint(*{1: (10, 99), 2: (10, 99), 3: (100, 999), 4: _EIGHT_DIGITS}[level])
    right = rng.randint(*{1: (2, 5), 2: (3, 9), 3: (2, 9), 4: (2, 9)}[level])
    steps, carry = [], 0
    for digit in reversed(_digits(left)):
        total = digit * right + carry
        steps.append(f"{digit}*{right}{f'+{carry}' if carry else ''}={total}")
        carry = total // 10
    return _Sketch(question=f"{left} times {right}?", working=",".join(steps), answer=left * right)


def _modulo(rng: random.Random, level: int) -> _Sketch:
    left = rng.randint(*{1: (10, 99), 2: (10, 299), 3: (100, 999), 4: _EIGHT_DIGITS}[level])
    right = rng.randint(*{1: (2, 5), 2: (3, 9), 3: (6, 12), 4: (6, 12)}[level])
    steps, rest = [], 0
    for digit in _digits(left):
        partial = 10 * rest + digit
        rest = partial % right
        steps.append(f"{partial}>{rest}")
    return _Sketch(question=f"{left} mod {right}?", working=",".join(steps), answer=left % right)


def _gcd(rng: random.Random, level: int) -> _Sketch:
    largest_common, largest = {1: (9, 40), 2: (9, 70), 3: (12, 99), 4: (99, 9999)}[level]
    common = rng.randint(1, largest_common)
    left, right = (common * rng.randint(1, largest // common) for _ in range(2))
    steps, (a, b) = [], (left, right)
    while b:
        a, b = b, a % b
        steps.append(str(b))
    return _Sketch(question=f"gcd {left} {right}?", working=",".join(steps), answer=math.gcd(left, right))


def _linear_equation(rng: random.Random, level: int) -> _Sketch:
    slope = rng.randint(*{1: (2, 4), 2: (2, 7), 3: (3, 9), 4: (3, 9)}[level])
    root = rng.randint(*{1: (1, 9), 2: (2, 12), 3: (5, 19), 4: (100, 999)}[level])
    largest_shift = {1: 9, 2: 15, 3: 30, 4: 999}[level]
    adds = slope * root <= largest_shift or rng.random() < 0.5
    shift = rng.randint(1, largest_shift)
    value = slope * root + (shift if adds else -shift)
    working = f"{value}{'-' if adds else '+'}{shift}={slope * root},{slope * root}/{slope}={root}"
    question = f"solve {slope}x {'plus' if adds else 'minus'} {shift} is {value}?"
    return _Sketch(question=question, working=working, answer=root)


def _quadratic_sequence(rng: random.Random, level: int) -> _Sketch:
    bend = rng.randint(*{1: (1, 2), 2: (1, 4), 3: (2, 7), 4: (20, 99)}[level])
    slope = rng.randint(0, {1: 5, 2: 9, 3: 15, 4: 99}[level])
    start = rng.randint(1, {1: 30, 2: 60, 3: 99, 4: 999}[level])
    terms = [start + slope * n + bend * n * (n - 1) // 2 for n in range(5)]
    first, second, third, last = (b - a for a, b in pairwise(terms))
    working = f"{first},{second},{third}+{bend}={last},{terms[3]}+{last}={terms[4]}"
    return _Sketch(question=f"next {' '.join(map(str, terms[:4]))}?", working=working, answer=terms[4])


SUBJECTS: dict[str, Callable[[random.Random, int], _Sketch]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "multiplication": _multiplication,
    "modulo": _modulo,
    "gcd": _gcd,
    "linear_equation": _linear_equation,
    "quadratic_sequence": _quadratic_sequence,
}


def problem_stream(
    split: str, seed: int, bare_share: float = 0.15, levels: tuple[int, ...] = (1,)
) -> Iterator[Problem]:
    """Problems without end, the subjects in turn and the levels drawn; a question may come again.

    `split` is one of SPLITS; they share no question, since a hash of the question decides to which one it
    belongs. `bare_share` is the share of solutions that give the answer only.
    """
    rng = random.Random(f"{split} {seed}")
    for index in count():
        subject = list(SUBJECTS)[index % len(SUBJECTS)]
        level = rng.choice(levels)
        sketch = SUBJECTS[subject](rng, level)
        while _split_of(sketch.question) != split:
            sketch = SUBJECTS[subject](rng, level)
        style = "bare" if rng.random() < bare_share else "worked"
        working = "" if style == "bare" else sketch.working
        answer = str(sketch.answer)
        yield Problem(
            question=sketch.question,
            solution=f"{working}#{answer}",
            answer=answer,
            subject=subject,
            level=level,
            style=style,
        )


def distinct_problems(
    split: str, count_per_subject: int, seed: int, bare_share: float = 0.15, levels: tuple[int, ...] = (1,)
) -> list[Problem]:
    """Up to `count_per_subject` problems of every subject, no question twice, subjects mixed.

    A subject with a smaller space of questions gives all that it has.
    """
    found: dict[str, Problem] = {}
    room = dict.fromkeys(SUBJECTS, count_per_subject)
    draws_without_news = 0
    for problem in problem_stream(split, seed, bare_share, levels):
        if not any(room.values()) or draws_without_news == _DRAWS_WITHOUT_NEWS:
            break
        draws_without_news += 1
        if room[problem.subject] and problem.question not in found:
            found[problem.question] = problem
            room[problem.subject] -= 1
            draws_without_news = 0
    return list(found.values())


def write_problems(path: Path, problems: list[Problem]) -> None:
    """Write one JSON object per line with the fields of Problem; the file is whole or absent."""
    write_text_whole(path, "".join(json.dumps(asdict(problem)) + "\n" for problem in problems))


def take(stream: Iterator[Problem], number: int) -> list[Problem]:
    """The next `number` problems of a stream."""
    return list(islice(stream, number))


def _split_of(question: str) -> str:
    digest = hashlib.sha256(f"tiny split {question}".encode()).digest()
    place = int.from_bytes(digest[:4], "big") / 2**32
    if place < SPLITS["test"]:
        return "test"
    return "validation" if place < SPLITS["test"] + SPLITS["validation"] else "train"


def _digits(number: int) -> list[int]:
    return [int(digit) for digit in str(number)]


def _columns(left: int, right: int) -> list[tuple[int, int]]:
    """Pairs of digits from the right, the shorter number filled up with zeros."""
    width = max(len(str(left)), len(str(right)))
    return list(zip(_digits_padded(left, width)[::-1], _digits_padded(right, width)[::-1], strict=True))


def _digits_padded(number: int, width: int) -> list[int]:
    return [int(digit) for digit in str(number).zfill(width)]
