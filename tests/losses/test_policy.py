import dataclasses
import math

import pytest
import torch

from padd_ds.errors import UserError
from padd_ds.losses.policy import (
    POLICY_LOSSES,
    PolicyOptions,
    PolicyTerms,
    grpo_sum,
    gspo_sum,
    importance_weights,
    loss_count,
    pr_grpo_sum,
    reference_kl_sum,
    rspo_sum,
)

B, T = 6, 5
OPTIONS = PolicyOptions(clip_low=0.2, clip_high=0.3, shift_penalty=0.7, shift_floor=0.6, constant_tokens=7)
NORMALISATIONS = ["response", "token", "constant"]


@pytest.fixture
def batch():
    """Log-probabilities that moved enough to clip on both sides, mixed signs, one row without tokens."""
    generator = torch.Generator().manual_seed(0)
    old_BT = -torch.rand(B, T, generator=generator, dtype=torch.float64)
    new_BT = old_BT + 0.4 * torch.randn(B, T, generator=generator, dtype=torch.float64)
    advantage_B = torch.tensor([1.3, -0.8, 0.0, -1.7, 0.4, 2.0], dtype=torch.float64)
    mask_BT = torch.tensor(
        [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [0, 0, 1, 0, 0], [0] * 5]
    )
    shift_BT = torch.rand(B, T, generator=generator, dtype=torch.float64)
    return new_BT, old_BT, advantage_B, mask_BT, shift_BT


def slow_terms(new_BT, old_BT, advantage_B, mask_BT, shift_BT, options, name):
    sums = dict.fromkeys((field.name for field in dataclasses.fields(PolicyTerms)), 0)
    for b in range(new_BT.shape[0]):
        a = advantage_B[b].item()
        tokens = [t for t in range(new_BT.shape[1]) if mask_BT[b, t]]
        ratios = {t: math.exp(new_BT[b, t].item()) / math.exp(old_BT[b, t].item()) for t in tokens}
        losses = []
        for t, ratio in ratios.items():
            used, penalty = ratio, 0.0
            if name == "gspo":
                used = math.prod(ratios.values()) ** (1 / len(ratios))
            if name == "rspo":
                discount = max(math.exp(-shift_BT[b, t].item()), options.shift_floor)
                used, penalty = ratio * discount, -math.log(discount)
            if name == "pr_grpo":
                penalty = options.shift_penalty * shift_BT[b, t].item()
                used = ratio * math.exp(-penalty) if a < 0 else ratio
            clipped = min(max(used, 1 - options.clip_low), 1 + options.clip_high)
            losses.append(-min(used * a, clipped * a))
            sums["ratio_deviation_sum"] += abs(ratio - 1)
            sums["used_ratio_sum"] += used
            sums["penalty_sum"] += penalty
            sums["clipped_tokens"] += clipped * a < used * a
            sums["kl_old_sum"] += ratio - 1 - math.log(ratio)
            sums["tokens"] += 1
        divisor = {"token": 1, "response": max(len(losses), 1), "constant": options.constant_tokens}
        sums["loss_sum"] += sum(losses) / divisor[options.normalisation]
    return sums


def loss_and_gradient(function, batch, options=OPTIONS):
    new_BT = batch[0].clone().requires_grad_()
    loss = function(new_BT, *batch[1:], options).loss_sum
    return loss.detach(), torch.autograd.grad(loss, new_BT)[0]


def one_token(ratio, advantage, shift=0.0):
    pair = (torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1))
    return *pair, torch.tensor([advantage]), torch.ones(1, 1), torch.tensor([[shift]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.1, 2.0, -2.2, 0),
        (1.5, 2.0, -2.4, 1),
        (0.5, 2.0, -1.0, 0),
        (0.5, -2.0, 1.6, 1),
        (1.5, -2.0, 3.0, 0),
        (1.5, 0.0, 0.0, 0),
    ],
)
def test_grpo_of_one_token_by_hand(ratio, advantage, expected, clipped):
    terms = grpo_sum(*one_token(ratio, advantage), PolicyOptions())
    assert terms.loss_sum.item() == pytest.approx(expected, rel=1e-6)
    assert terms.clipped_tokens.item() == clipped
    assert terms.ratio_deviation_sum.item() == pytest.approx(abs(ratio - 1), rel=1e-5)
    assert terms.kl_old_sum.item() == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-5)


