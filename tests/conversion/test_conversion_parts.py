"""The numeric parts of a conversion: features, quality, prior, router, shared slices."""

import pytest
import torch
from torch.nn import functional

from padd_ds.conversion import router
from padd_ds.conversion.features import (
    contribution_pattern,
    contributions,
    hidden_activations,
)
from padd_ds.conversion.layer import split_shared
from padd_ds.conversion.options import Slicing
from padd_ds.conversion.prior import cluster_activation_means
from padd_ds.conversion.quality import silhouette, size_variation, sums_of_squares
from padd_ds.conversion.router import (
    LOGIT_SPREAD,
    CalibratedRouter,
    Router,
    RouterData,
    centroid_router,
    even_load,
    logit_spread,
    make_router,
)
from padd_ds.losses.prior import expert_activation_sums, expert_prior


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_contribution_is_what_a_neuron_adds_to_the_residual_stream() -> None:
    x_SD, gate_FD, up_FD = (torch.randn(shape, generator=seeded(1)) for shape in ((5, 3), (4, 3), (4, 3)))
    down_DF = torch.randn(3, 4, generator=seeded(2))
    hidden_SF = hidden_activations(x_SD, gate_FD, up_FD)
    found_SF = contributions(hidden_SF, down_DF)
    for token in range(5):
        for neuron in range(4):
            gate, up = gate_FD[neuron] @ x_SD[token], up_FD[neuron] @ x_SD[token]
            added_D = down_DF[:, neuron] * functional.silu(gate) * up
            assert found_SF[token, neuron] == pytest.approx(float(added_D.norm()), rel=1e-5)


def test_contribution_pattern_forgets_how_much_a_neuron_gives() -> None:
    pattern_FS = contribution_pattern(torch.tensor([[1.0, 9.0, 1e-3], [4.0, 36.0, 2.0]]))
    assert torch.allclose(pattern_FS[0], pattern_FS[1])
    assert torch.allclose(pattern_FS.norm(dim=1), torch.ones(3))
    assert pattern_FS[2, 1] > 0.99


def test_quality_of_two_far_pairs_by_hand() -> None:
    points_PC = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    good_P, bad_P = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    # For the point 0: inside 2, outside 11, so 9/11; for the point 2: inside 2, outside 9, so 7/9.
    assert silhouette(points_PC, good_P, seeded()) == pytest.approx((9 / 11 + 7 / 9) / 2)
    assert silhouette(points_PC, bad_P, seeded()) < 0
    # Variance: total 4 * 26 = 104, between 4 * 25 = 100.
    assert sums_of_squares(points_PC, torch.tensor([[1.0], [11.0]]), good_P) == pytest.approx((4, 100))
    assert size_variation(good_P, 2) == 0
    assert size_variation(torch.tensor([0, 0, 0, 1]), 2) == pytest.approx(0.5)


def test_silhouette_of_one_cluster_is_zero() -> None:
    assert silhouette(torch.randn(6, 2), torch.zeros(6, dtype=torch.long), seeded()) == 0.0


def test_expert_activation_sums_equal_a_slow_loop() -> None:
    x_SD = torch.randn(6, 3, generator=seeded(1))
    gate_EFD, up_EFD = torch.randn(2, 4, 3, generator=seeded(2)), torch.randn(2, 4, 3, generator=seeded(3))
    expected = [0.0, 0.0]
    for expert in range(2):
        for x_D in x_SD:
            for gate_D, up_D in zip(gate_EFD[expert], up_EFD[expert], strict=True):
                expected[expert] += abs(float(functional.silu(gate_D @ x_D) * (up_D @ x_D))) / 4
    assert expert_activation_sums(x_SD, gate_EFD, up_EFD).tolist() == pytest.approx(expected, rel=1e-5)


