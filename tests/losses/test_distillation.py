import math

import pytest
import torch

from padd_ds.losses.distillation import (
    DIVERGENCES,
    distillation_sum,
    distillation_temperature,
    recorded_distillation_sum,
    top_outcomes,
)
from tests.largest import LargestFloat32

B, T, V = 2, 4, 6


@pytest.fixture
def student_BTV():
    return 2 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def teacher_BTV():
    return 2 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def mask_BT():
    return torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])


@pytest.fixture
def temperature_B():
    return torch.tensor([0.4, 1.3], dtype=torch.float64)


def softmax(values):
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def slow_divergence(direction, p, q):
    if direction == "forward":
        return kl(p, q)
    if direction == "reverse":
        return kl(q, p)
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return 0.5 * kl(p, m) + 0.5 * kl(q, m)


def slow_sum(student_BTV, teacher_BTV, mask_BT, temperature_B, direction, top_k=None):
    total = 0.0
    for b in range(B):
        for t in range(T):
            if not mask_BT[b, t]:
                continue
            p = softmax([value / temperature_B[b].item() for value in teacher_BTV[b, t].tolist()])
            q = softmax(student_BTV[b, t].tolist())
            if top_k is not None:
                top = sorted(range(V), key=lambda j: -p[j])[:top_k]
                p, q = ([x[j] for j in top] + [sum(x[j] for j in range(V) if j not in top)] for x in (p, q))
            total += slow_divergence(direction, p, q)
    return total


@pytest.mark.parametrize(
    ("rule", "advantage", "expected"),
    [
        ("confident", 2.0, 1 - math.tanh(1.0)),
        ("confident", -2.0, 1 + math.tanh(1.0)),
        ("literal", 2.0, 1 + math.tanh(1.0)),
        ("literal", -2.0, 0.25),
        ("confident", 2.6, 0.25),
        ("fixed", 2.6, 1.0),
    ],
)
def test_temperature_by_hand(rule, advantage, expected):
    # 1 - tanh(1) is 0.238, just below the floor of 0.25
    got_B = distillation_temperature(torch.tensor([advantage]), rule=rule)
    assert got_B.item() == pytest.approx(max(expected, 0.25), rel=1e-6)


@pytest.mark.parametrize("rule", ["confident", "literal", "fixed"])
def test_temperature_matches_plain_loops(rule):
    advantages = [-2.6, -0.5, 0.0, 0.3, 2.6]
    sign = {"confident": -1, "literal": 1, "fixed": 0}[rule]
    expected = [0.7 * max(1 + sign * math.tanh(0.8 * a), 0.4) for a in advantages]
    got_B = distillation_temperature(
        torch.tensor(advantages, dtype=torch.float64), rule=rule, slope=0.8, base=0.7, floor=0.4
    )
    torch.testing.assert_close(got_B, torch.tensor(expected, dtype=torch.float64))


def test_a_good_path_gets_a_lower_temperature_under_the_confident_rule_only():
    advantage_B = torch.tensor([1.0, -1.0])
    good, bad = distillation_temperature(advantage_B, rule="confident")
    assert good < 1 < bad
    good, bad = distillation_temperature(advantage_B, rule="literal")
    assert good > 1 > bad


def test_a_ceiling_of_one_leaves_the_teacher_as_it_is_on_bad_paths():
    good, bad = distillation_temperature(torch.tensor([1.0, -1.0]), ceiling=1.0)
    assert good == pytest.approx(1 - math.tanh(0.5)) and bad == 1


@pytest.mark.parametrize("rule", ["confident", "literal"])
def test_without_advantage_or_slope_the_temperature_is_fixed(rule):
    fixed_B = distillation_temperature(torch.randn(5), rule="fixed", base=1.7)
    assert torch.equal(distillation_temperature(torch.zeros(5), rule=rule, base=1.7), fixed_B)
    assert torch.equal(distillation_temperature(torch.randn(5), rule=rule, base=1.7, slope=0.0), fixed_B)


def test_forward_divergence_of_one_token_by_hand():
    teacher_BTV = torch.tensor([[[math.log(3.0), 0.0]]])
    student_BTV = torch.tensor([[[0.0, 0.0]]])
    # at temperature 1/2 the odds 3:1 become 9:1
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    got = distillation_sum(student_BTV, teacher_BTV, torch.ones(1, 1), torch.tensor([0.5]))
    assert got.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("direction", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 1, 3, V, V + 3])
