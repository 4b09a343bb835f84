"""Refit of down_proj and regrouping of neurons."""

import pytest
import torch

from padd_ds.conversion.refit import neuron_weights, reconstruction_error, refit_down, token_weights
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
    weight_S = normal(4, n_tokens).exp()
    penalty_F = 0.3 * (weight_S[:, None] * active_SF.square()).sum(dim=0).mean().expand(12)
    # The same problem as plain least squares: one more row per neuron that asks for the teacher's column.
    root_S1 = weight_S.sqrt()[:, None]
    rows = torch.cat([root_S1 * active_SF, penalty_F.sqrt().diag()])
    wanted = torch.cat([root_S1 * target_SD, penalty_F.sqrt()[:, None] * down_DF.T])
    expected_DF = torch.linalg.lstsq(rows.double(), wanted.double()).solution.T.float()
    found_DF = refit_down(active_SF, target_SD, down_DF, weight_S, ridge=0.3)
    assert torch.allclose(found_DF, expected_DF, rtol=1e-4, atol=1e-5)


def test_refit_recovers_what_a_silent_neuron_used_to_give() -> None:
    hidden_SF, down_DF, weight_S = normal(1, 500, 6), normal(2, 4, 6), torch.ones(500)
    hidden_SF[:, 5] = hidden_SF[:, 0] + 0.1 * normal(3, 500)
    target_SD = hidden_SF @ down_DF.T
    active_SF = hidden_SF.clone()
    active_SF[:, 5] = 0
    refitted_DF = refit_down(active_SF, target_SD, down_DF, weight_S, ridge=1e-4)
    before = reconstruction_error(target_SD, active_SF @ down_DF.T, weight_S)
    assert reconstruction_error(target_SD, active_SF @ refitted_DF.T, weight_S) < 0.02 * before
    assert torch.equal(refitted_DF[:, 5], down_DF[:, 5])  # never active: kept
    assert torch.allclose(refit_down(active_SF, target_SD, down_DF, weight_S, ridge=1e6), down_DF, atol=1e-3)


def test_tokens_count_by_the_inverse_square_of_their_stream() -> None:
    weight_S = token_weights(torch.tensor([[3.0, 4.0], [0.0, 10.0]]))
    assert weight_S.tolist() == pytest.approx([1.6, 0.4])
    errors = reconstruction_error(torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 1.0]]), weight_S)
    assert errors == pytest.approx(1.6 / 2)


def test_router_weights_are_those_of_the_student_class() -> None:
    router = Router(weight_ED=torch.tensor([[1.0], [0.0], [-1.0]]), bias_E=torch.tensor([-1.0, 0.0, 0.0]))
    weights_SE = router.weights(torch.tensor([[2.0]]), top_k=2)
    scores = torch.sigmoid(torch.tensor([0.0, -2.0]))
    # The bias pushes the first expert out, and does not enter the weights of the others.
    assert weights_SE[0].tolist() == pytest.approx([0.0, *(2 * scores / scores.sum()).tolist()])


def test_regrouping_finds_the_neurons_that_a_router_can_foresee() -> None:
    x_SD = normal(0, 600, 4)
    # Neurons 0-5 fire with the first input, and so on; a linear router can foresee it. The last six always fire.
    fires_S4 = (x_SD > 0.5).float()
    energy_SF = torch.cat([fires_S4.repeat_interleave(6, dim=1) + 0.01, torch.full((600, 6), 0.9)], dim=1)
    mixed_F = torch.arange(30) % 5  # slice 4 is shared
    settings = {"n_routed": 4, "n_slices": 5, "top_k": 1}
    found_F = regroup(energy_SF, mixed_F, x_SD, rounds=6, **settings)
    assert torch.bincount(found_F).tolist() == [6] * 5
    assert found_F[24:].tolist() == [4] * 6
    assert kept_share(energy_SF, found_F, x_SD) > 1.2 * kept_share(energy_SF, mixed_F, x_SD)
    assert torch.equal(regroup(energy_SF, mixed_F, x_SD, rounds=0, **settings), mixed_F)


def kept_share(energy_SF: torch.Tensor, slice_F: torch.Tensor, x_SD: torch.Tensor) -> float:
    per_slice_SN = energy_SF @ torch.nn.functional.one_hot(slice_F, 5).float()
    weight_ED, intercept_E = CalibratedRouter(x_SD).fit(per_slice_SN[:, :4].sqrt())
    chosen_S1 = (x_SD @ weight_ED.T + intercept_E).argmax(dim=1, keepdim=True)
    kept = per_slice_SN.gather(1, chosen_S1).sum() + per_slice_SN[:, 4].sum()
    return float(kept / energy_SF.sum())
