"""Refit of down_proj and regrouping of neurons."""

import pytest
import torch

from padd_ds.conversion.refit import neuron_weights, reconstruction_error, refit_down
from padd_ds.conversion.regroup import regroup
from padd_ds.conversion.router import CalibratedRouter, Router


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_weights_of_neurons_by_hand() -> None:
    weight_SE = torch.tensor([[0.5, 0.0], [0.0, 1.5]])
    members_NG = torch.tensor([[3, 0], [1, 5], [2, 4]])
    assert neuron_weights(weight_SE, members_NG, 6).tolist() == [[0.5, 0, 1, 0.5, 1, 0], [0, 1.5, 1, 0, 1, 1.5]]


@pytest.mark.parametrize("n_tokens", [200, 9])
def test_refit_minimises_its_objective(n_tokens: int) -> None:
    active_SF, target_SD, down_DF = normal(1, n_tokens, 12), normal(2, n_tokens, 5), normal(3, 5, 12)
    ridge = 0.3
    strength = ridge * active_SF.square().sum() / 12
    # The same problem as plain least squares: one more row per neuron that asks for the teacher's column.
    rows = torch.cat([active_SF, strength.sqrt() * torch.eye(12)])
    wanted = torch.cat([target_SD, strength.sqrt() * down_DF.T])
    expected_DF = torch.linalg.lstsq(rows.double(), wanted.double()).solution.T.float()
    assert torch.allclose(refit_down(active_SF, target_SD, down_DF, ridge), expected_DF, rtol=1e-4, atol=1e-5)


def test_refit_recovers_what_a_silent_neuron_used_to_give() -> None:
    hidden_SF, down_DF = normal(1, 500, 6), normal(2, 4, 6)
    hidden_SF[:, 5] = hidden_SF[:, 0] + 0.1 * normal(3, 500)
    target_SD = hidden_SF @ down_DF.T
    active_SF = hidden_SF.clone()
    active_SF[:, 5] = 0
    refitted_DF = refit_down(active_SF, target_SD, down_DF, ridge=1e-4)
    before = reconstruction_error(target_SD, active_SF @ down_DF.T)
    assert reconstruction_error(target_SD, active_SF @ refitted_DF.T) < 0.02 * before
    assert torch.equal(refitted_DF[:, 5], down_DF[:, 5])  # never active: kept
    assert torch.allclose(refit_down(active_SF, target_SD, down_DF, ridge=1e6), down_DF, atol=1e-3)


def test_router_weights_are_those_of_the_student_class() -> None:
    router = Router(weight_ED=torch.tensor([[1.0], [0.0], [-1.0]]), bias_E=torch.tensor([-1.0, 0.0, 0.0]))
    weights_SE = router.weights(torch.tensor([[2.0]]), top_k=2)
    scores = torch.sigmoid(torch.tensor([0.0, -2.0]))
    # The bias pushes the first expert out, and does not enter the weights of the others.
    assert weights_SE[0].tolist() == pytest.approx([0.0, *(2 * scores / scores.sum()).tolist()])


def test_regrouping_finds_the_neurons_that_a_router_can_foresee() -> None:
    x_SD = normal(0, 600, 4)
    fires_S4 = x_SD.abs()  # neurons 0-3 fire with the first input, ...; what a linear router foresees is their sign
    signs_S4 = (x_SD > 0).float()
    contribution_SP = (fires_S4 * signs_S4).repeat_interleave(6, dim=1) + 0.01
    mixed_P = torch.arange(24) % 4
    router = CalibratedRouter(x_SD)
    found_P = regroup(contribution_SP, mixed_P, router, x_SD, n_experts=4, top_k=1, rounds=5)
    kept = [kept_share(contribution_SP, one_P, router, x_SD) for one_P in (mixed_P, found_P)]
    assert torch.bincount(found_P).tolist() == [6, 6, 6, 6]
    assert kept[1] > 1.3 * kept[0]
    assert torch.equal(regroup(contribution_SP, mixed_P, router, x_SD, n_experts=4, top_k=1, rounds=0), mixed_P)


def kept_share(
    contribution_SP: torch.Tensor, assignment_P: torch.Tensor, router: CalibratedRouter, x_SD: torch.Tensor
) -> float:
    energy_SP = contribution_SP.square()
    per_expert_SE = energy_SP @ torch.nn.functional.one_hot(assignment_P, 4).float()
    weight_ED, intercept_E = router.fit(per_expert_SE.sqrt())
    chosen_S1 = (x_SD @ weight_ED.T + intercept_E).argmax(dim=1, keepdim=True)
    return float(per_expert_SE.gather(1, chosen_S1).sum() / energy_SP.sum())