def test_pr_grpo_of_one_token_by_hand():
    # 1.05 * exp(-0.1 * 2) = 0.8597 lies inside the clip range; 0.9 * exp(-0.2) = 0.7369 below it
    terms = pr_grpo_sum(*one_token(1.05, -2.0, shift=2.0), PolicyOptions())
    assert terms.loss_sum.item() == pytest.approx(2 * 1.05 * math.exp(-0.2), rel=1e-6)
    assert terms.penalty_sum.item() == pytest.approx(0.2, rel=1e-6)
    terms = pr_grpo_sum(*one_token(0.9, -2.0, shift=2.0), PolicyOptions())
    assert terms.loss_sum.item() == pytest.approx(1.6, rel=1e-6)
    assert terms.clipped_tokens.item() == 1


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_all_terms_match_plain_loops(batch, name, normalisation):
    options = dataclasses.replace(OPTIONS, normalisation=normalisation)
    terms = POLICY_LOSSES[name](*batch, options)
    slow = slow_terms(*batch, options, name)
    assert slow["clipped_tokens"] > (0 if name == "gspo" else 2)
    for key, value in slow.items():
        assert getattr(terms, key).item() == pytest.approx(value, rel=1e-12), key


def test_pr_grpo_without_penalty_is_grpo_bitwise(batch):
    options = dataclasses.replace(OPTIONS, shift_penalty=0.0)
    vanilla, penalised = grpo_sum(*batch, options), pr_grpo_sum(*batch, options)
    for field in dataclasses.fields(vanilla):
        assert torch.equal(getattr(vanilla, field.name), getattr(penalised, field.name)), field.name
    for got, expected in zip(
        loss_and_gradient(pr_grpo_sum, batch, options),
        loss_and_gradient(grpo_sum, batch, options),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_pr_grpo_without_router_shift_is_grpo_bitwise(batch):
    still = (*batch[:4], torch.zeros(B, T, dtype=torch.float64))
    assert torch.equal(pr_grpo_sum(*still, OPTIONS).loss_sum, grpo_sum(*still, OPTIONS).loss_sum)


def test_router_shift_discounts_bad_responses_alone(batch):
    _, gradient_BT = loss_and_gradient(pr_grpo_sum, batch)
    _, vanilla_BT = loss_and_gradient(grpo_sum, batch)
    bad_B = batch[2] < 0
    assert torch.equal(gradient_BT[~bad_B], vanilla_BT[~bad_B])
    active_BT = (gradient_BT[bad_B] != 0) & (vanilla_BT[bad_B] != 0)
    assert active_BT.any()
    assert (gradient_BT[bad_B].abs() < vanilla_BT[bad_B].abs())[active_BT].all()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_at_the_old_policy_the_gradient_is_that_of_reinforce(batch, name):
    _, old_BT, advantage_B, mask_BT, _ = batch
    on_policy = (old_BT, old_BT, advantage_B, mask_BT, torch.zeros(B, T))
    loss, gradient_BT = loss_and_gradient(POLICY_LOSSES[name], on_policy)
    expected_BT = -advantage_B[:, None] * mask_BT / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(gradient_BT, expected_BT)
    torch.testing.assert_close(loss, expected_BT.sum())


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_step_down_the_gradient_makes_good_responses_likelier(batch, name):
    wide = dataclasses.replace(OPTIONS, clip_low=0.9, clip_high=9.0)
    _, gradient_BT = loss_and_gradient(POLICY_LOSSES[name], batch, wide)
    step_B = -gradient_BT.sum(-1)
    assert step_B[0] > 0 > step_B[1]
    assert step_B[2] == 0


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_gradient(batch, name, normalisation):
    options = dataclasses.replace(OPTIONS, normalisation=normalisation)

    def function(new_BT):
        return POLICY_LOSSES[name](new_BT, *batch[1:], options).loss_sum

    assert torch.autograd.gradcheck(function, (batch[0].requires_grad_(),))


def test_old_policy_advantage_shift_and_diagnostics_carry_no_gradient(batch):
    inputs = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in batch]
    terms = pr_grpo_sum(*inputs, OPTIONS)
    terms.loss_sum.backward()
    assert inputs[0].grad is not None
    assert all(tensor.grad is None for tensor in inputs[1:])
    names = [field.name for field in dataclasses.fields(terms) if field.name != "loss_sum"]
    assert not any(getattr(terms, name).requires_grad for name in names)


