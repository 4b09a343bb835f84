"""Whether an answer agrees with the gold one: as text, as a number, as several answers, as mathematics.

It loads no torch, and math-verify only where it is asked: worker processes start with it.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from padd_ds.data.answers import EXACT, LONGEST_ANSWER, Tolerance, last_boxed, same_answer

_SPACING = re.compile(r"(?<!\\)\\[,;: ]|(?<!\\)~|\\(?:q?quad|displaystyle|left|right|[bB]ig[lr]?)(?![A-Za-z])|\\?\$")
_WRITTEN = (
    (re.compile(r"(?<!\\)\\!\s*"), ""),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"[\u2212\u2013]"), "-"),
    (re.compile(r"\u00d7"), r"\\times "),
    (re.compile(r"\\(?:mbox|textrm|textbf)(?![A-Za-z])"), r"\\text"),
    (re.compile(r"\\(?:le|ge)qslant(?![A-Za-z])"), lambda found: found[0][:3]),
    (re.compile(r"\\(?:le|ge)q(?![A-Za-z])"), lambda found: found[0][:3]),
)
# What the parser cannot read, though programs and physicists write it: np.arcsin, 1./3, M_{\odot}, \dot{x}_{0}, E_{1}.
_FOR_THE_PARSER = (
    (re.compile(r"\bnp\.(?=[a-z])"), r"\\"),
    (re.compile(r"(?<=\d)\.(?!\d)"), ""),
    (re.compile(r"_\{\s*\\([A-Za-z]+)\s*\}"), r"_{\1}"),
    (re.compile(r"\\(d?dot)\s*\{\s*\\?(\w+)\s*\}(?:_\{?(\w+)\}?)?"), r"\2_{\1\3}"),
    (re.compile(r"(?<![A-Za-z\\])E(?=_)"), r"\\Xi"),  # with an index it is an energy, not Euler's number
    (re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?!\w)"), r"\1 \\cdot 10^{\2}"),
)
_NAME = r"[A-Za-z](?:_(?:\w|\{[^{}]*\}))?(?:\s*\([a-zA-Z, ]*\))?"
_LEFT_HAND_SIDE = re.compile(rf"^{_NAME}\s*(?:=|\\approx|\\simeq|\u2248)\s*(?!=)")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_POWER = r"10\s*\^\s*(?:\{\s*([-+]?\d{1,4})\s*\}|([-+]?\d{1,4}))"
_SCALE = rf"(?:[eE]([-+]?\d{{1,4}})|\s*(?:\\times|\\cdot|\*|x)\s*{_POWER})?"
# Letters that are units and hardly ever unknowns stand for themselves.
_UNIT_PART = re.compile(
    r"\\(?:text|mathrm|operatorname|rm)\s*\{[^{}]*\}|\^?\s*\{?\s*\\circ|\^\s*\{\s*(?:\\prime\s*)+\}"
    r"|\\(?:AA|degree|mu|Omega|cdot)(?![A-Za-z])|(?!(?:pi|sqrt|sin|cos|tan|log|ln|exp|inf)(?![a-z]))[A-Za-z]{2,}"
    r"|[mgshJVKWNCFTLA](?![A-Za-z])|(?<=[A-Za-z}\]])\s*\^\s*\{?-?\d\}?|[/{}\[\]().\s]"
)
_NUMBER = re.compile(rf"([-+]?)\s*(?:{_POWER}|({_DIGITS}){_SCALE})")
_WHOLE_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_PERCENT = re.compile(r"\s*\\?%\s*$")
_BETWEEN = re.compile(r"(?:\\text\s*\{\s*(?:,?\s*and|,?\s*or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))")
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_SMALL = 1e-4
"""Below it numbers are compared relatively: math-verify rounds them to six decimals."""
_SEVERAL = 32
"""More answers than these are compared as one text only."""


def compare(answer: str, gold: str, tolerance: Tolerance = EXACT) -> bool | None:
    """Whether `answer` agrees with `gold`; None if the gold answer cannot be read.

    Two numbers agree within `tolerance`; units are not compared. Several answers, separated by commas, agree in any
    order, each with one of its own. Everything else is math-verify's to say. Without a time limit: it runs in a worker
    process.
    """
    if not gold.strip():
        return None
    if (same := same_answer(answer, gold)) or (same is False and not tolerance):
        return same
    if max(len(answer), len(gold)) <= LONGEST_ANSWER:
        if same_text(answer, gold):
            return True
        if (same := _same_number(answer, gold, tolerance)) is not None:
            return same
        if (same := _same_answers(answer, gold, tolerance)) is not None:
            return same
    return _same_mathematics(answer, gold, tolerance)


def answers_in(response: str) -> list[str]:
    """What may be the answer in a response: the last box, several boxes as one, or else what math-verify finds."""
    box = last_boxed(response)
    if box is None:
        found, _ = _parse(response)
        return [found] if found else []
    merged, _ = _parse(response, boxed=True) if response.count("boxed") > 1 else (box, None)
    return list(dict.fromkeys([box, merged or box])) if box else []


def same_text(answer: str, gold: str) -> bool:
    """Whether two answers are written alike but for spacing and the like."""
    if max(len(answer), len(gold)) > LONGEST_ANSWER:
        return answer == gold
    mine, golden = ("".join(tidy(text).split()) for text in (answer, gold))
    return mine == golden != ""


def can_be_read(gold: str) -> bool:
    """Whether a gold answer is one that others can be compared with."""
    return bool(gold.strip()) and (number(gold) is not None or bool(_parsed(gold) or _parsed(_right_hand_side(gold))))


def tidy(text: str) -> str:
    """An answer without what only the eye needs: dollars, spacing, sizes of brackets, a full stop at the end."""
    text = _SPACING.sub(" ", text)
    for pattern, written in _WRITTEN:
        text = pattern.sub(written, text)
    text = " ".join(text.split()).rstrip(".,").strip()
    whole = _WHOLE_TEXT.fullmatch(text)
    return whole[1].strip() if whole else text


def split_answers(text: str) -> list[str]:
    """The answers that commas, semicolons, "and" and "or" outside of brackets separate, without braces around all.

    A number whose digits are grouped by commas is one answer.
    """
    text = tidy(text)
    if text.startswith(r"\{") and text.endswith(r"\}") and text.count(r"\{") == 1:
        text = text[2:-2].strip()
    if re.fullmatch(rf"[-+]?{_DIGITS}", text):
        return [text]
    parts, depth = [""], 0
    for character in _BETWEEN.sub(",", text):
        depth += _BRACKETS.get(character, 0)
        if depth == 0 and character in ",;":
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def number(text: str) -> Decimal | None:
    """The value of a text that is one decimal number, with or without a power of ten and a unit; else None."""
    text = _PERCENT.sub("", _right_hand_side(text))
    text = text[1:-1] if re.fullmatch(r"\([^(),]*\)", text) else text
    found = _NUMBER.match(text)
    if found is None or not _is_unit(text, found.end()):
        return None
    sign, in_braces, alone, digits, *scale = found.groups()
    power = next((power for power in (in_braces, alone, *scale) if power is not None), "0")
    return Decimal(f"{sign}{(digits or '1').replace(',', '')}e{power}")


def _is_unit(text: str, start: int) -> bool:
    """Whether all that follows `start` may be a unit, or nothing does."""
    while start < len(text):
        part = _UNIT_PART.match(text, start)
        if part is None:
            return False
        start = part.end()
    return True


def _same_number(answer: str, gold: str, tolerance: Tolerance) -> bool | None:
    """Whether two numbers agree; None where one of the two is none, or a share in per cent may be meant."""
    mine, golden = number(answer), number(gold)
    if mine is None or golden is None:
        return None
    same = _close(float(mine), float(golden), tolerance) if tolerance else mine == golden
    per_cent = _PERCENT.search(tidy(answer)) or _PERCENT.search(tidy(gold))
    return None if per_cent and not same else same


def _close(answer: float, gold: float, tolerance: Tolerance) -> bool:
    # A bound that is met exactly must not fail by rounding.
    bound = max(tolerance.relative * abs(gold), tolerance.absolute) * (1 + 1e-9)
    return abs(answer - gold) <= bound


def _same_answers(answer: str, gold: str, tolerance: Tolerance) -> bool | None:
    """Whether each of several gold answers has an answer of its own that agrees; None where more is to be asked."""
    answers, golds = split_answers(answer), split_answers(gold)
    if len(answers) < len(golds):  # 1,3 is a list beside a list, though 1,300 is a number
        answers = split_answers(answer.replace(",", ", "))
    if not 1 < len(golds) <= _SEVERAL:
        return None
    if len(answers) != len(golds):
        # A set would not tell twice from once.
        return False if len(set(golds)) < len(golds) else None
    verdicts = [[compare(mine, golden, tolerance) for mine in answers] for golden in golds]
    if _can_be_paired(verdicts):
        return True
    return None if any(verdict is None for row in verdicts for verdict in row) else False


def _can_be_paired(verdicts: Sequence[Sequence[bool | None]]) -> bool:
    """Whether each row can have a column of its own where it is True, as many as there are rows."""
    owner: dict[int, int] = {}

    def give(row: int, tried: set[int]) -> bool:
        for column, same in enumerate(verdicts[row]):
            if same and column not in tried:
                tried.add(column)
                if column not in owner or give(owner[column], tried):
                    owner[column] = row
                    return True
        return False

    return all(give(row, set()) for row in range(len(verdicts)))


def _same_mathematics(answer: str, gold: str, tolerance: Tolerance) -> bool | None:
    from math_verify import verify

    parsed_gold = _parsed(gold)
    if not parsed_gold:
        answer, gold = _right_hand_side(answer), _right_hand_side(gold)
        parsed_gold = _parsed(gold)
    if not parsed_gold:
        return None
    parsed = _parsed(answer)
    mine, golden = _value(parsed), _value(parsed_gold)
    if mine is not None and golden is not None and (tolerance or max(abs(mine), abs(golden)) < _SMALL):
        return _close(mine, golden, tolerance or Tolerance(relative=1e-6))
    return bool(parsed) and verify(parsed_gold, parsed, timeout_seconds=None)


def _parsed(answer: str) -> list[Any]:
    """What math-verify makes of an answer; empty if nothing."""
    text = tidy(answer)
    for pattern, written in _FOR_THE_PARSER:
        text = pattern.sub(written, text)
    # A sentence with formulas in it is no formula.
    found = _parse(f"\\boxed{{{text}}}", boxed=True)[1] or ("$" in answer and _parse(answer, boxed=True)[1]) or []
    return [_with_rates_as_unknowns(item) for item in found]


def _with_rates_as_unknowns(parsed: Any) -> Any:
    """dM/dt as an unknown of its own: sympy would take M for a constant, and its rate for 0."""
    from sympy import Derivative, Symbol

    rates = parsed.atoms(Derivative) if hasattr(parsed, "atoms") else ()
    return parsed.xreplace({rate: Symbol(str(rate)) for rate in rates}) if rates else parsed


def _parse(text: str, boxed: bool = False) -> tuple[str, list[Any]]:
    """The answer in a text as math-verify finds it, and what it was parsed to (empty: nothing).

    `boxed`: only as LaTeX, so that nothing is made of a number inside a formula that it cannot read.
    """
    import math_verify

    finders = (math_verify.LatexExtractionConfig(),) + (() if boxed else (math_verify.ExprExtractionConfig(),))
    # No timeouts of its own: they are signals that a C call ignores, and the parent has the clock.
    found = math_verify.parse(text, finders, parsing_timeout=None, fallback_mode="first_match")
    as_text = [item for item in found if isinstance(item, str)]
    return as_text[0] if as_text else "", [item for item in found if not isinstance(item, str)]


def _value(parsed: Sequence[Any]) -> float | None:
    """The real number that a parsed answer is; None if it is none."""
    from sympy import Eq, Expr

    for item in parsed:
        expression = item.rhs if isinstance(item, Eq) and item.lhs.is_Symbol else item
        if isinstance(expression, Expr) and expression.is_number and expression.is_real:
            return float(expression.evalf())
    return None


def _right_hand_side(text: str) -> str:
    """`x = 5` and `f(x) = 5` without what stands on the left."""
    return _LEFT_HAND_SIDE.sub("", tidy(text))
