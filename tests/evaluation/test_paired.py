from math import sqrt

import pytest
from scipy.stats import binomtest

from padd_ds.evaluation.paired import difference, sign_test


def test_difference_worked_by_hand():
    # Differences 1, 1, 0, -1: mean 1/4, variance (2 * .75^2 + .25^2 + 1.25^2) / 3 = 11 / 12.
    found = difference([0, 0, 1, 1], [1, 1, 1, 0])
    half = 1.959963984540054 * sqrt(11 / 12 / 4)
    assert (found.mean, found.better, found.worse) == (0.25, 2, 1)
    assert found.interval_95 == (pytest.approx(0.25 - half), 1.0)
    assert found.p_value == 1.0
    assert difference([0.5], [1.0]).interval_95 == (-1.0, 1.0)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (5, 5), (3, 12), (40, 20)])
def test_sign_test_is_scipys(better, worse):
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert sign_test(better, worse) == pytest.approx(expected)
