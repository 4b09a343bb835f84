"""Means over seeds with intervals, and paired comparisons of two methods on the same questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy import stats


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float
    p_value: float | None = None
    """Two-sided, of a mean of 0; None where that is no question."""


def pooled(verdicts: Sequence[Sequence[float]]) -> Estimate:
    """Mean of one list of scores per seed; the interval is over questions, for these seeds.

    Seeds weigh equally, and questions are drawn anew within each: it does not cover another choice of seeds.
    """
    means = [fmean(one) for one in verdicts]
    variance = sum(stdev(one) ** 2 / len(one) for one in verdicts) / len(verdicts) ** 2
    half = stats.norm.ppf(0.975) * sqrt(variance)
    return Estimate(mean=fmean(means), low=fmean(means) - half, high=fmean(means) + half)


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one value per seed with Student's interval, for new seeds; a single one has no interval."""
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(mean=mean, low=float("-inf"), high=float("inf"))
    error = stdev(values) / sqrt(len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    p_value = 2 * float(stats.t.sf(abs(mean) / error, len(values) - 1)) if error > 0 else float(mean == 0)
    return Estimate(mean=mean, low=mean - half, high=mean + half, p_value=p_value)


def paired_over_questions(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> Estimate:
    """Mean of left - right, question by question, for these seeds; ValueError where the lists do not match."""
    differences = []
    for one, other in zip(left, right, strict=True):
        differences.append([a - b for a, b in zip(one, other, strict=True)])
    estimate = pooled(differences)
    error = (estimate.high - estimate.mean) / float(stats.norm.ppf(0.975))
    p_value = 2 * float(stats.norm.sf(abs(estimate.mean) / error)) if error > 0 else 1.0
    return Estimate(mean=estimate.mean, low=estimate.low, high=estimate.high, p_value=p_value)
