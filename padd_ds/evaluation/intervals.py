"""Confidence intervals of shares."""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a share, within [0, 1]; (0, 1) if there are no trials."""
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    if trials == 0:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def mean_interval(shares: Sequence[float], z: float = Z_95) -> tuple[float, float]:
    """The normal interval of the mean of shares, one per problem, within [0, 1]; (0, 1) below two problems.

    Where all shares are 0, or all are 1, it would have no width: then Wilson's, of as many single responses.
    """
    if len(shares) < 2:
        return 0.0, 1.0
    if set(shares) in ({0.0}, {1.0}):
        return wilson_interval(int(sum(shares)), len(shares))
    mean, half = fmean(shares), z * stdev(shares) / sqrt(len(shares))
    return max(0.0, mean - half), min(1.0, mean + half)
