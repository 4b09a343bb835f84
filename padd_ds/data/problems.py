"""Rows of any data set as problems with one gold answer."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from padd_ds.data.answers import last_boxed
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


@dataclass(frozen=True, kw_only=True)
class FieldMap:
    """Which field of a row holds what, and how the answer is written there."""

    question: str = "question"
    answer: str = "answer"
    solution: str | None = None
    subject: str | None = None
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
    command-line option) `key`, where `{role}` stands for question, answer, solution or subject. Worked text
    without a final answer gives answer "", which an answer checker reports as an unparsable gold answer
    rather than as a wrong response.
    """
    for role in ("question", "answer", "solution", "subject"):
        _check_field(rows, getattr(fields, role), source, key.replace("{role}", role))
    return [_map_row(row, fields) for row in rows]


def _check_field(rows: Sequence[Mapping[str, Any]], name: str | None, source: str, key: str) -> None:
    for number, row in enumerate(rows, start=1):
        if name is not None and row.get(name) is None:
            there = ", ".join(row) or "none"
            raise UserError(f"{source}: row {number} has no {name!r} (fields: {there}); set {key} to one of them")


def _map_row(row: Mapping[str, Any], fields: FieldMap) -> Problem:
    question = str(row[fields.question])
    solution = str(row[fields.solution]) if fields.solution else None
    subject = str(row[fields.subject]) if fields.subject else None
    answer = answer_text(row[fields.answer])
    if fields.gold_format == "gsm8k":
        worked, mark, final = answer.rpartition(_GSM8K_MARK)
        answer, worked = (final.strip(), worked) if mark else ("", answer)
        solution = solution or _CALCULATOR_NOTES.sub("", worked).strip()
    elif fields.gold_format == "boxed":
        answer, solution = last_boxed(answer) or "", solution or answer
    return Problem(question=question, answer=answer, solution=solution, subject=subject)


def answer_text(value: Any) -> str:
    """A gold answer as text: whole floats lose their `.0`, several answers are joined by commas."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (list, tuple)):
        return ", ".join(answer_text(item) for item in value)
    if isinstance(value, (bool, Mapping)):
        return json.dumps(value)
    return str(value).strip()
