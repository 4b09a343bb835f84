"""Calibration data: a text or JSONL file becomes the inputs that each FFN of the teacher sees.

Shapes: W windows, T tokens of a window, S = W * T tokens, D model width.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from padd_ds.data.split import DEFAULT_FRACTIONS, part_of
from padd_ds.errors import UserError

WINDOW = 256
TEXT_BLOCK_CHARACTERS = 1 << 14


def read_texts(path: Path, field: str, part: str | None = None) -> Iterator[str]:
    """Pieces of text of a file, in its order.

    A name ending in .jsonl is read as one JSON object per line: the values of `field` (several
    names separated by commas are joined by newlines), of the records whose first field is a question of
    `part` where one is named. Any other file is plain text.
    """
    try:
        yield from _read_jsonl(path, field.split(","), part) if path.suffix == ".jsonl" else _read_text(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from error


def _read_jsonl(path: Path, fields: list[str], part: str | None) -> Iterator[str]:
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
            if part is None or part_of(str(record[fields[0]]), DEFAULT_FRACTIONS) == part:
                yield "\n".join(str(record[name]) for name in fields)


def _read_text(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        while lines := file.readlines(TEXT_BLOCK_CHARACTERS):
            yield "".join(lines)


def token_windows(path: Path, option: str, texts: Iterable[str], tokenizer: Any, n_tokens: int) -> torch.Tensor:
    """[W, T] token ids: the first `n_tokens` tokens of the file's texts, cut into windows of at most WINDOW.

    JSONL records are separated by the end token. UserError where the file has fewer tokens than `option` asks for.
    """
    separator = [tokenizer.eos_token_id] if path.suffix == ".jsonl" else []
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"] + separator
        if len(tokens) >= n_tokens:
            break
    tokens = tokens[:n_tokens]
    if len(tokens) < n_tokens:
        raise UserError(
            f"{path}: holds {len(tokens)} tokens, and {option} asks for {n_tokens}; give more text, or less"
        )
    window = min(WINDOW, len(tokens))
    count = len(tokens) // window
    return torch.tensor(tokens[: count * window]).view(count, window)
