import time

import pytest

from padd_ds.data.answers import AnswerFormat, extract_answer, last_boxed, same_answer
from padd_ds.errors import UserError


@pytest.mark.parametrize(
    ("name", "response", "answer"),
    [
        ("boxed", r"So \boxed{1}, no, $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("boxed", r"a set \boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"unclosed \boxed{12", None),
        ("boxed", r"closed \boxed{3}, then unclosed \boxed{12", "3"),
        ("boxed", r"empty \boxed{}", None),
        ("boxed", r"so $x = \boxed 9$.", "9"),
        ("boxed", r"the \boxed answer is 9", None),
        ("hash", "worked\n#### 1,000 \nmore", "1,000"),
        ("hash", "no mark", None),
        ("tag", "<think> 3 </think> <answer> 4 </answer> done", "4"),
        ("tag", r"<answer> so \boxed{5}", "5"),
        ("tag", r"\boxed{5}", None),
        ("last_number", "first 3, then -1,234.50.", "-1234.50"),
        ("last_number", "12-7=5 of 10-5", "5"),
        ("last_number", "x = -3", "-3"),
        ("last_number", "none", None),
        ("first_line", "\n 42 \nand more", "42"),
        ("first_line", "  \n", None),
    ],
)
def test_answer_is_found_where_the_format_says(name, response, answer):
    assert extract_answer(response, AnswerFormat(name=name)) == answer


@pytest.mark.parametrize("name", ["auto", "pattern"])
def test_pattern_takes_the_last_match_of_any_line(name):
    wanted = AnswerFormat(name=name, pattern=r"#(-?\d+)$")
    assert extract_answer("#1\n1+1=2#-2\n#x", wanted) == "-2"
    assert extract_answer("none", wanted) is None


def test_overlong_answer_is_no_answer():
    assert extract_answer(r"\boxed{" + "1" * 3000 + "}", AnswerFormat(name="boxed")) is None


@pytest.mark.parametrize("name", ["boxed", "hash", "last_number", "first_line"])
@pytest.mark.parametrize("unit", [r"\boxed{", "####", "1,1", "9", "\n", "{}"])
def test_extraction_of_a_huge_response_is_fast(name, unit):
    response = unit * (100_000 // len(unit))
    start = time.perf_counter()
    extract_answer(response, AnswerFormat(name=name))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("7", "7", True),
        ("007", "7", True),
        ("-7", "7", False),
        ("8", "7", False),
        (" x+1 ", "x+1", True),
        ("7.0", "7", None),
        ("1/2", "0.5", None),
        ("", "", False),
    ],
)
def test_plain_text_decides_only_where_it_can(answer, gold, same):
    assert same_answer(answer, gold) is same


def test_last_boxed_skips_escaped_braces():
    assert last_boxed(r"\boxed{\} 1 \{}") == r"\} 1 \{"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "guess"}, "choose one of auto, boxed"),
        ({"name": "pattern"}, "needs a pattern"),
        ({"name": "boxed", "pattern": "(.)"}, "takes no pattern"),
        ({"name": "pattern", "pattern": "(a)(b)"}, "exactly one group"),
        ({"name": "pattern", "pattern": "("}, "not a regular expression"),
    ],
)
def test_bad_formats_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        AnswerFormat(**options)
