"""All experts at once against one token at a time."""

import pytest
import torch
import torch.nn.functional as F

from padd_ds.moe.masked import masked_experts, weights_of_all

S, D, E, WIDTH, K = 7, 6, 5, 3, 2


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    selected_SK = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(S)])
    return draw(S, D), draw(S, K), selected_SK, draw(E, WIDTH, D), draw(E, D, WIDTH), draw(E, WIDTH, D)


def fast(x_SD, weights_SK, selected_SK, *weights):
    return masked_experts(x_SD, weights_of_all(weights_SK, selected_SK, E), *weights)


def slow(x_SD, weights_SK, selected_SK, w_gate_EFD, w_down_EDF, w_up_EFD):
    rows = []
    for x_D, weights_K, selected_K in zip(x_SD, weights_SK, selected_SK, strict=True):
        terms = [
            weight * (w_down_EDF[expert] @ (F.silu(w_gate_EFD[expert] @ x_D) * (w_up_EFD[expert] @ x_D)))
            for weight, expert in zip(weights_K, selected_K.tolist(), strict=True)
        ]
        rows.append(torch.stack(terms).sum(dim=0))
    return torch.stack(rows)


def test_it_is_the_weighted_sum_of_the_chosen_experts_with_its_gradients(parts):
    torch.testing.assert_close(fast(*parts), slow(*parts))
    inputs = [part for part in parts if part.requires_grad]
    upstream_SD = torch.linspace(-1, 1, S * D, dtype=torch.float64).view(S, D)
    gradients = torch.autograd.grad(fast(*parts), inputs, upstream_SD)
    for got, expected in zip(gradients, torch.autograd.grad(slow(*parts), inputs, upstream_SD), strict=True):
        torch.testing.assert_close(got, expected)


def test_an_expert_that_nobody_chose_gets_no_gradient(parts):
    x_SD, weights_SK, _, *weights = parts
    selected_SK = torch.tensor([[0, 1]]).expand(S, K)
    grads = torch.autograd.grad(fast(x_SD, weights_SK, selected_SK, *weights).sum(), weights)
    for grad_EXX in grads:
        assert grad_EXX[2:].abs().max() == 0 < grad_EXX[:2].abs().max()
