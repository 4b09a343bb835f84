"""Rows out of JSON Lines, JSON or parquet files, folders of them, or the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from padd_ds.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")
Row = dict[str, Any]


def read_rows(source: str, split: str | None = None) -> list[Row]:
    """All rows of `source`, as dictionaries, in file order (files of a folder by name).

    `source` is a file, a folder, or a hub name such as `openai/gsm8k:main` (configuration after the colon).
    `split` picks a split of a hub data set or of a folder (files or sub-folders whose name starts with it).
    UserError: nothing there, a malformed line (with its number), no rows, an unknown split.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        rows = _read_folder(path, split)
    elif path.is_file():
        rows = _read_file(path)
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such file or folder")
    else:
        rows = _read_hub(source, split)
    if not rows:
        raise UserError(f"{source}: holds no rows")
    return rows


def _read_folder(folder: Path, split: str | None) -> list[Row]:
    files = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{folder}: holds no {', '.join(SUFFIXES)} file")
    if split:
        chosen = [file for file in files if file.relative_to(folder).parts[0].startswith(split)]
        if not chosen:
            names = ", ".join(str(file.relative_to(folder)) for file in files[:5])
            raise UserError(f"{folder}: no file or folder starts with split {split!r} (files: {names})")
        files = chosen
    return [row for file in files for row in _read_file(file)]


def _read_file(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    return _parse_json(path, text) if path.suffix == ".json" else _parse_json_lines(path, text)


def _parse_json_lines(path: Path, text: str) -> list[Row]:
    # Not through `datasets`: its reader wants one type per column and names no line.
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows


def _parse_json(path: Path, text: str) -> list[Row]:
    try:
        rows = json.loads(text) if text.strip() else []
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); is it .jsonl, one row per line?") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a JSON list of objects; use .jsonl for one object per line")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from error


def _read_hub(source: str, split: str | None) -> list[Row]:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the hub client raises from a dozen families; all mean "cannot be had"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: no such file, and not to be had from the hub ({reason})") from error
    if not isinstance(loaded, datasets.Dataset):
        raise UserError(f"{source}: has splits {', '.join(loaded)}; choose one")
    return list(loaded)