@pytest.mark.parametrize("chunk_tokens", [3, 1024])
def test_divergences_match_plain_loops(
    student_BTV, teacher_BTV, mask_BT, temperature_B, direction, top_k, chunk_tokens
):
    slow_k = None if top_k is None or top_k >= V else top_k
    slow = slow_sum(student_BTV, teacher_BTV, mask_BT, temperature_B, direction, slow_k)
    got = distillation_sum(
        student_BTV,
        teacher_BTV,
        mask_BT,
        temperature_B,
        direction=direction,
        teacher_top_k=top_k,
        chunk_tokens=chunk_tokens,
    )
    assert got.shape == ()
    assert got.item() == pytest.approx(slow, rel=1e-12)


def test_the_fixed_rule_is_plain_distillation_at_the_base_temperature(student_BTV, teacher_BTV, mask_BT):
    temperature_B = distillation_temperature(torch.randn(B, dtype=torch.float64), rule="fixed", base=1.5)
    kept = mask_BT.bool()
    expected = torch.nn.functional.kl_div(
        student_BTV[kept].log_softmax(-1), (teacher_BTV[kept] / 1.5).softmax(-1), reduction="sum"
    )
    torch.testing.assert_close(distillation_sum(student_BTV, teacher_BTV, mask_BT, temperature_B), expected)


@pytest.mark.parametrize("direction", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 2])
def test_equal_distributions_have_no_divergence_and_no_gradient(teacher_BTV, mask_BT, direction, top_k):
    student_BTV = teacher_BTV.clone().requires_grad_()
    loss = distillation_sum(student_BTV, teacher_BTV, mask_BT, torch.ones(B), direction=direction, teacher_top_k=top_k)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-14)
    torch.testing.assert_close(student_BTV.grad, torch.zeros_like(student_BTV), rtol=0, atol=1e-14)


@pytest.mark.parametrize("direction", DIVERGENCES)
def test_cutting_the_teacher_never_raises_the_divergence(student_BTV, teacher_BTV, mask_BT, temperature_B, direction):
    sums = [
        distillation_sum(student_BTV, teacher_BTV, mask_BT, temperature_B, direction=direction, teacher_top_k=k).item()
        for k in range(1, V)
    ]
    assert sums == sorted(sums)
    assert 0 < sums[0] < sums[-1]


@pytest.mark.parametrize("direction", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 2, V])
def test_student_gradient(student_BTV, teacher_BTV, mask_BT, temperature_B, direction, top_k):
    def function(x_BTV):
        return distillation_sum(
            x_BTV,
            teacher_BTV,
            mask_BT,
            temperature_B,
            direction=direction,
            teacher_top_k=top_k,
            chunk_tokens=3,
        )

    assert torch.autograd.gradcheck(function, (student_BTV.requires_grad_(),))


def test_teacher_and_temperature_get_no_gradient(student_BTV, teacher_BTV, mask_BT, temperature_B):
    for tensor in (student_BTV, teacher_BTV, temperature_B):
        tensor.requires_grad_()
    distillation_sum(student_BTV, teacher_BTV, mask_BT, temperature_B).backward()
    assert student_BTV.grad is not None and (student_BTV.grad[1] != 0).all()
    assert teacher_BTV.grad is None and temperature_B.grad is None


@pytest.mark.parametrize("direction", DIVERGENCES)
def test_padding_is_never_read(student_BTV, teacher_BTV, mask_BT, temperature_B, direction):
    def loss_and_gradient(x_BTV, y_BTV):
        x_BTV = x_BTV.clone().requires_grad_()
        loss = distillation_sum(x_BTV, y_BTV, mask_BT, temperature_B, direction=direction, teacher_top_k=2)
        return loss.detach(), torch.autograd.grad(loss, x_BTV)[0]

    padded_BT1 = (mask_BT == 0)[..., None]
    loss, gradient_BTV = loss_and_gradient(student_BTV, teacher_BTV)
    garbage = (torch.where(padded_BT1, torch.nan, student_BTV), torch.where(padded_BT1, 1e30, teacher_BTV))
    other_loss, other_gradient_BTV = loss_and_gradient(*garbage)
    assert torch.equal(loss, other_loss)
    assert torch.equal(gradient_BTV, other_gradient_BTV)


