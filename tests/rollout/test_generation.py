"""Sampling: shared prefill, end tokens, ranks in step."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from padd_ds.config.sections import ModelConfig
from padd_ds.engine.ranks import Ranks
from padd_ds.hf import response_logits
from padd_ds.losses.tokens import token_logprobs
from padd_ds.rollout.batch import RolloutBatch, response_positions
from padd_ds.rollout.generation import (
    HuggingFaceRollout,
    Prompts,
    Responses,
    Sampling,
    assemble_routes,
    generate_in_batches,
    split_responses,
)
from tests.ranks import run_ranks
from tests.tiny import tiny_student
from tests.world import joint_config, make_student

PROMPTS = torch.tensor([[0, 0, 9, 7, 12], [5, 8, 30, 11, 4], [0, 0, 0, 0, 6]])
MASK = (PROMPTS != 0).long()
ASKED = Prompts(ids_PT=PROMPTS, mask_PT=MASK, seeds=[0, 100, 200])
END = (1,)


def rollout_engine(model: Any, ranks_in_step: bool = False) -> HuggingFaceRollout:
    return HuggingFaceRollout(model=model, end_token_ids=END, pad_token_id=0, ranks_in_step=ranks_in_step)


def greedy(group_size: int, share_prefill: bool, max_new_tokens: int = 8) -> Sampling:
    return Sampling(group_size=group_size, max_new_tokens=max_new_tokens, temperature=0.0, share_prefill=share_prefill)


def test_a_shared_prefill_changes_nothing() -> None:
    engine = rollout_engine(tiny_student())
    apart = engine.generate(ASKED, greedy(2, False))
    shared = engine.generate(ASKED, greedy(2, True))
    assert torch.equal(apart.ids_BR, shared.ids_BR)
    assert torch.equal(apart.ids_BR[0::2], apart.ids_BR[1::2])


@pytest.mark.parametrize("share_prefill", [True, False])
def test_kept_logprobs_are_those_of_the_drawn_tokens(share_prefill: bool) -> None:
    model, temperature = tiny_student(), 0.7
    engine = HuggingFaceRollout(model=model, end_token_ids=END, pad_token_id=0, ranks_in_step=False, keep_logprobs=True)
    sampling = Sampling(group_size=4, max_new_tokens=6, temperature=temperature, share_prefill=share_prefill)
    responses = engine.generate(ASKED, sampling)
    ids_BT, mask_BT = PROMPTS.repeat_interleave(4, dim=0), MASK.repeat_interleave(4, dim=0)
    mask_BL = torch.cat([mask_BT, responses.mask_BR.long()], dim=1)
    with torch.no_grad():
        logits_BRV = response_logits(model, torch.cat([ids_BT, responses.ids_BR], dim=1), mask_BL, 6)
    expected_BR = token_logprobs(logits_BRV, responses.ids_BR, temperature)
    assert responses.logprobs_BR is not None and responses.logprobs_BR.shape == responses.ids_BR.shape
    torch.testing.assert_close(
        responses.logprobs_BR[responses.mask_BR], expected_BR[responses.mask_BR], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_a_response_is_its_seeds_whatever_stands_beside_it(top_p: float) -> None:
    engine, sampling = rollout_engine(tiny_student()), Sampling(group_size=3, max_new_tokens=6, top_p=top_p)
    together = engine.generate(ASKED, sampling).ids_BR
    for row, seed in enumerate(ASKED.seeds):
        for place in range(3):
            one = replace(ASKED[row : row + 1], seeds=[seed + place])
            alone = engine.generate(one, replace(sampling, group_size=1)).ids_BR
            length = alone.shape[1]
            assert together[3 * row + place, :length].tolist() == alone[0].tolist()
    other = engine.generate(replace(ASKED, seeds=[seed + 1000 for seed in ASKED.seeds]), sampling).ids_BR
    assert other.tolist() != together.tolist()


def test_prompts_of_one_token_work() -> None:
    one = Prompts(ids_PT=PROMPTS[2:, 4:], mask_PT=MASK[2:, 4:], seeds=[0])
    responses = rollout_engine(tiny_student()).generate(one, greedy(3, True))
    assert responses.ids_BR.shape[0] == 3


def test_sampling_follows_the_distribution_at_the_temperature() -> None:
    """The first token of many samples against the model's own softmax."""
    model, temperature = tiny_student(), 2.0
    n = 4000
    sampling = Sampling(group_size=n, max_new_tokens=1, temperature=temperature)
    ids_BR = rollout_engine(model).generate(ASKED[1:2], sampling).ids_BR
    with torch.no_grad():
        expected_V = (model(PROMPTS[1:2]).logits[0, -1] / temperature).softmax(-1)
    observed_V = torch.bincount(ids_BR[:, 0], minlength=64) / n
    standard_error_V = (expected_V * (1 - expected_V) / n).sqrt()
    assert ((observed_V - expected_V).abs() <= 5 * standard_error_V + 1e-3).all()


def test_a_response_reaches_to_its_first_end_token() -> None:
    responses = split_responses(torch.tensor([[5, 1, 0, 1], [5, 6, 7, 8], [1, 0, 0, 0]]), END)
    assert responses.mask_BR.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert responses.ended_B.tolist() == [True, False, True]


