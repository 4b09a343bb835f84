import json

import pytest

from padd_ds.data.sources import Row, read_rows
from padd_ds.evaluation.overlap import COMMON_ROWS, find_overlaps, overlap_table

LONG = "A farmer has seven cows and sells $x^{2}+ j x$ of them on every second market day of the year. How many?"
SHORT = "What is $3 + 4$?"
QUESTIONS = {"first": [SHORT, LONG], "second": ["Nothing like it stands anywhere."]}


def overlaps(*texts: object) -> list[tuple[str, int, str, float]]:
    rows = [Row({"text": text}, f"line {number}") for number, text in enumerate(texts, start=1)]
    found = find_overlaps(rows, QUESTIONS)
    return [(hit.place, hit.problem, hit.kind, round(hit.share, 2)) for hit in found]


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        (LONG, [("line 1", 2, "exact", 1.0)]),
        (f"Question: {LONG} Answer: 7", [("line 1", 2, "exact", 1.0)]),
        ([{"role": "user", "content": LONG}], [("line 1", 2, "exact", 1.0)]),
        (LONG.upper().replace("$", " "), [("line 1", 2, "normalised", 1.0)]),
        (LONG.replace("x^{2}+ j x", "x^2+jx"), [("line 1", 2, "normalised", 1.0)]),
        (LONG.replace("+ j", "- j"), [("line 1", 2, "n-gram", 1.0)]),
        (LONG.replace("seven", "eight"), [("line 1", 2, "n-gram", 0.64)]),
        ("and sells of them on every second market day", []),
        (SHORT, [("line 1", 1, "exact", 1.0)]),
        ("what is 3+4", [("line 1", 1, "normalised", 1.0)]),
        ("what is 3-4", []),
        (f"{SHORT} And then?", []),
    ],
)
def test_a_question_is_found_however_it_is_written(text, hits):
    assert overlaps(text) == hits


def test_set_phrases_tell_nothing():
    phrase = LONG.replace("seven", "eight")
    assert len(overlaps(*[phrase] * COMMON_ROWS)) == COMMON_ROWS
    assert overlaps(*[phrase] * (COMMON_ROWS + 1)) == []
    assert overlaps(*[phrase] * (COMMON_ROWS + 1), LONG) == [(f"line {COMMON_ROWS + 2}", 2, "exact", 1.0)]


def test_lines_are_named_and_questions_counted_once(tmp_path):
    rows = [{"a": "b"}, {"problem": LONG}, {"problem": LONG.replace("seven", "eight")}, {"problem": SHORT}]
    path = tmp_path / "train.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    table = overlap_table(find_overlaps(read_rows(str(path)), QUESTIONS), {"first": 2, "second": 1}).splitlines()
    assert [line.split() for line in table[1:3]] == [["first", "2", "2", "0", "0"], ["second", "1", "0", "0", "0"]]
    assert table[3].startswith(f"{path}, line 3: first 2, exact: A farmer")
    assert table[4].startswith(f"{path}, line 5: first 2, n-gram 64 %:")
    assert len(table) == 6
