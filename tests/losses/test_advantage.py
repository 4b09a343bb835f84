import math

import pytest
import torch

from padd_ds.losses.advantage import group_advantages, groups_without_spread


def slow_advantages(rewards, eps):
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    return [(reward - mean) / (std + eps) for reward in rewards]


def test_one_right_answer_in_four_by_hand():
    got_PG = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25]]) / math.sqrt(3 / 16)
    torch.testing.assert_close(got_PG, expected)


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_advantages_match_plain_loops(eps):
    rewards_PG = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.tensor([slow_advantages(row, eps) for row in rewards_PG.tolist()], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards_PG, eps), expected)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1.1, -3.7])
@pytest.mark.parametrize("group", [1, 3, 7, 8])
def test_an_all_equal_group_gets_exactly_zero(reward, group):
    assert (group_advantages(torch.full((2, group), reward)) == 0).all()


def test_the_best_response_has_the_largest_and_positive_advantage():
    advantages_PG = group_advantages(torch.tensor([[0.0, 1.1, 0.1]]))
    assert advantages_PG[0].argmax() == 1
    assert advantages_PG[0, 1] > 0 > advantages_PG[0, 0]


def test_a_group_does_not_depend_on_its_neighbours_or_on_the_scale_of_rewards():
    rewards_PG = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_advantages(rewards_PG)[2:3], group_advantages(rewards_PG[2:3]))
    torch.testing.assert_close(group_advantages(3 * rewards_PG + 5), group_advantages(rewards_PG), rtol=1e-4, atol=1e-5)


def test_integer_and_half_precision_rewards_give_float32():
    rewards_PG = torch.tensor([[1, 0, 0, 1]])
    for dtype in (torch.int64, torch.bfloat16):
        got_PG = group_advantages(rewards_PG.to(dtype))
        assert got_PG.dtype == torch.float32
        torch.testing.assert_close(got_PG, torch.tensor([[1.0, -1.0, -1.0, 1.0]]))


def test_without_a_scale_the_mean_alone_is_taken_off():
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]])
    expected_PG = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(group_advantages(rewards_PG, scale="none"), expected_PG)


def test_groups_without_spread_are_the_all_equal_ones():
    rewards_PG = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.1, 0.1], [0.0, 1.0]])
    assert groups_without_spread(rewards_PG).tolist() == [True, False, True, False]
