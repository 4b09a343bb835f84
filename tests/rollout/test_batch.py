"""Dealing responses out to updates."""

import pytest
import torch

from padd_ds.rollout.batch import RolloutBatch, deal_responses

LENGTHS = torch.tensor([3, 0, 2, 0, 0, 4, 1, 5])


def batch(lengths_B: torch.Tensor) -> RolloutBatch:
    n = len(lengths_B)
    return RolloutBatch(
        prompt_ids_BT=torch.ones(n, 2, dtype=torch.int64),
        prompt_mask_BT=torch.ones(n, 2, dtype=torch.int64),
        response_ids_BR=torch.ones(n, 5, dtype=torch.int64),
        response_mask_BR=torch.arange(5) < lengths_B[:, None],
        advantage_B=torch.zeros(n),
        failure_B=torch.zeros(n),
    )


def dealt(lengths_B: torch.Tensor, updates: int, micro_batches: int, seed: int = 0) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [rows.tolist() for rows in update]
        for update in deal_responses(batch(lengths_B), updates, micro_batches, generator=generator)
    ]


@pytest.mark.parametrize(("updates", "micro_batches"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_every_response_with_tokens_is_dealt_once_and_shorter_ones_first(updates: int, micro_batches: int) -> None:
    got = dealt(LENGTHS, updates, micro_batches)
    assert [len(update) for update in got] == [micro_batches] * updates
    rows = [[row for rows in update for row in rows if LENGTHS[row] > 0] for update in got]
    assert sorted(row for update in rows for row in update) == [0, 2, 5, 6, 7]
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    for update in rows:
        assert [int(LENGTHS[row]) for row in update] == sorted(int(LENGTHS[row]) for row in update)


def test_a_micro_batch_for_which_nothing_is_left_gets_a_row_without_tokens() -> None:
    got = dealt(torch.tensor([0, 0, 3, 0]), 2, 2)
    assert sorted(rows for update in got for rows in update) == [[0], [0], [0], [2]]


def test_nothing_dropped_deals_all_evenly_and_by_the_seed() -> None:
    lengths_B = torch.arange(1, 9).clamp(max=5)
    got = dealt(lengths_B, 2, 2)
    assert [[len(rows) for rows in update] for update in got] == [[2, 2], [2, 2]]
    assert dealt(lengths_B, 2, 2) == got != dealt(lengths_B, 2, 2, seed=1)
