"""Rows of any data set as problems with one gold answer."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from padd_ds.data.answers import EXACT, Tolerance, last_boxed
from padd_ds.errors import UserError

GOLD_FORMATS = ("plain", "gsm8k", "boxed")
_GSM8K_MARK = "####"
_CALCULATOR_NOTES = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question and what is known of its answer."""

    question: str
    answer: str
    """The gold final answer; empty where a row's worked text holds none (see `map_rows`)."""
    solution: str | None = None
    """Worked text, where the data has it."""
    subject: str | None = None
    level: str | None = None
    """How hard it is, in the data's own words."""
    tolerance: Tolerance = EXACT
    """How far a number may be from `answer`."""


@dataclass(frozen=True, kw_only=True)
class FieldMap:
    """Which field of a row holds what, and how the answer is written there."""

    question: str = "question"
    answer: str = "answer"
    solution: str | None = None
    subject: str | None = None
    level: str | None = None
    absolute_error: str | None = None
    """Holds how far a number may be from the answer; a row may leave it out. Of several, separated by commas, the
    largest counts."""
    relative_error: float = 0.0
    """Not a field: the share of the answer by which a number may miss it, in every row."""
    gold_format: str = "plain"
    """`plain`: the field is the answer. `gsm8k`: worked text, then `#### answer`. `boxed`: worked text whose
    last `\\boxed{}` is the answer."""

    def __post_init__(self) -> None:
        if self.gold_format not in GOLD_FORMATS:
            choices = ", ".join(GOLD_FORMATS)
            raise UserError(f"gold_format {self.gold_format!r} is unknown; choose one of {choices}")


def map_rows(
    rows: Sequence[Mapping[str, Any]],
    fields: FieldMap,
    source: str = "the data",
    key: str = "data.fields.{role}",
) -> list[Problem]:
    """The problems of `rows`, in order.

    UserError for an absent field, with the row's number from 1; it names `source` and the config key (or
    command-line option) `key`, where `{role}` stands for question, answer, solution, subject or level. Worked text
    without a final answer gives answer "", which an answer checker reports as an unparsable gold answer
    rather than as a wrong response.
    """
    for role in ("question", "answer", "solution", "subject", "level"):
        _check_field(rows, getattr(fields, role), source, key.replace("{role}", role))
    return [_map_row(row, fields, _place(row, number, source)) for number, row in enumerate(rows, start=1)]


def _check_field(rows: Sequence[Mapping[str, Any]], name: str | None, source: str, key: str) -> None:
    for number, row in enumerate(rows, start=1):
        if name is not None and row.get(name) is None:
            place, there = _place(row, number, source), ", ".join(row) or "none"
            raise UserError(f"{place} has no {name!r} (fields: {there}); set {key} to one of them")


def _place(row: Mapping[str, Any], number: int, source: str) -> str:
    return getattr(row, "place", f"{source}, row {number}")


def _map_row(row: Mapping[str, Any], fields: FieldMap, place: str) -> Problem:
    question = str(row[fields.question])
    solution = answer_text(row[fields.solution]) if fields.solution else None
    subject = str(row[fields.subject]) if fields.subject else None
    answer = answer_text(row[fields.answer])
    if fields.gold_format == "gsm8k":
        worked, mark, final = answer.rpartition(_GSM8K_MARK)
        answer, worked = (final.strip(), worked) if mark else ("", answer)
        solution = solution or _CALCULATOR_NOTES.sub("", worked).strip()
    elif fields.gold_format == "boxed":
        answer, solution = last_boxed(answer) or "", solution or answer
    level = str(row[fields.level]) if fields.level else None
    tolerance = Tolerance(relative=fields.relative_error, absolute=_absolute_error(row, fields.absolute_error, place))
    return Problem(
        question=question, answer=answer, solution=solution, subject=subject, level=level, tolerance=tolerance
    )


def _absolute_error(row: Mapping[str, Any], name: str | None, place: str) -> float:
    text = str(row.get(name) or 0) if name else "0"
    try:
        return max(float(part or 0) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{place}: {name} {text!r} is no number such as 1e-1; put it right or leave it out") from error


def answer_text(value: Any) -> str:
    """A gold answer as text: whole floats lose their `.0`, several answers are joined by commas."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (list, tuple)):
        return ", ".join(answer_text(item) for item in value)
    if isinstance(value, (bool, Mapping)):
        return json.dumps(value)
    return str(value).strip()
