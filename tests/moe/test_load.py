import math

import pytest
import torch

from padd_ds.moe.load import (
    choice_flips,
    dead_experts,
    expert_counts,
    expert_value_sums,
    load_balance_sum,
    load_share,
    max_violation,
    router_entropy_sum,
)

S, E, K = 40, 6, 2


@pytest.fixture
def selected_SK():
    return torch.rand(S, E, generator=torch.Generator().manual_seed(0)).topk(K).indices


@pytest.fixture
def mask_S():
    return torch.rand(S, generator=torch.Generator().manual_seed(1)) < 0.7


@pytest.fixture
def values_S():
    return torch.randn(S, generator=torch.Generator().manual_seed(2))


def test_counts_and_value_sums_by_hand():
    selected_SK, mask_S = torch.tensor([[0, 2], [2, 3], [1, 0]]), torch.tensor([1, 1, 0])
    assert expert_counts(selected_SK, mask_S, 5).tolist() == [1, 0, 2, 1, 0]
    sums_E = expert_value_sums(selected_SK, torch.tensor([0.5, -2.0, 7.0]), mask_S, 5)
    assert sums_E.tolist() == [0.5, 0.0, -1.5, -2.0, 0.0]


def test_counts_and_value_sums_match_plain_loops(selected_SK, mask_S, values_S):
    counts, sums = [0] * E, [0.0] * E
    for s in range(S):
        for expert in selected_SK[s].tolist():
            if mask_S[s]:
                counts[expert] += 1
                sums[expert] += values_S[s].item()
    assert expert_counts(selected_SK, mask_S, E).tolist() == counts
    torch.testing.assert_close(expert_value_sums(selected_SK, values_S, mask_S, E), torch.tensor(sums))


def test_padding_may_hold_any_expert_and_any_value(selected_SK, mask_S, values_S):
    dirty_SK = selected_SK.masked_fill(~mask_S[:, None], -7)
    dirty_S = values_S.masked_fill(~mask_S, math.nan)
    assert torch.equal(expert_counts(dirty_SK, mask_S, E), expert_counts(selected_SK, mask_S, E))
    assert torch.equal(
        expert_value_sums(dirty_SK, dirty_S, mask_S, E), expert_value_sums(selected_SK, values_S, mask_S, E)
    )


def test_counts_and_value_sums_of_two_halves_add_up(selected_SK, mask_S, values_S):
    halves = (slice(0, S // 2), slice(S // 2, S))
    counts_E = sum(expert_counts(selected_SK[h], mask_S[h], E) for h in halves)
    sums_E = sum(expert_value_sums(selected_SK[h], values_S[h], mask_S[h], E) for h in halves)
    assert torch.equal(counts_E, expert_counts(selected_SK, mask_S, E))
    torch.testing.assert_close(sums_E, expert_value_sums(selected_SK, values_S, mask_S, E))


def test_every_unmasked_token_fills_k_slots(selected_SK, mask_S):
    counts_E = expert_counts(selected_SK, mask_S, E)
    assert counts_E.dtype == torch.int64
    assert counts_E.sum() == K * mask_S.sum()


def test_share_violation_and_dead_experts_by_hand():
    counts_LE = torch.tensor([[5, 3, 2, 0], [4, 4, 4, 4], [0, 0, 0, 0]])
    shares_LE = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25] * 4, [0.0] * 4])
    torch.testing.assert_close(load_share(counts_LE), shares_LE)
    torch.testing.assert_close(max_violation(counts_LE), torch.tensor([1.0, 0.0, 0.0]))
    assert dead_experts(counts_LE).tolist() == [1, 0, 0]


def test_one_pair_of_experts_for_all_tokens_is_the_ceiling_of_the_violation():
    counts_E = expert_counts(torch.tensor([[1, 4]] * S), torch.ones(S), E)
    assert max_violation(counts_E).item() == pytest.approx(E / K - 1)
    assert dead_experts(counts_E).item() == E - K


