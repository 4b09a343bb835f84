import time

import pytest

from padd_ds.data.answers import Tolerance
from padd_ds.rollout.compare import answers_in, can_be_read, compare, number, split_answers


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        # Numbers
        (r"2{,}125\,", "2,125", True),
        (r"4.5 \times 10^{33} \text{ erg/s}", "4.5e33", True),
        ("4.6e33", "4.5e33", False),
        ("5e-8", "1e-8", False),
        ("18.90", r"\$18.9", True),
        (r"\textbf{(073)}", "073", True),
        ("-1/3", "-1./3", True),
        ("2^2", "4", True),
        # Units, which are no unknowns
        (r"5 \mathrm{~m} / \mathrm{s}^2", "5", True),
        ("5 km/h", "5", True),
        (r"45^\circ", "45", True),
        (r"\frac{270}{7}", r"\frac{270}7\text{ degrees}", True),
        ("5x", "5", False),
        (r"5\pi", "5", False),
        ("5i", "5", False),
        # Per cent
        (r"50\%", "50", True),
        (r"50\%", "0.5", True),
        (r"51\%", "0.5", False),
        # Several answers
        ("5, 3,1", "$1$,$3$,$5$", True),
        ("1,3", "1,3,5", False),
        ("1,3,3", "1,1,3", False),
        ("1,3", "1,3,3", False),
        ("8,221", "221,8", True),
        (r"8 \text{ and } 221", "221,8", True),
        (r"\{1,2\}", "2,1", True),
        ("x, 2-x", "$f(x)=x$,$f(x)=2-x$", True),
        ("(3,1),(1,2)", "$(1,2), (3,1)$", True),
        (r"\pm 3", "3,-3", True),
        ("E_1,E_2", "E_{2},E_{1}", True),
        # Tuples and intervals
        ("(2,1)", "(1,2)", False),
        ("[1,3]", "(1,3)", False),
        (r"(-\infty,0)\cup\{1\}", r"$(-\infty, 0) \cup\{1\}$.", True),
        (r"(-\infty,0)\cup\{2\}", r"$(-\infty, 0) \cup\{1\}$.", False),
        # Expressions and equations
        ("n^2-n-1", r"m_{\max }=n^{2}-n-1", True),
        ("n^2-n+1", r"m_{\max }=n^{2}-n-1", False),
        (r"\frac23 E_1+\frac23 E_2", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", False),
        (r"\dot{x}_0 / \omega", r"\frac{\dot{x}_{0}}{\omega}", True),
        (r"\arcsin(10/13)", "np.arcsin(10/13)", True),
        ("x>5", r"x \geq 5", False),
        (r"b v + m \frac{d v}{d t} = f", r"m \frac{d v}{d t}+b v=f", True),
        (r"\frac{dM}{dt}=-2 k M^{6}", r"\frac{dM}{dt}=2 k M^{6}", False),
        (r"\begin{pmatrix} 4 \\ 0 \end{pmatrix}", r"\begin{pmatrix}4\\0\end{pmatrix}", True),
        (r"\begin{pmatrix} 5 \\ 0 \end{pmatrix}", r"\begin{pmatrix} 4 \\ 0 \end{pmatrix}", False),
        (r"\frac{2}{2^{98}}", r"\frac{1}{2^{98}}", False),
        (r"2^{-98}", r"\frac{1}{2^{98}}", True),
        # Words
        ("(B)", r"\text{B}", True),
        (r"\text{odd}", r"\text{even}", False),
        ("5", "???", None),
        ("5", " ", None),
    ],
)
def test_answers_agree_by_value(answer, gold, same):
    assert compare(answer, gold) is same


@pytest.mark.parametrize(
    ("answer", "gold", "tolerance", "same"),
    [
        ("1.98e-7", "2e-7", Tolerance(relative=0.01), True),
        ("1.97e-7", "2e-7", Tolerance(relative=0.01), False),
        ("4080", "4100", Tolerance(relative=0.01), True),
        ("4000", "4100", Tolerance(relative=0.01), False),
        ("0", "7.4e-12", Tolerance(relative=0.01), False),
        ("0.8776", "np.arcsin(10/13)", Tolerance(relative=0.01), True),
        ("0.33", r"\frac{1}{3}", Tolerance(relative=0.02), True),
        ("4.3", "4.2", Tolerance(absolute=0.1), True),
        ("4.31", "4.2", Tolerance(absolute=0.1), False),
        ("y-x=0", "y+x=0", Tolerance(relative=0.01), False),
        ("x=0.99", "x=1", Tolerance(relative=0.01), True),
        ("0.99, 2.01", "2, 1", Tolerance(relative=0.01), True),
        ("0.99, 0.995", "2, 1", Tolerance(relative=0.01), False),
    ],
)
def test_numbers_agree_within_a_tolerance(answer, gold, tolerance, same):
    assert compare(answer, gold, tolerance) is same


def test_lists_are_split_outside_of_brackets_alone():
    assert split_answers(r"$(1,2)$, $\frac{1}{2}$ or $f(a,b)$") == ["(1,2)", r"\frac{1}{2}", "f(a,b)"]
    assert split_answers("1,234,567") == ["1,234,567"]
    assert split_answers("12,34") == ["12", "34"]


def test_only_one_number_is_a_number():
    assert [str(number(text)) for text in ("1,000.5 dollars", r"10^{-3}", "x = -2", "1, 2", "3 of 4")] == [
        "1000.5",
        "0.001",
        "-2",
        "None",
        "None",
    ]


def test_boxes_are_read_alone_and_together():
    assert answers_in(r"so \boxed{1}, or rather \boxed{2}")[0] == "2"
    assert compare(answers_in(r"$x=\boxed{8}$ and $\boxed{221}$")[-1], "221,8")
    assert answers_in("nothing") == []


def test_what_can_be_read_is_told_without_an_answer():
    assert can_be_read("4.5e33") and can_be_read(r"\frac{1}{2}")
    assert not can_be_read("???") and not can_be_read("")


@pytest.mark.parametrize(
    "unit",
    ["a", " ", r"\circ}", r"^{\circ}", "1,", "{", r"\text{", "1", "E_", r"x_{\ ", r"\text{a}", "e9", r"^{\prime"],
)
def test_reading_a_long_answer_as_number_or_list_is_fast(unit):
    text = "5 " + unit * (1900 // len(unit)) + "!"
    start = time.perf_counter()
    number(text), split_answers(text)
    assert time.perf_counter() - start < 1