def test_the_sum_of_a_batch_is_the_sum_over_its_rows(student_BTV, teacher_BTV, mask_BT, temperature_B):
    rows = [
        distillation_sum(student_BTV[s], teacher_BTV[s], mask_BT[s], temperature_B[s])
        for s in (slice(0, 1), slice(1, 2))
    ]
    torch.testing.assert_close(sum(rows), distillation_sum(student_BTV, teacher_BTV, mask_BT, temperature_B))


@pytest.mark.parametrize("top_k", [None, 2])
def test_an_empty_mask_gives_zero_loss_and_zero_gradient(student_BTV, teacher_BTV, temperature_B, top_k):
    loss = distillation_sum(
        student_BTV.requires_grad_(), teacher_BTV, torch.zeros(B, T), temperature_B, teacher_top_k=top_k
    )
    loss.backward()
    assert loss.item() == 0
    assert (student_BTV.grad == 0).all()


@pytest.mark.parametrize("direction", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 2])
def test_tokens_that_both_models_rule_out_stay_finite(student_BTV, teacher_BTV, mask_BT, direction, top_k):
    student_BTV, teacher_BTV = student_BTV.clone(), teacher_BTV.clone()
    student_BTV[..., -1] = teacher_BTV[..., -1] = -math.inf
    loss = distillation_sum(
        student_BTV.requires_grad_(),
        teacher_BTV,
        mask_BT,
        torch.ones(B),
        direction=direction,
        teacher_top_k=top_k,
    )
    loss.backward()
    shorter = distillation_sum(
        student_BTV.detach()[..., :-1],
        teacher_BTV[..., :-1],
        mask_BT,
        torch.ones(B),
        direction=direction,
        teacher_top_k=top_k,
    )
    torch.testing.assert_close(loss.detach(), shorter)
    assert student_BTV.grad.isfinite().all()


def test_bfloat16_logits_are_compared_in_float32(student_BTV, teacher_BTV, mask_BT):
    student_BTV, teacher_BTV = student_BTV.bfloat16(), teacher_BTV.bfloat16()
    got = distillation_sum(student_BTV, teacher_BTV, mask_BT, torch.ones(B))
    assert got.dtype == torch.float32
    assert torch.equal(got, distillation_sum(student_BTV.float(), teacher_BTV.float(), mask_BT, torch.ones(B)))


def test_different_vocabularies_are_refused(student_BTV, teacher_BTV, mask_BT):
    with pytest.raises(ValueError, match=r"\(2, 4, 6\) and \(2, 4, 5\)"):
        distillation_sum(student_BTV, teacher_BTV[..., :-1], mask_BT, torch.ones(B))


@pytest.mark.parametrize("top_k", [None, 4, "recorded"])
@pytest.mark.parametrize("direction", sorted(DIVERGENCES))
def test_no_float32_tensor_exceeds_a_chunk_forward_or_backward(direction, top_k):
    tokens, vocabulary, chunk_tokens = 64, 50, 8
    student_BTV = torch.randn(2, tokens // 2, vocabulary).bfloat16().requires_grad_()
    teacher_BTV = torch.randn(2, tokens // 2, vocabulary).bfloat16()
    mask_BT = torch.ones(2, tokens // 2, dtype=torch.bool)
    recorded = [part.view(2, tokens // 2, -1) for part in top_outcomes(teacher_BTV.flatten(0, 1), 4)]
    options = {"direction": direction, "chunk_tokens": chunk_tokens}
    with LargestFloat32() as largest:
        if top_k == "recorded":
            total = recorded_distillation_sum(student_BTV, *recorded, mask_BT, **options)
        else:
            total = distillation_sum(student_BTV, teacher_BTV, mask_BT, torch.ones(2), teacher_top_k=top_k, **options)
        total.backward()
    assert student_BTV.grad.abs().sum() > 0
    assert chunk_tokens < largest.elements <= chunk_tokens * vocabulary


@pytest.mark.parametrize("direction", DIVERGENCES)
def test_responses_count_by_their_weight(student_BTV, teacher_BTV, mask_BT, temperature_B, direction):
    weight_B = torch.tensor([0.25, 2.0])
    apart = [
        distillation_sum(
            *(x[b : b + 1] for x in (student_BTV, teacher_BTV, mask_BT, temperature_B)), direction=direction
        )
        for b in range(B)
    ]
    got = distillation_sum(
        student_BTV, teacher_BTV, mask_BT, temperature_B, direction=direction, weight_B=weight_B, chunk_tokens=3
    )
    torch.testing.assert_close(got, 0.25 * apart[0] + 2.0 * apart[1])
