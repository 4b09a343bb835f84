"""The PADD router: selection, weights, bias, noise, record."""

import pytest
import torch
from torch import nn
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from padd_ds.moe.router import PaddRouter, RoutingControl, RoutingRecord, score_spread
from tests.tiny import tiny_student

S, D, E, K = 40, 8, 6, 2


def make_router(control: RoutingControl, *, scale: float = float(K), score_function: str = "sigmoid") -> PaddRouter:
    torch.manual_seed(1)
    gate = nn.Linear(D, E, bias=False)
    return PaddRouter(
        gate,
        torch.zeros(E),
        layer=0,
        top_k=K,
        score_function=score_function,
        normalise=True,
        scale=scale,
        control=control,
    )


@pytest.fixture
def x_SD() -> torch.Tensor:
    return torch.randn(S, D, generator=torch.Generator().manual_seed(2))


def test_it_routes_as_the_hugging_face_class() -> None:
    model = tiny_student(n_experts=6, top_k=3)
    theirs: Glm4MoeTopkRouter = model.model.layers[0].mlp.gate
    theirs.e_score_correction_bias.copy_(torch.tensor([0.3, 0.0, -0.2, 0.1, 0.0, -0.4]))
    gate = nn.Linear(32, 6, bias=False)
    gate.weight = theirs.weight
    ours = PaddRouter(
        gate,
        theirs.e_score_correction_bias,
        layer=0,
        top_k=3,
        score_function="sigmoid",
        normalise=True,
        scale=theirs.routed_scaling_factor,
        control=RoutingControl(),
    )
    x_SD = torch.randn(20, 32, generator=torch.Generator().manual_seed(5))
    _, their_weights_SK, their_experts_SK = theirs(x_SD)
    weights_SK, experts_SK, counts_E = ours(x_SD)
    assert torch.equal(dense(weights_SK, experts_SK, 6), dense(their_weights_SK, their_experts_SK, 6))
    assert counts_E.tolist() == [(their_experts_SK == expert).sum().item() for expert in range(6)]


def dense(weights_SK: torch.Tensor, experts_SK: torch.Tensor, n_experts: int) -> torch.Tensor:
    return torch.zeros(len(weights_SK), n_experts).scatter(1, experts_SK, weights_SK.detach())


def test_the_selection_bias_chooses_but_does_not_weigh(x_SD: torch.Tensor) -> None:
    router = make_router(RoutingControl())
    router.e_score_correction_bias[4] = 10.0
    weights_SK, experts_SK, _ = router(x_SD)
    assert (experts_SK == 4).any(dim=1).all()
    scores_SE = torch.sigmoid(x_SD @ router.gate.weight.T)
    chosen_SK = scores_SE.gather(1, experts_SK)
    torch.testing.assert_close(weights_SK, K * chosen_SK / chosen_SK.sum(1, keepdim=True))


def test_the_logit_bias_changes_scores_too(x_SD: torch.Tensor) -> None:
    record = RoutingRecord()
    router = make_router(RoutingControl(record=record))
    router(x_SD)
    before_SE = record.scores_SE[0]
    router.logit_bias[1] = 2.0
    router(x_SD)
    expected_E = before_SE[:, 1].logit() + 2
    torch.testing.assert_close(record.scores_SE[0][:, 1], torch.sigmoid(expected_E))


def test_sample_draws_distinct_experts_evenly_with_equal_weights(x_SD: torch.Tensor) -> None:
    control = RoutingControl(mode="sample", seed=3)
    router = make_router(control)
    weights_SK, experts_SK, _ = router(x_SD.repeat(100, 1))
    assert (experts_SK[:, 0] != experts_SK[:, 1]).all()
    assert torch.equal(weights_SK, torch.ones_like(weights_SK))
    share_E = torch.bincount(experts_SK.flatten(), minlength=E) / experts_SK.numel()
    # 8000 draws with probability 1/6: a standard error of 0.004.
    assert (share_E - 1 / E).abs().max() < 0.02


def test_draws_repeat_with_the_seed_and_differ_between_seeds_and_layers(x_SD: torch.Tensor) -> None:
    control = RoutingControl(mode="sample", seed=3)
    router = make_router(control)
    first, again = router(x_SD)[1], router(x_SD)[1]
    assert torch.equal(first, again)
    router.layer = 1
    other_layer = router(x_SD)[1]
    router.layer, control.seed = 0, 4
    assert not torch.equal(first, other_layer)
    assert not torch.equal(first, router(x_SD)[1])


@pytest.mark.parametrize(("scale", "weight"), [(float(K), 1.0), (1.0, 1 / E)])
def test_dense_applies_all_experts(x_SD: torch.Tensor, scale: float, weight: float) -> None:
    """Experts cut from one FFN (scale = K) add up; others are averaged."""
    weights_SK, experts_SK, counts_E = make_router(RoutingControl(mode="dense"), scale=scale)(x_SD)
    assert experts_SK.tolist() == [list(range(E))] * S
    torch.testing.assert_close(weights_SK, torch.full((S, E), weight))
    assert counts_E.tolist() == [S] * E