def test_expert_activation_sums_add_up_over_shards_of_tokens() -> None:
    x_SD = torch.randn(10, 3, generator=seeded(1))
    gate_EFD, up_EFD = torch.randn(2, 4, 3, generator=seeded(2)), torch.randn(2, 4, 3, generator=seeded(3))
    parts = sum(expert_activation_sums(part, gate_EFD, up_EFD) for part in x_SD.split([3, 0, 7]))
    assert torch.allclose(parts, expert_activation_sums(x_SD, gate_EFD, up_EFD))


def test_expert_activation_sums_have_the_right_gradient() -> None:
    x_SD = torch.randn(3, 2, dtype=torch.float64, generator=seeded(1))
    gate_EFD = torch.randn(2, 2, 2, dtype=torch.float64, generator=seeded(2)).requires_grad_()
    up_EFD = torch.randn(2, 2, 2, dtype=torch.float64, generator=seeded(3)).requires_grad_()
    expert_activation_sums(x_SD, gate_EFD, up_EFD).sum().backward()
    step = torch.zeros_like(gate_EFD)
    step[1, 0, 1] = 1e-3
    with torch.no_grad():
        high = expert_activation_sums(x_SD, gate_EFD + step, up_EFD).sum()
        low = expert_activation_sums(x_SD, gate_EFD - step, up_EFD).sum()
    assert gate_EFD.grad is not None
    assert float((high - low) / 2e-3) == pytest.approx(float(gate_EFD.grad[1, 0, 1]), rel=1e-2)


def test_expert_prior_by_hand_and_in_its_limits() -> None:
    mean_E = torch.tensor([1.0, 3.0])  # divided by their mean: 0.5 and 1.5
    weight = torch.tensor([0.5 / 0.4, 1.5 / 0.4]).exp()
    assert torch.allclose(expert_prior(mean_E, 0.4), weight / weight.sum())
    assert torch.allclose(expert_prior(5 * mean_E, 0.4), expert_prior(mean_E, 0.4))
    assert torch.allclose(expert_prior(mean_E, 1e6), torch.tensor([0.5, 0.5]), atol=1e-5)
    with pytest.raises(ValueError, match="positive"):
        expert_prior(mean_E, 0.0)


def test_teacher_and_student_measure_activations_alike() -> None:
    x_SD = torch.randn(20, 3, generator=seeded(1))
    gate_FD, up_FD = torch.randn(8, 3, generator=seeded(2)), torch.randn(8, 3, generator=seeded(3))
    members_EG = torch.tensor([[3, 1, 6, 0], [2, 7, 4, 5]])
    teacher_E = cluster_activation_means(hidden_activations(x_SD, gate_FD, up_FD), members_EG)
    student_E = expert_activation_sums(x_SD, gate_FD[members_EG], up_FD[members_EG]) / 20
    assert torch.allclose(teacher_E, student_E / student_E.mean(), rtol=1e-5)
    assert float(teacher_E.mean()) == pytest.approx(1.0)


def test_ascent_collects_more_of_what_choosing_is_worth() -> None:
    x_SD = torch.randn(600, 6, generator=seeded(1))
    # One token in ten is worth a hundred times the others and follows the opposite rule.
    precious_S1 = (torch.arange(600) % 10 == 0)[:, None]
    rule_SE = x_SD @ torch.randn(6, 5, generator=seeded(2))
    gain_SE = torch.where(precious_S1, (-rule_SE).exp(), 0.01 * rule_SE.exp())
    regression = CalibratedRouter(x_SD)
    start = regression.fit(gain_SE.log())
    collected = []
    for weight_ED, intercept_E in (start, regression.ascend(*start, gain_SE, top_k=2)):
        chosen_SK = (x_SD @ weight_ED.T + intercept_E).topk(2, dim=1).indices
        collected.append(float(gain_SE.gather(1, chosen_SK).sum() / gain_SE.sum()))
    assert collected[0] + 0.01 < collected[1] <= 1


