"""Two models on the same questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import fmean, stdev

from padd_ds.evaluation.intervals import Z_95


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much more a second model gets right than a first one."""

    mean: float
    """Of the questions' differences in their share of right responses."""
    interval_95: tuple[float, float]
    """Normal, over the questions' differences; (-1, 1) below two questions."""
    better: int
    """Questions of which the second model gets more right."""
    worse: int
    p_value: float
    """Two-sided, of the exact sign test on `better` and `worse`: McNemar's, for one response per question."""


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Of shares of right responses, question by question."""
    each = [after - before for before, after in zip(first, second, strict=True)]
    better, worse = sum(one > 0 for one in each), sum(one < 0 for one in each)
    half = Z_95 * stdev(each) / sqrt(len(each)) if len(each) > 1 else 1.0
    mean = fmean(each)
    interval = (max(-1.0, mean - half), min(1.0, mean + half)) if len(each) > 1 else (-1.0, 1.0)
    return Difference(mean=mean, interval_95=interval, better=better, worse=worse, p_value=sign_test(better, worse))


def sign_test(better: int, worse: int) -> float:
    """The chance, if both were as likely, of a count at least as uneven as this one; 1 if there is nothing to count."""
    total = better + worse
    tail = sum(comb(total, count) for count in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**total)
