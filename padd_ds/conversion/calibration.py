"""Calibration data: the texts of a file become windows of token ids.

Shapes: W windows, T tokens of a window.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from padd_ds.data.problems import Problem
from padd_ds.data.prompts import render, resolve_template
from padd_ds.data.split import DEFAULT_FRACTIONS, part_of
from padd_ds.errors import UserError

WINDOW = 256
LONGEST_ROW = 1024
PADDING = -1
"""Stands in windows of token ids behind the end of a row; what attends causally never sees it."""
TEXT_BLOCK_CHARACTERS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """A file of texts, and how it is read.

    A name ending in .jsonl holds one JSON object per line: the values of one of its fields, or of two, a question and
    its solution (`field` names them, separated by a comma); of the records whose first field is a question of `part`,
    where one is named. The question stands in `template`. Any other file is plain text.
    """

    path: Path
    field: str = "text"
    part: str | None = None
    template: str = "plain"
    fractions: dict[str, float] | None = None
    """Shares of the parts; None: DEFAULT_FRACTIONS."""

    @property
    def fields(self) -> list[str]:
        return self.field.split(",")

    @property
    def holds_rows(self) -> bool:
        """Whether its texts are questions with their solutions."""
        return self.path.suffix == ".jsonl" and len(self.fields) == 2

    def read(self, tokenizer: Any) -> Iterator[str]:
        """Its pieces of text, in its order."""
        try:
            if self.path.suffix != ".jsonl":
                yield from _read_text(self.path)
                return
            template = resolve_template(self.template)
            for values in _read_jsonl(self):
                problem = Problem(question=values[0], answer="")
                yield values[0] if len(values) == 1 else render(template, problem, tokenizer) + values[1]
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from error


def _read_jsonl(texts: TextFile) -> Iterator[list[str]]:
    path, fields = texts.path, texts.fields
    fractions = texts.fractions or DEFAULT_FRACTIONS
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}); give one object per line") from error
            missing = [name for name in fields if not isinstance(record, dict) or name not in record]
            if missing:
                present = ", ".join(record) if isinstance(record, dict) else "no object"
                raise UserError(
                    f"{path}, line {number}: no field {missing[0]} (there: {present}); pass --calibration-field"
                )
            if texts.part is None or part_of(str(record[fields[0]]), fractions) == texts.part:
                yield [str(record[name]) for name in fields]


def _read_text(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        while lines := file.readlines(TEXT_BLOCK_CHARACTERS):
            yield "".join(lines)


def token_windows(file: TextFile, option: str, tokenizer: Any, n_tokens: int) -> torch.Tensor:
    """[W, T] token ids: the first `n_tokens` tokens of the file, cut into windows of at most WINDOW.

    JSONL records are separated by the end token. UserError where the file has fewer tokens than `option` asks for.
    """
    pieces = _tokenised(file, tokenizer, ends=file.path.suffix == ".jsonl")
    tokens = [token for piece in _first(file, option, pieces, n_tokens) for token in piece]
    window = min(WINDOW, len(tokens))
    count = len(tokens) // window
    return torch.tensor(tokens[: count * window]).view(count, window)


def token_rows(file: TextFile, option: str, tokenizer: Any, n_tokens: int) -> torch.Tensor:
    """[W, T] token ids: one row per record as training shows it, with its end token and PADDING behind it.

    Rows are cut at LONGEST_ROW; together they have `n_tokens` tokens. UserError where the file has fewer.
    """
    pieces = (piece[:LONGEST_ROW] for piece in _tokenised(file, tokenizer, ends=True))
    rows = [torch.tensor(piece) for piece in _first(file, option, pieces, n_tokens)]
    return pad_sequence(rows, batch_first=True, padding_value=PADDING)


def _tokenised(file: TextFile, tokenizer: Any, *, ends: bool) -> Iterator[list[int]]:
    end = [tokenizer.eos_token_id] if ends else []
    for text in file.read(tokenizer):
        yield tokenizer(text, add_special_tokens=False)["input_ids"] + end


def _first(file: TextFile, option: str, pieces: Iterable[list[int]], n_tokens: int) -> list[list[int]]:
    """The first `n_tokens` tokens of all pieces, the last one cut."""
    found, missing = [], n_tokens
    for piece in pieces:
        found.append(piece[:missing])
        missing -= len(found[-1])
        if not missing:
            return found
    raise UserError(
        f"{file.path}: holds {n_tokens - missing} tokens, and {option} asks for {n_tokens}; give more text, or less"
    )
