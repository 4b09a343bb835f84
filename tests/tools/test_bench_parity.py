"""What the parity benchmark makes of the metrics of two runs; a run of it is what `make bench-parity` does."""

from tools.bench_parity import compared


def test_deviations_are_relative_but_for_a_loss_that_cancels() -> None:
    expected = [{"loss_policy": 1e-9, "loss_kd": 2.0, "grad_norm": 4.0}] * 2
    found = [
        {"loss_policy": 2e-9, "loss_kd": 2.0, "grad_norm": 4.4},
        {"loss_policy": 3e-3, "loss_kd": 2.2, "grad_norm": 9},
    ]
    assert compared("joint", found, expected) == ["1e-09", "1e-01", "1e-01"]


def test_a_gradient_that_is_not_told_is_told_to_be_so() -> None:
    assert compared("warmup", [{"loss_lm": 1, "loss_kd": 1}], [{"loss_lm": 1, "loss_kd": 2}])[1] == "not told"