def test_noise_changes_the_choice_but_not_what_is_recorded(x_SD: torch.Tensor) -> None:
    quiet, noisy = RoutingRecord(), RoutingRecord()
    control = RoutingControl(record=quiet)
    router = make_router(control)
    router(x_SD)
    control.noise, control.record = 3.0, noisy
    router(x_SD)
    assert torch.equal(quiet.scores_SE[0], noisy.scores_SE[0])
    assert not torch.equal(quiet.selected_SK[0], noisy.selected_SK[0])


def test_gradient_reaches_the_gate_but_not_the_record(x_SD: torch.Tensor) -> None:
    record = RoutingRecord()
    router = make_router(RoutingControl(record=record))
    weights_SK, _, _ = router(x_SD)
    weights_SK[:, 0].sum().backward()
    assert router.gate.weight.grad is not None and router.gate.weight.grad.abs().max() > 0
    assert not record.scores_SE[0].requires_grad


def test_softmax_scores_sum_to_one(x_SD: torch.Tensor) -> None:
    record = RoutingRecord()
    make_router(RoutingControl(record=record), score_function="softmax")(x_SD)
    torch.testing.assert_close(record.scores_SE[0].sum(1), torch.ones(S))


def test_spread_is_the_deviation_over_experts() -> None:
    scores_SE = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert score_spread(scores_SE).tolist() == [1.0, 0.0]


def test_noise_on_a_token_does_not_depend_on_its_neighbours(x_SD: torch.Tensor) -> None:
    quiet_K, changed = make_router(RoutingControl())(x_SD)[1][0].sort().values, 0
    for seed in range(20):
        chosen = []
        for factor in (1.0, 100.0):
            other_SD = torch.cat([x_SD[:1], factor * x_SD[1:]])
            chosen.append(make_router(RoutingControl(noise=2.0, seed=seed))(other_SD)[1][0].sort().values)
        assert torch.equal(*chosen)
        changed += not torch.equal(chosen[0], quiet_K)
    assert changed > 0


def test_an_empty_batch_of_tokens_works() -> None:
    weights_SK, experts_SK, counts_E = make_router(RoutingControl())(torch.zeros(0, D))
    assert weights_SK.shape == experts_SK.shape == (0, K)
    assert counts_E.tolist() == [0] * E


def test_replay_takes_the_given_experts_and_weighs_them_by_the_scores(x_SD: torch.Tensor) -> None:
    record, replayed_SK = RoutingRecord(), torch.tensor([[5, 0]]).expand(S, K)
    router = make_router(RoutingControl(record=record, replay={0: replayed_SK}))
    weights_SK, experts_SK, counts_E = router(x_SD)
    assert torch.equal(experts_SK, replayed_SK)
    assert counts_E.tolist() == [S, 0, 0, 0, 0, S]
    scores_SK = record.scores_SE[0][:, [5, 0]]
    torch.testing.assert_close(weights_SK, K * scores_SK / scores_SK.sum(1, keepdim=True))
    router.control.mode = "sample"
    assert not torch.equal(router(x_SD)[1], replayed_SK)


def test_recorded_scores_carry_gradients_only_when_asked(x_SD: torch.Tensor) -> None:
    record = RoutingRecord()
    router = make_router(RoutingControl(record=record))
    router(x_SD)
    assert not record.scores_SE[0].requires_grad
    router.control.keep_graph = True
    router(x_SD)
    (gradient_ED,) = torch.autograd.grad(record.scores_SE[0][:, 0].sum(), router.gate.weight)
    assert (gradient_ED[0] != 0).any() and (gradient_ED[1:] == 0).all()


def test_replay_leaves_tokens_below_zero_to_the_router(x_SD: torch.Tensor) -> None:
    router = make_router(RoutingControl())
    own_SK = router(x_SD)[1]
    replayed_SK = torch.tensor([[5, 0]]).repeat(S, 1)
    replayed_SK[::2] = -1
    router.control.replay = {0: replayed_SK}
    found_SK = router(x_SD)[1]
    assert torch.equal(found_SK[::2], own_SK[::2]) and torch.equal(found_SK[1::2], replayed_SK[1::2])


def test_a_trace_keeps_every_pass(x_SD: torch.Tensor) -> None:
    trace: list[dict[int, torch.Tensor]] = []
    router = make_router(RoutingControl(trace=trace))
    first_SK, second_SK = router(x_SD)[1], router(x_SD[:3])[1]
    assert len(trace) == 2
    assert torch.equal(trace[0][0], first_SK) and torch.equal(trace[1][0], second_SK)
