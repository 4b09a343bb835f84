"""The headline table and its numbers."""

import pytest

from padd_ds.report import TableRow, format_table
from padd_ds.report.numbers import MINUS, TIMES, readable, scaled
from padd_ds.report.tables import html_table

TEACHER = TableRow("teacher", 39.414, 0.594, 0.568, 0.62, 0.511, 1378, 134_515_008, 134_515_008, 269_030_016)
CONVERTED = TableRow("converted", 212.4, 0.322, 0.298, 0.347, None, 1378, 110_000_000, 1_410_000_000, 2.2e8)
UNMEASURED = TableRow("joint", active_parameters=999)


def test_table_is_aligned_and_the_teacher_first() -> None:
    assert format_table([CONVERTED, TEACHER, UNMEASURED]).split("\n") == [
        "model      perplexity  Pass@1 %  95 % interval  sampled %  questions  active   total  FLOPs/token",
        "teacher         39.41      59.4   56.8 to 62.0       51.1       1378  134.5M  134.5M       269.0M",
        "converted      212.40      32.2   29.8 to 34.7          -       1378  110.0M    1.4G       220.0M",
        "joint               -         -              -          -          -     999       -            -",
    ]


def test_table_without_rows_has_its_header_alone() -> None:
    assert (
        format_table([])
        == "model  perplexity  Pass@1 %  95 % interval  sampled %  questions  active  total  FLOPs/token"
    )


def test_html_table_escapes_names_and_draws_known_shares_only() -> None:
    html = html_table([TableRow("<b>x</b>", pass_at_1=0.25), UNMEASURED])
    assert "&lt;b&gt;x&lt;/b&gt;" in html and "<b>x" not in html
    assert html.count("<svg") == 1
    assert 'class="share" x1="25.0%"' in html


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.03125, "0.0312"), (1234.6, "1230"), (0.0, "0"), (-0.0, "0"), (-2.5, f"{MINUS}2.5"), (float("inf"), "inf")]
    + [
        (2.04e-5, f"2.04{TIMES}10⁻⁵"),
        (-1e-12, f"{MINUS}1{TIMES}10⁻¹²"),
        (0.00099999, "0.001"),
        (3.2e7, f"3.2{TIMES}10⁷"),
    ],
)
def test_numbers_are_rounded_to_three_digits(value: float, text: str) -> None:
    assert readable(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0k"), (999_949, "999.9k"), (999_950, "1.0M"), (7.6e9, "7.6G"), (2e12, "2.0T")],
)
def test_counts_get_a_decimal_prefix(count: float, text: str) -> None:
    assert scaled(count) == text