def test_gspo_of_responses_of_one_token_is_grpo(batch):
    one = [tensor[:, 1:2] if tensor.dim() == 2 else tensor for tensor in batch]
    for got, expected in zip(loss_and_gradient(gspo_sum, one), loss_and_gradient(grpo_sum, one), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_gspo_weighs_all_tokens_of_a_response_by_their_mean_ratio(batch):
    _, gradient_BT = loss_and_gradient(gspo_sum, batch)
    for row_T, mask_T in zip(gradient_BT, batch[3].bool(), strict=True):
        assert len(set(row_T[mask_T].tolist())) <= 1
    assert (gradient_BT[0] != 0).all()


def test_rspo_with_equal_routers_is_grpo_bitwise(batch):
    still = (*batch[:4], torch.zeros(B, T, dtype=torch.float64))
    for got, expected in zip(loss_and_gradient(rspo_sum, still), loss_and_gradient(grpo_sum, still), strict=True):
        assert torch.equal(got, expected)


def test_rspo_discounts_good_and_bad_responses_down_to_its_floor():
    for advantage in (1.0, -1.0):
        assert rspo_sum(*one_token(1.0, advantage, shift=0.1), PolicyOptions()).loss_sum.item() == pytest.approx(
            -advantage * math.exp(-0.1), rel=1e-6
        )
        assert rspo_sum(*one_token(1.1, advantage, shift=9.0), PolicyOptions()).loss_sum.item() == pytest.approx(
            -advantage * 0.88, rel=1e-6
        )
    free = PolicyOptions(shift_floor=0.0, clip_low=1.0)
    assert rspo_sum(*one_token(1.0, 1.0, shift=9.0), free).loss_sum.item() == pytest.approx(-math.exp(-9), rel=1e-5)


def test_dr_grpo_does_not_favour_short_right_answers():
    mask_BT = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    still_BT, advantage_B = torch.zeros(2, 4), torch.tensor([1.0, 1.0])
    inputs = (still_BT, still_BT, advantage_B, mask_BT, still_BT)
    options = PolicyOptions(normalisation="constant", constant_tokens=4)
    _, gradient_BT = loss_and_gradient(POLICY_LOSSES["dr_grpo"], inputs, options)
    assert torch.equal(gradient_BT, -mask_BT / 4)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("garbage", [1e30, -1e30, math.nan, math.inf])
def test_padding_is_never_read(batch, name, garbage):
    new_BT, old_BT, advantage_B, mask_BT, shift_BT = batch
    padded_BT = mask_BT == 0
    dirty = (
        new_BT.masked_fill(padded_BT, garbage),
        old_BT.masked_fill(padded_BT, -3.0),
        advantage_B,
        mask_BT,
        shift_BT.masked_fill(padded_BT, garbage),
    )
    clean_terms, dirty_terms = POLICY_LOSSES[name](*batch, OPTIONS), POLICY_LOSSES[name](*dirty, OPTIONS)
    for field in dataclasses.fields(clean_terms):
        assert torch.equal(getattr(clean_terms, field.name), getattr(dirty_terms, field.name)), field.name
    gradient_BT = loss_and_gradient(POLICY_LOSSES[name], dirty)[1]
    assert torch.equal(gradient_BT, loss_and_gradient(POLICY_LOSSES[name], batch)[1])
    assert (gradient_BT[padded_BT] == 0).all()


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_terms_of_a_batch_are_the_sums_over_its_parts(batch, name, normalisation):
    options = dataclasses.replace(OPTIONS, normalisation=normalisation)
    whole = POLICY_LOSSES[name](*batch, options)
    parts = [POLICY_LOSSES[name](*(x[s] for x in batch), options) for s in (slice(0, 1), slice(1, 4), slice(4, B))]
    for field in dataclasses.fields(whole):
        total = sum(getattr(part, field.name) for part in parts)
        torch.testing.assert_close(total, getattr(whole, field.name), msg=field.name)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_without_advantage_there_is_no_loss_and_no_gradient(batch, name):
    flat = (*batch[:2], torch.zeros(B), *batch[3:])
    loss, gradient_BT = loss_and_gradient(POLICY_LOSSES[name], flat)
    assert loss.item() == 0
    assert (gradient_BT == 0).all()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_an_empty_batch_gives_zeros(batch, name):
    terms = POLICY_LOSSES[name](*batch[:3], torch.zeros(B, T), batch[4], OPTIONS)
    assert all(getattr(terms, field.name).item() == 0 for field in dataclasses.fields(terms))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_weighted_tokens_are_advantages_of_their_own(batch, name):
    new_BT, old_BT, advantage_B, mask_BT, shift_BT = batch
    even_BT = advantage_B[:, None].expand(B, T)
    terms = POLICY_LOSSES[name](new_BT, old_BT, even_BT, mask_BT, shift_BT, OPTIONS)
    assert torch.equal(terms.loss_sum, POLICY_LOSSES[name](*batch, OPTIONS).loss_sum)
    alone_BT = even_BT * (torch.arange(T) == 1)
    _, gradient_BT = loss_and_gradient(POLICY_LOSSES[name], (new_BT, old_BT, alone_BT, mask_BT, shift_BT))
    if name != "gspo":  # whose ratio belongs to all tokens
        assert (gradient_BT[:, [0, 2, 3, 4]] == 0).all() and (gradient_BT[:, 1] != 0).any()


def test_importance_weights_by_hand():
    old_BT, rollout_BT = torch.log(torch.tensor([[0.5, 0.3, 0.9]])), torch.log(torch.tensor([[0.25, 0.6, 0.1]]))
    weights_BT = importance_weights(old_BT.requires_grad_(), rollout_BT, torch.tensor([[1, 1, 0]]), cap=1.5)
    torch.testing.assert_close(weights_BT, torch.tensor([[1.5, 0.5, 1.0]]))
    assert not weights_BT.requires_grad


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_reference_kl_matches_plain_loops(batch, normalisation):
    new_BT, reference_BT, _, mask_BT, _ = batch
    options = dataclasses.replace(OPTIONS, normalisation=normalisation)
    expected = 0.0
    for b in range(B):
        tokens = [t for t in range(T) if mask_BT[b, t]]
        ratios = [math.exp(reference_BT[b, t].item() - new_BT[b, t].item()) for t in tokens]
        divisor = {"token": 1, "response": max(len(tokens), 1), "constant": options.constant_tokens}[normalisation]
        expected += sum(ratio - math.log(ratio) - 1 for ratio in ratios) / divisor
    assert reference_kl_sum(new_BT, reference_BT, mask_BT, options).item() == pytest.approx(expected, rel=1e-9)


def test_reference_kl_pulls_back_and_is_still_at_the_reference(batch):
    new_BT, reference_BT, _, mask_BT, _ = batch
    moved_BT = new_BT.clone().requires_grad_()
    (gradient_BT,) = torch.autograd.grad(reference_kl_sum(moved_BT, reference_BT, mask_BT, OPTIONS), moved_BT)
    real_BT = mask_BT.bool()
    assert ((gradient_BT > 0) == (new_BT > reference_BT))[real_BT].all() and (gradient_BT[~real_BT] == 0).all()
    still_BT = reference_BT.clone().requires_grad_()
    loss = reference_kl_sum(still_BT, reference_BT, mask_BT, OPTIONS)
    assert loss.item() == 0 and (torch.autograd.grad(loss, still_BT)[0] == 0).all()


def test_every_response_counts_the_same_whatever_its_length():
    new_BT, advantage_B = torch.zeros(2, 4), torch.tensor([1.0, -1.0])
    mask_BT = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    inputs = (new_BT, new_BT, advantage_B, mask_BT, new_BT)
    assert grpo_sum(*inputs, PolicyOptions()).loss_sum.item() == 0
    assert grpo_sum(*inputs, PolicyOptions(normalisation="token")).loss_sum.item() == -3


def test_loss_count_by_hand(batch):
    mask_BT = batch[3]
    assert loss_count(mask_BT, PolicyOptions()).item() == 5
    assert loss_count(mask_BT, PolicyOptions(normalisation="token")).item() == 17
    assert loss_count(mask_BT, PolicyOptions(normalisation="constant")).item() == 5


def test_bfloat16_is_computed_in_float32(batch):
    half = [tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in batch]
    full = [tensor.float() if tensor.is_floating_point() else tensor for tensor in half]
    assert pr_grpo_sum(*half, OPTIONS).loss_sum.dtype == torch.float32
    assert torch.equal(pr_grpo_sum(*half, OPTIONS).loss_sum, pr_grpo_sum(*full, OPTIONS).loss_sum)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip_low": -0.1},
        {"clip_low": 1.1},
        {"clip_high": -0.1},
        {"shift_penalty": -1.0},
        {"shift_floor": 1.1},
        {"constant_tokens": 0},
    ],
)
def test_constants_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="must be"):
        PolicyOptions(**wrong)


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(UserError, match="'sequence' is not one of response, token, constant"):
        PolicyOptions(normalisation="sequence")


def test_gradient_of_the_reference_kl_is_that_of_finite_differences(batch):
    new_BT, reference_BT, _, mask_BT, _ = batch
    for normalisation in NORMALISATIONS:
        options = dataclasses.replace(OPTIONS, normalisation=normalisation)
        assert torch.autograd.gradcheck(
            lambda logprobs_BT, options=options: reference_kl_sum(logprobs_BT, reference_BT, mask_BT, options),
            new_BT.requires_grad_(),
        )
