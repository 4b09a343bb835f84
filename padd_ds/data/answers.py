"""Where the final answer stands in a text; text only, so that worker processes can load it fast."""

import re
from dataclasses import dataclass

from padd_ds.errors import UserError

ANSWER_FORMATS = ("auto", "boxed", "hash", "tag", "last_number", "first_line", "pattern")

_BOX = re.compile(r"\\f?boxed\s*\{")
_BARE_BOX = re.compile(r"\\f?boxed\s+([^\s${}][^$\n]{0,200})\$")
# A minus sign after a digit or bracket is an operation, not a sign.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_INTEGER = re.compile(r"[-+]?\d{1,1000}")
LONGEST_ANSWER = 2000
"""Characters; longer ones are no answers."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far two numbers may be apart and still agree: the larger of the two bounds."""

    relative: float = 0.0
    """As a share of the gold answer."""
    absolute: float = 0.0

    def __bool__(self) -> bool:
        return self.relative > 0 or self.absolute > 0


EXACT = Tolerance()


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """Where a response says its final answer."""

    name: str = "auto"
    """`auto`: wherever math-verify finds one (a box, "the answer is", the last formula or number).
    `boxed`: the last `\\boxed{}`. `hash`: after the last `####`. `tag`: in the last `<answer>`, there the last box
    if it has one. `last_number`, `first_line` (the first that is not blank): as they say. `pattern`: the last match
    of `pattern`."""
    pattern: str | None = None
    """Regular expression with one group. It turns `auto` into `pattern`; any other name refuses it."""

    def __post_init__(self) -> None:
        if self.name not in ANSWER_FORMATS:
            known = ", ".join(ANSWER_FORMATS)
            raise UserError(f"answer format {self.name!r} is unknown; choose one of {known}")
        if self.name == "pattern" and self.pattern is None:
            raise UserError("answer format 'pattern' needs a pattern with one group")
        if self.name not in ("auto", "pattern") and self.pattern is not None:
            raise UserError(f"answer format {self.name!r} takes no pattern; leave out one of the two")
        if self.pattern is not None and compile_pattern(self.pattern, "answer pattern").groups != 1:
            raise UserError(f"answer pattern {self.pattern!r} must have exactly one group (...)")

    @property
    def by_math_verify(self) -> bool:
        """Whether finding the answer is left to math-verify."""
        return self.name == "auto" and self.pattern is None


def compile_pattern(pattern: str, key: str) -> re.Pattern[str]:
    """A user's regular expression (`.` stops at line ends, `$` matches at each); UserError if it is none."""
    try:
        return re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise UserError(f"{key} {pattern!r} is not a regular expression ({error})") from error


def extract_answer(response: str, answer_format: AnswerFormat) -> str | None:
    """The final answer in `response`, stripped; None if there is none, or one of over 2000 characters.

    For every format but the one that is `by_math_verify`.
    """
    if answer_format.pattern is not None:
        found = list(re.finditer(answer_format.pattern, response, re.MULTILINE))
        answer = found[-1][1] if found else None
    else:
        answer = _EXTRACTORS[answer_format.name](response)
    answer = (answer or "").strip()
    return answer if 0 < len(answer) <= LONGEST_ANSWER else None


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{}` with balanced braces holds, or what follows the last bare `\\boxed` in its formula.

    None if there is neither.
    """
    for start in reversed([found.end() for found in _BOX.finditer(text)][-8:]):
        depth = 1
        for index in range(start, len(text)):
            if text[index - 1] == "\\":
                continue
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[start:index].strip()
    bare = _BARE_BOX.findall(text)
    return bare[-1].strip() if bare else None


def same_answer(answer: str, gold: str) -> bool | None:
    """Whether two answers agree, where plain text decides it beyond doubt; None where it does not.

    Equal text agrees; two integers agree if their values do.
    """
    answer, gold = answer.strip(), gold.strip()
    if answer == gold:
        return bool(gold)
    if is_integer(answer) and is_integer(gold):
        return int(answer) == int(gold)
    return None


def is_integer(answer: str) -> bool:
    """Whether `answer` is a plain integer of at most 1000 digits."""
    return _INTEGER.fullmatch(answer.strip()) is not None


def _after_hash(response: str) -> str | None:
    _, mark, tail = response.rpartition("####")
    return tail.strip().split("\n")[0] if mark else None


def _in_tag(response: str) -> str | None:
    _, mark, tail = response.rpartition("<answer>")
    inside = tail.partition("</answer>")[0]
    return (last_boxed(inside) or inside) if mark else None


def _last_number(response: str) -> str | None:
    numbers = _NUMBER.findall(response)
    return numbers[-1].replace(",", "") if numbers else None


def _first_line(response: str) -> str | None:
    return response.strip().split("\n")[0]


_EXTRACTORS = {
    "boxed": last_boxed,
    "hash": _after_hash,
    "tag": _in_tag,
    "last_number": _last_number,
    "first_line": _first_line,
}
