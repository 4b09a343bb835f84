import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from padd_ds.data.sources import read_rows
from padd_ds.errors import UserError

ROWS = [{"question": "1 + 1", "answer": 2}, {"question": "one\u2028line", "answer": "two"}]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    return path


def test_json_lines_keep_mixed_types_and_unusual_line_separators(tmp_path):
    assert read_rows(str(write_lines(tmp_path / "a.jsonl", ROWS))) == ROWS


def test_json_list_and_parquet_give_the_same_rows(tmp_path):
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.json")) == read_rows(str(tmp_path / "a.parquet")) == rows


def test_folder_is_read_by_name_and_split(tmp_path):
    write_lines(tmp_path / "train-1.jsonl", [{"n": 2}])
    write_lines(tmp_path / "train-0.jsonl", [{"n": 1}])
    (tmp_path / "test").mkdir()
    write_lines(tmp_path / "test" / "x.jsonl", [{"n": 3}])
    assert [row["n"] for row in read_rows(str(tmp_path), "train")] == [1, 2]
    assert [row["n"] for row in read_rows(str(tmp_path), "test")] == [3]
    assert len(read_rows(str(tmp_path))) == 3
    with pytest.raises(UserError, match="starts with split 'validation'"):
        read_rows(str(tmp_path), "validation")


def test_malformed_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 3: not valid JSON"):
        read_rows(str(path))
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1: expected a JSON object, found list"):
        read_rows(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"\n", "holds no rows"),
        ("empty.json", b"", "holds no rows"),
        ("one.json", b'{"a": 1}', "expected a JSON list"),
        ("bad.json", b"{", "not valid JSON"),
        ("latin.jsonl", b'{"a": "\xe9"}', "UTF-8"),
        ("bad.parquet", b"no parquet", "not a readable parquet file"),
    ],
)
def test_unreadable_files_are_user_errors(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(str(tmp_path / name))


def test_missing_file_is_not_taken_for_a_hub_name(tmp_path):
    for source in (str(tmp_path / "none.jsonl"), "data/none.jsonl", "./none"):
        with pytest.raises(UserError, match="no such file or folder"):
            read_rows(source)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no .*\.parquet file"):
        read_rows(str(tmp_path))


def test_unreachable_hub_name_is_a_user_error():
    with pytest.raises(UserError, match="not to be had from the hub"):
        read_rows("nobody/nothing-of-this-name", "train")