def test_batches_are_joined_to_the_longest() -> None:
    lengths = iter([2, 3])

    def fake(prompts: Prompts) -> Responses:
        assert len(prompts.seeds) == len(prompts.ids_PT) == len(prompts.mask_PT)
        shape = (len(prompts.seeds), next(lengths))
        return Responses(
            ids_BR=torch.full(shape, 9), mask_BR=torch.ones(shape, dtype=torch.bool), ended_B=torch.ones(shape[0]) > 0
        )

    joined = generate_in_batches(fake, ASKED, 2, 0)
    assert joined.ids_BR.tolist() == [[9, 9, 0], [9, 9, 0], [9, 9, 9]]
    assert joined.mask_BR.sum(1).tolist() == [2, 2, 3]


def test_routes_are_put_together_in_the_order_of_the_tokens() -> None:
    """Two prompts of three tokens, two responses each, of two tokens; the expert tells prompt and position."""

    def one_pass(*experts: int) -> dict[int, torch.Tensor]:
        return {0: torch.tensor(experts)[:, None], 1: 100 + torch.tensor(experts)[:, None]}

    steps = [one_pass(21, 22, 23, 24), one_pass(99, 99, 99, 99)]  # the second only kept in step with other ranks
    shared = [one_pass(0, 11, 12, 0, 14, 15), one_pass(13, 13, 16, 16), *steps]
    apart = [one_pass(*[11, 12, 13] * 2, *[14, 15, 16] * 2), *steps]
    for prefilled, passes in ((True, shared), (False, apart)):
        routes_BLNK = assemble_routes(passes, (4, 2), 2, prefilled=prefilled)
        assert routes_BLNK.shape == (4, 5, 2, 1) and routes_BLNK.dtype == torch.int16
        expected = [[11, 12, 13, 21], [11, 12, 13, 22], [14, 15, 16, 23], [14, 15, 16, 24]]
        assert routes_BLNK[:, :4, 0, 0].tolist() == expected
        assert torch.equal(routes_BLNK[:, :4, 1], routes_BLNK[:, :4, 0] + 100)
        assert (routes_BLNK[:, 4] == -1).all()


def rollout_batch() -> RolloutBatch:
    return RolloutBatch(
        prompt_ids_BT=PROMPTS,
        prompt_mask_BT=MASK,
        response_ids_BR=torch.tensor([[21, 1, 0, 0], [22, 23, 24, 25], [26, 1, 0, 0]]),
        response_mask_BR=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool(),
        advantage_B=torch.tensor([1.0, -1.0, 0.0]),
        failure_B=torch.tensor([0.5, 0.5, 1.0]),
    )


def test_chosen_rows_lose_padding_that_none_of_them_needs() -> None:
    rows = rollout_batch().rows(torch.tensor([0, 2]))
    assert rows.prompt_ids_BT.tolist() == [[9, 7, 12], [0, 0, 6]]
    assert rows.response_ids_BR.tolist() == [[21, 1], [26, 1]]
    assert rows.advantage_B.tolist() == [1.0, 0.0]
    assert rows.input_ids_BL.shape == rows.attention_mask_BL.shape == (2, 5)


def test_an_empty_response_keeps_one_masked_column() -> None:
    rows = rollout_batch().rows(torch.tensor([2]))
    assert rows.response_ids_BR.shape == (1, 1) and not rows.response_mask_BR.any()


def test_the_positions_before_each_response_token_predict_it() -> None:
    sequence = torch.arange(10)[None]
    assert response_positions(sequence, 4).tolist() == [[5, 6, 7, 8]]


def ragged(ranks: Ranks, expert_compute: str) -> list[list[int]]:
    """Rank 0 may answer in one token, rank 1 may not end at all: the end token differs."""
    student = make_student(
        ranks,
        joint_config(model=ModelConfig(student="unused", teacher="unused", expert_compute=expert_compute)),
        {
            "expert_parallel": {"enabled": True, "autoep_size": 2, "use_grouped_mm": False},
            "zero_optimization": {"stage": 2},
            "gradient_clipping": 1.0,
        },
    )
    student.engine.eval()
    free = HuggingFaceRollout(model=student.model, end_token_ids=(63,), pad_token_id=0, ranks_in_step=True)
    first = free.generate(ASKED, greedy(1, True, 6)).ids_BR
    # Rank 0 now ends where its first response began: with every first token an end token it stops at once.
    ends = tuple(set(first[:, 0].tolist())) if ranks.rank == 0 else (63,)
    ragged_engine = HuggingFaceRollout(model=student.model, end_token_ids=ends, pad_token_id=0, ranks_in_step=True)
    responses = ragged_engine.generate(ASKED, greedy(1, True, 6))
    return responses.mask_BR.sum(dim=1).tolist()


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("expert_compute", ["dispatched", "masked"])
def test_ranks_with_responses_of_very_different_length_do_not_hang(expert_compute: str) -> None:
    short, long = run_ranks(ragged, 2, expert_compute, timeout_s=180)
    assert short == [1, 1, 1]
    assert long == [6, 6, 6]
