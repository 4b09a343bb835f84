"""Rows out of JSON Lines, JSON or parquet files, folders of them, or the Hugging Face hub."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from padd_ds.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")
Fields = dict[str, Any]


class Row(dict[str, Any]):
    """The fields of a row, which knows where it stands."""

    place: str
    """File and line, or data set and number, from 1."""

    def __init__(self, fields: Mapping[str, Any], place: str) -> None:
        super().__init__(fields)
        self.place = place


def read_rows(source: str, split: str | None = None) -> list[Row]:
    """All rows of `source`, in file order (files of a folder by name).

    `source` is a file, a folder, or a hub name such as `openai/gsm8k:main` (configuration after the colon).
    `split` picks a split of a hub data set or of a folder (files or sub-folders whose name starts with it).
    UserError: nothing there, a malformed line (with its number), no rows, an unknown split.
    """
    rows = list(iterate_rows(source, split))
    if not rows:
        raise UserError(f"{source}: holds no rows")
    return rows


def iterate_rows(
    source: str, split: str | None = None, on_bytes: Callable[[int], Any] = lambda count: None
) -> Iterator[Row]:
    """What `read_rows` lists, one row at a time; `on_bytes` is told how much of the files was read meanwhile."""
    files = source_files(source, split)
    if files is None:
        for number, fields in enumerate(_read_hub(source, split), start=1):
            yield Row(fields, f"{source}, row {number}")
    for path in files or ():
        if path.suffix not in READERS:
            yield from _json_lines(path, on_bytes)
            continue
        for number, fields in enumerate(READERS[path.suffix](path, on_bytes), start=1):
            yield Row(fields, f"{path}, row {number}")


def source_files(source: str, split: str | None = None) -> list[Path] | None:
    """The files of `source` in their order; None for the name of a hub data set."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _files_of(path, split)
    if path.is_file():
        return [path]
    if path.suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such file or folder")
    return None


def _files_of(folder: Path, split: str | None) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{folder}: holds no {', '.join(SUFFIXES)} file")
    if not split:
        return files
    chosen = [file for file in files if file.relative_to(folder).parts[0].startswith(split)]
    if not chosen:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:5])
        raise UserError(f"{folder}: no file or folder starts with split {split!r} (files: {names})")
    return chosen


def _json_lines(path: Path, on_bytes: Callable[[int], Any]) -> Iterator[Row]:
    # Not through `datasets`: its reader wants one type per column and names no line.
    # As bytes: JSON strings may hold U+2028 and other characters that text files take for line ends.
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            on_bytes(len(line))
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: cannot be read as UTF-8 text ({error})") from error
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
            yield Row(row, f"{path}, line {number}")


def _json_list(path: Path, on_bytes: Callable[[int], Any]) -> Iterator[Fields]:
    with _opened(path) as file:
        content = file.read()
    on_bytes(len(content))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    yield from _parse_json(path, text)


def _parquet(path: Path, on_bytes: Callable[[int], Any]) -> Iterator[Fields]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            share = path.stat().st_size // max(table.metadata.num_rows, 1)
            for batch in table.iter_batches():
                on_bytes(share * len(batch))
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from error


Reader = Callable[[Path, Callable[[int], Any]], Iterator[Fields]]
READERS: dict[str, Reader] = {
    ".json": _json_list,
    ".parquet": _parquet,
}
"""By suffix; everything else is read as JSON Lines."""


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _parse_json(path: Path, text: str) -> list[Fields]:
    try:
        rows = json.loads(text) if text.strip() else []
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); is it .jsonl, one row per line?") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a JSON list of objects; use .jsonl for one object per line")
    return rows


def _read_hub(source: str, split: str | None) -> Iterable[Fields]:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the hub client raises from a dozen families; all mean "cannot be had"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: no such file, and not to be had from the hub ({reason})") from error
    if not isinstance(loaded, datasets.Dataset):
        raise UserError(f"{source}: has splits {', '.join(loaded)}; choose one")
    return loaded
