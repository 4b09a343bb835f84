"""tools/make_corpus.py: what it writes, and what it refuses without leaving anything."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from padd_ds.data.corpus import Corpus, tokenizer_fingerprint
from padd_ds.errors import UserError
from tests.data.characters import character_tokenizer
from tools import make_corpus
from tools.tiny_model import make_tokenizer

TEXTS = ["1 plus 2 is 3", "", "next gcd 12", "a\u2028b"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", TEXTS)
    return tmp_path


def write(path: Path, texts: list[Any], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def make(folder: Path, *arguments: str, tokenizer: str = "tokenizer") -> None:
    make_corpus.main([*arguments, "--tokenizer", str(folder / tokenizer), "--output", str(folder / "out" / "c")])


def documents(folder: Path, tokenizer: Any = None) -> list[list[int]]:
    tokenizer = tokenizer or make_tokenizer()
    corpus = Corpus.open(folder / "out" / "c", tokenizer, len(tokenizer))
    return [corpus.read(n, 0, int(length)).tolist() for n, length in enumerate(corpus.lengths_N)]


def tokens(text: str) -> list[int]:
    tokenizer = make_tokenizer()
    return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def test_documents_are_the_texts_with_an_end_token_each(folder: Path) -> None:
    make(folder, str(folder / "in"))
    expected = [tokens(text) for text in TEXTS if text]
    assert documents(folder) == expected
    facts = json.loads((folder / "out" / "c.json").read_text())
    assert facts == {
        "tokenizer": tokenizer_fingerprint(make_tokenizer()),
        "sources": [str(folder / "in")],
        "field": "text",
        "end_token": make_tokenizer().eos_token_id,
        "documents": 3,
        "tokens": sum(map(len, expected)),
        "largest_id": max(map(max, expected)),
        "empty": 1,
    }
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["c.bin", "c.idx", "c.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (folder / "out").iterdir()} == {0o666 & ~mask}


def test_several_sources_of_every_kind_are_read_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_corpus, "DOCUMENTS_AT_ONCE", 2)
    (folder / "b.json").write_text(json.dumps([{"body": "b 1"}, {"body": "b 2"}]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": "c 1"}]), folder / "c.parquet")
    lines = write(folder / "d.txt", ["d 1", "d 2"], "body")
    make(folder, str(folder / "b.json"), str(folder / "c.parquet"), str(lines), "--field", "body")
    assert documents(folder) == [tokens(text) for text in ("b 1", "b 2", "c 1", "d 1", "d 2")]


def test_a_tokenizer_that_begins_texts_begins_documents(folder: Path) -> None:
    tokenizer = character_tokenizer(bos=True)
    tokenizer.save_pretrained(folder / "characters")
    make(folder, str(write(folder / "x.jsonl", ["ab"])), tokenizer="characters")
    assert [row[0] for row in documents(folder, tokenizer)] == [tokenizer.bos_token_id]
    assert len(documents(folder, tokenizer)[0]) == 4


def test_ids_are_stored_in_the_smallest_type_that_holds_the_vocabulary(folder: Path) -> None:
    make(folder, str(folder / "in"))
    corpus = Corpus.open(folder / "out" / "c", make_tokenizer(), len(make_tokenizer()))
    assert corpus.dataset.index.dtype is np.uint16


def test_an_existing_corpus_is_kept_unless_told_otherwise(folder: Path) -> None:
    make(folder, str(folder / "in"))
    other = str(write(folder / "other.jsonl", ["7"]))
    with pytest.raises(UserError, match=r"c\.bin already exists; .* --overwrite"):
        make(folder, other)
    make(folder, other, "--overwrite")
    assert documents(folder) == [tokens("7")]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (["a", "b", 3], (), r"x\.jsonl: row 3 has no text in 'text' \(fields: text\); set --field"),
        (["a"], ("--field", "body"), r"row 1 has no text in 'body' \(fields: text\)"),
        (["", ""], (), "no row has text in 'text'"),
        (["a"], ("--split", "train"), "no such file"),
    ],
)
def test_mistakes_leave_nothing(folder: Path, rows: list[Any], arguments: tuple[str, ...], message: str) -> None:
    source = str(write(folder / "x.jsonl", rows)) if "--split" not in arguments else str(folder / "none.jsonl")
    with pytest.raises(UserError, match=message):
        make(folder, source, *arguments)
    assert not list((folder / "out").iterdir()) if (folder / "out").exists() else True


def test_a_corpus_that_is_replaced_is_never_seen_with_the_index_of_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder, str(folder / "in"))
    moved: list[str] = []
    right = os.replace

    def stop_at_the_second(path: Path, final: Path) -> None:
        if len(moved) == 1:
            raise KeyboardInterrupt
        moved.append(Path(final).name)
        right(path, final)

    monkeypatch.setattr(make_corpus.os, "replace", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make(folder, str(write(folder / "other.jsonl", ["7"])), "--overwrite")
    assert moved == ["c.bin"]
    with pytest.raises(UserError, match=r"c\.idx: no such file"):
        documents(folder)