@pytest.mark.parametrize("top_k", [1, 3])
def test_an_even_load_changes_the_selection_and_not_the_logits(top_k: int) -> None:
    x_SD = torch.randn(2000, 6, generator=seeded(1))
    weight_ED = torch.randn(8, 6, generator=seeded(2)) * 0.05
    router = Router(weight_ED=weight_ED, bias_E=torch.linspace(-0.2, 0.2, 8))
    even = even_load(router, x_SD, top_k)

    def excess(one: Router) -> float:
        load_E = (one.weights(x_SD, top_k) > 0).float().sum(0)
        return float(load_E.max() / load_E.mean() - 1)

    assert excess(router) > 1
    assert excess(even) < 0.05
    assert torch.equal(even.weight_ED, router.weight_ED)


def test_calibrated_router_orders_experts_as_a_linear_target_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "RIDGE", 1e-3)
    x_SD = torch.randn(400, 5, generator=seeded(1)) + 1.0
    target_SE = x_SD @ torch.randn(5, 4, generator=seeded(2)) + torch.tensor([0.0, 3.0, -2.0, 1.0])
    weight_ED, intercept_E = CalibratedRouter(x_SD).fit(target_SE)
    same = (x_SD @ weight_ED.T + intercept_E).argsort(1) == target_SE.argsort(1)
    assert float(same.float().mean()) > 0.98
    assert torch.allclose(intercept_E, torch.tensor([-0.5, 2.5, -2.5, 0.5]), atol=0.02)
    without_ED, zero_E = CalibratedRouter(x_SD, intercept=False).fit(target_SE)
    assert not zero_E.any()
    assert float((without_ED - weight_ED).norm()) > 0.1


@pytest.mark.parametrize("kind", ["calibrated", "centroid", "random"])
def test_logits_spread_by_the_stated_amount(kind: str) -> None:
    x_SD = 3 * torch.randn(300, 6, generator=seeded(1))
    contribution_SE = torch.rand(300, 4, generator=seeded(2))
    gate_FD, members_EG = torch.randn(12, 6, generator=seeded(3)), torch.arange(12).view(4, 3)
    data = RouterData(x_SD=x_SD, contribution_SE=contribution_SE, gain_SE=contribution_SE.square(), top_k=2)
    made = make_router(kind, gate_FD, members_EG, data, seeded(4))
    assert logit_spread(x_SD @ made.weight_ED.T) == pytest.approx(LOGIT_SPREAD, rel=1e-4)
    assert (kind == "calibrated") == bool(made.bias_E.any())


def test_centroid_router_without_data_spreads_on_unit_inputs() -> None:
    gate_FD, members_EG = torch.randn(64, 32, generator=seeded(1)), torch.arange(64).view(8, 8)
    made = make_router("centroid", gate_FD, members_EG, None, seeded())
    x_SD = torch.randn(2000, 32, generator=seeded(2))
    assert logit_spread(x_SD @ made.weight_ED.T) == pytest.approx(LOGIT_SPREAD, rel=0.1)


def test_centroid_rows_are_means_of_gate_rows() -> None:
    gate_FD = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 4.0], [0.0, 0.0]])
    router_ED = centroid_router(gate_FD, torch.tensor([[0, 1], [2, 3]]))
    assert router_ED.tolist() == [[2.0, 1.0], [0.0, 2.0]]


def test_calibrated_router_without_data_is_refused() -> None:
    with pytest.raises(ValueError, match="needs calibration data"):
        make_router("calibrated", torch.ones(4, 2), torch.arange(4).view(2, 2), None, seeded())


def test_shared_slices_take_the_most_important_neurons() -> None:
    slicing = Slicing(width=8, experts=4, shared=1, top_k=2)
    shared, routed = split_shared(torch.tensor([0.0, 5.0, 1.0, 9.0, 2.0, 2.0, 2.0, 2.0]), slicing)
    assert shared.tolist() == [3, 1]
    assert routed.tolist() == [0, 2, 4, 5, 6, 7]
