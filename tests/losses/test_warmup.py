import math

import pytest
import torch

from padd_ds.losses.warmup import init_kl


def test_init_kl_by_hand():
    got = init_kl(torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25]))
    assert got.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-6)


def test_init_kl_matches_plain_loops_and_sums_layers():
    student_LE, teacher_LE = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    pairs = zip(student_LE.flatten().tolist(), teacher_LE.flatten().tolist(), strict=True)
    slow = sum(s * math.log(s / t) for s, t in pairs)
    assert init_kl(student_LE, teacher_LE).item() == pytest.approx(slow, rel=1e-12)


def test_init_kl_of_equal_priors_is_zero_and_of_others_is_not():
    prior_E = torch.tensor([0.2, 0.3, 0.5])
    assert init_kl(prior_E, prior_E).item() == 0
    assert init_kl(prior_E, prior_E.flip(0)).item() > 0.1


def test_init_kl_puts_the_student_first():
    student_E, teacher_E = torch.tensor([0.98, 0.01, 0.01]), torch.tensor([0.4, 0.3, 0.3])
    expected = 0.98 * math.log(0.98 / 0.4) + 2 * 0.01 * math.log(0.01 / 0.3)
    assert init_kl(student_E, teacher_E).item() == pytest.approx(expected, rel=1e-5)


def test_init_kl_gradient_reaches_the_student_alone():
    student_E = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
    teacher_E = torch.tensor([0.1, 0.1, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x_E: init_kl(x_E, teacher_E.detach()), (student_E,))
    init_kl(student_E, teacher_E).backward()
    assert student_E.grad is not None
    assert teacher_E.grad is None


def test_init_kl_stays_finite_with_zero_probabilities():
    student_E = torch.tensor([0.0, 0.5, 0.5], requires_grad=True)
    loss = init_kl(student_E, torch.tensor([0.5, 0.5, 0.0]))
    loss.backward()
    assert loss.isfinite() and student_E.grad.isfinite().all()