def test_no_tokens_at_all_give_zeros():
    selected_SK, mask_S = torch.zeros(0, K, dtype=torch.int64), torch.zeros(0)
    counts_E = expert_counts(selected_SK, mask_S, E)
    assert counts_E.tolist() == [0] * E
    assert expert_value_sums(selected_SK, torch.zeros(0), mask_S, E).tolist() == [0] * E
    assert load_share(counts_E).tolist() == [0] * E
    assert max_violation(counts_E).item() == dead_experts(counts_E).item() == 0
    assert router_entropy_sum(torch.zeros(0, E), mask_S).item() == 0


def test_router_entropy_by_hand():
    distribution_SE = torch.tensor([[0.25] * 4, [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [math.nan] * 4])
    got = router_entropy_sum(distribution_SE, torch.tensor([1, 1, 1, 0]))
    assert got.item() == pytest.approx(math.log(4) + math.log(2), rel=1e-6)


def test_router_entropy_matches_plain_loops(mask_S):
    distribution_SE = torch.randn(S, E, generator=torch.Generator().manual_seed(3)).double().softmax(-1)
    kept = distribution_SE[mask_S].flatten().tolist()
    got = router_entropy_sum(distribution_SE, mask_S)
    assert got.item() == pytest.approx(-sum(p * math.log(p) for p in kept), rel=1e-12)


def test_bfloat16_is_summed_in_float32(selected_SK, mask_S):
    ones_S = torch.full((S,), 1 / 3).bfloat16()
    sums_E = expert_value_sums(selected_SK, ones_S, mask_S, E)
    assert sums_E.dtype == torch.float32
    torch.testing.assert_close(sums_E, ones_S[0].float() * expert_counts(selected_SK, mask_S, E))
    assert router_entropy_sum(torch.full((S, E), 1 / E).bfloat16(), mask_S).dtype == torch.float32


def test_balance_sum_matches_plain_loops(selected_SK, mask_S):
    scores_SE = torch.rand(S, E, generator=torch.Generator().manual_seed(3), dtype=torch.float64).softmax(-1)
    real = [s for s in range(S) if mask_S[s]]
    share = [sum(j in selected_SK[s].tolist() for s in real) / (K * len(real)) for j in range(E)]
    expected = E * sum(share[j] * scores_SE[s, j].item() for s in real for j in range(E))
    assert load_balance_sum(scores_SE, selected_SK, mask_S).item() == pytest.approx(expected, rel=1e-9)


def test_balance_sum_counts_the_tokens_where_the_load_is_even():
    even_SK = torch.stack([torch.arange(6) % E, (torch.arange(6) + 1) % E], dim=1)
    mask_S = torch.ones(6)
    assert load_balance_sum(torch.full((6, E), 1 / E), even_SK, mask_S).item() == pytest.approx(6)
    assert load_balance_sum(torch.eye(E)[torch.zeros(6, dtype=torch.long)], torch.zeros(6, K).long(), mask_S) == 6 * E


def test_balance_gradient_pushes_the_busy_experts_down(selected_SK, mask_S):
    logits_SE = torch.randn(S, E, generator=torch.Generator().manual_seed(3), requires_grad=True)
    busy_SK = torch.zeros_like(selected_SK)
    load_balance_sum(logits_SE.softmax(-1), busy_SK, mask_S).backward()
    assert (logits_SE.grad[mask_S][:, 0] > 0).all() and (logits_SE.grad[mask_S][:, 1:] < 0).all()
    assert (logits_SE.grad[~mask_S] == 0).all()


def test_flips_by_hand():
    new_SK, old_SK = torch.tensor([[0, 2], [2, 3], [1, 0]]), torch.tensor([[2, 0], [3, 4], [4, 5]])
    assert choice_flips(new_SK, old_SK, torch.tensor([1, 1, 1])).item() == 3
    assert choice_flips(new_SK, old_SK, torch.tensor([1, 1, 0])).item() == 1
    assert choice_flips(new_SK, new_SK.flip(1), torch.ones(3)).item() == 0
