"""A comparison as a page, and as files."""

import csv
import re
from xml.etree import ElementTree

import pytest

from padd_ds import evaluate
from padd_ds.errors import UserError
from padd_ds.evaluation.comparison import compare
from padd_ds.report.comparison_page import comparison_page
from tests.evaluation.made_up_results import make_result
from tests.report.test_page import Outline


@pytest.fixture
def paths(tmp_path):
    return [
        make_result(tmp_path / "teacher.json", "110011", "110011110011", max_new_tokens=100),
        make_result(tmp_path / "student.json", "100111", "110011000000", costs=(50, 120), max_new_tokens=200),
        make_result(tmp_path / "=other.json", "011110", "110011000000", costs=(20, 120), max_new_tokens=100),
    ]


def row_of(html: str, name: str) -> list[str]:
    """The cells of the first table row that `name` begins."""
    row = re.search(rf'<tr><th scope="row">{re.escape(name)}</th>(.*?)</tr>', html)
    assert row is not None
    return re.findall(r"<td>(.*?)</td>", row.group(1))


def test_the_headline_stands_first_and_the_teacher_is_marked(paths):
    html = comparison_page(compare(paths))
    assert Outline(html).headings == [
        *("Comparison of teacher, student, =other", "test.jsonl", "Pass@1 over active parameters"),
        *("Pass@1 over FLOPs per token", "By subject", "By subject", "Worst questions beside teacher"),
        *("Best questions beside teacher", "What differs in the models", "What differs in the evaluations"),
        "Environment",
    ]
    assert html.index("<table>") < html.index("<svg")
    assert row_of(html, "teacher (teacher)")[:8] == ["66.7", "10.0 to 90.0", "100", "300", "100", "-", "-", "-"]
    cells = row_of(html, "student")
    # One question lost and one won of six: the mean is 0, its interval +-1.96 sqrt(2 / 5 / 6).
    assert cells[:5] == ["66.7", "10.0 to 90.0", "50", "150", "120"]
    assert cells[5:8] == ["+0.0", "−50.6 to +50.6", "1"]  # noqa: RUF001


def test_differences_of_models_and_evaluations(paths):
    html = comparison_page(compare(paths))
    assert row_of(html, "experts") == ["-", "4", "4"]
    assert row_of(html, "max_new_tokens") == ["100", "200", "100"]
    assert row_of(html, "torch") == ["2.13.0"] * 3
    assert '<th scope="row">rope.theta' not in html and '<th scope="row">model_type' not in html


def test_responses_stand_side_by_side_and_nothing_of_them_is_markup(paths):
    html = comparison_page(compare(paths))
    worst = html.split("Worst questions")[1].split("Best questions")[0]
    assert worst.count('class="beside"') == 3 and worst.count("<pre>") == 9
    assert "teacher · right · answer &lt;u&gt;0&lt;/u&gt;" in worst
    for foreign in ("<script", "<i>0", "<u>", "<b>geometry"):
        assert foreign not in html
    assert "default-src 'none'" in html and "://" not in html.replace("http://www.w3.org", "")


def test_a_long_response_is_cut(tmp_path, paths):
    responses = tmp_path / "student.responses.jsonl"
    responses.write_text(responses.read_text().replace("$x$", "y" * 9000))
    html = comparison_page(compare(paths))
    assert "more characters)" in html and "y" * 2001 not in html


def test_results_without_costs_or_responses(tmp_path):
    paths = [make_result(tmp_path / f"{name}.json", marks, costs=None) for name, marks in (("a", "10"), ("b", "01"))]
    for path in paths:
        path.with_name(f"{path.stem}.responses.jsonl").unlink()
    html = comparison_page(compare(paths))
    assert "Pass@1 over" not in html
    assert row_of(html, "b")[2:5] == ["-"] * 3
    assert html.split("Worst questions")[1].count("no data") >= 2


def test_page_plots_and_tables_are_written(tmp_path, paths, capsys):
    output = tmp_path / "out" / "report.html"
    evaluate.main(["--compare", *map(str, paths), "--output", str(output)])
    assert "points" in capsys.readouterr().out
    files = output.with_name("report_files")
    assert sorted(path.name for path in files.iterdir()) == [
        *("by_subject.csv", "by_subject.png", "by_subject.svg", "headline.csv", "quality_over_active_parameters.png"),
        *("quality_over_active_parameters.svg", "quality_over_flops_per_token.png"),
        *("quality_over_flops_per_token.svg", "questions.csv"),
    ]
    for drawn in files.glob("*.svg"):
        text = drawn.read_text()
        ElementTree.fromstring(text)
        assert "#0000" not in text.replace("#000000", "")
    for drawn in files.glob("*.png"):
        assert drawn.read_bytes().startswith(b"\x89PNG")
    with (files / "headline.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["teacher", "student", "'=other"]
    assert float(rows[1]["greedy_difference"]) == 0 and rows[0]["greedy_difference"] == ""
    assert rows[1]["active_parameters"] == "50"
    with (files / "questions.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * (6 + 6)
    with pytest.raises(UserError, match="already exists"):
        evaluate.main(["--compare", *map(str, paths), "--output", str(output)])
    evaluate.main(["--compare", *map(str, paths), "--output", str(output), "--overwrite"])


def test_two_sets_of_questions(tmp_path, paths):
    more = [make_result(tmp_path / f"{name}2.json", "01", problems="b") for name in ("teacher", "student")]
    output = tmp_path / "report.html"
    evaluate.main(["--compare", *map(str, [*paths, *more]), "--output", str(output)])
    assert '<a href="#set-1">' in output.read_text()
    assert {path.name for path in (tmp_path / "report_files").iterdir()} == {"set_1", "set_2"}


@pytest.mark.parametrize("name", ["report.json", "report"])
def test_a_page_has_the_name_of_one(tmp_path, paths, name):
    with pytest.raises(UserError, match=r"ends in \.html"):
        evaluate.main(["--compare", *map(str, paths), "--output", str(tmp_path / name)])


@pytest.mark.parametrize("line", [b"[]\n", b'{"sample": "\xe9"}\n'])
def test_broken_responses_leave_nothing(tmp_path, paths, line):
    (tmp_path / "student.responses.jsonl").write_bytes(line)
    with pytest.raises(UserError, match=r"student\.responses\.jsonl, line 1: is no response"):
        evaluate.main(["--compare", *map(str, paths), "--output", str(tmp_path / "report.html")])
    assert not list(tmp_path.glob("report*"))
