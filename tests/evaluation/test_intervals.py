import pytest
from scipy.stats import binomtest

from padd_ds.evaluation.intervals import mean_interval, wilson_interval


def test_value_worked_by_hand():
    # 8 of 10 with z = 2: centre (0.8 + 0.2) / 1.4, half sqrt(0.8 * 0.2 * 0.4 + 0.04) / 1.4
    low, high = wilson_interval(8, 10, z=2.0)
    assert (low, high) == (pytest.approx(0.483935, abs=1e-6), pytest.approx(0.944636, abs=1e-6))


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 50), (1, 3), (25, 50), (50, 50), (640, 1319)])
def test_scipy_agrees(successes, trials):
    expected = binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_no_trials_say_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        wilson_interval(3, 2)


def test_interval_of_a_mean_worked_by_hand():
    # Shares .2, .4, .6, .8: mean .5, variance .2 / 3, standard error sqrt(.2 / 12).
    assert mean_interval([0.2, 0.4, 0.6, 0.8], z=2.0) == pytest.approx(
        (0.5 - 2 * (0.2 / 12) ** 0.5, 0.5 + 2 * (0.2 / 12) ** 0.5)
    )


def test_interval_of_a_mean_stays_among_shares_and_needs_two():
    assert mean_interval([0.0, 1.0]) == (0.0, 1.0)
    assert mean_interval([0.5]) == (0.0, 1.0)


def test_shares_that_are_all_alike_are_no_certainty():
    assert mean_interval([0.0] * 5) == wilson_interval(0, 5)
    assert mean_interval([1.0] * 5) == wilson_interval(5, 5)
