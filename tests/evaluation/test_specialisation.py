"""Association of experts with subjects: value, interval and control."""

from math import log, sqrt

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from padd_ds.evaluation.specialisation import specialisation

SUBJECTS = 4


def rows(probability_CE: torch.Tensor, each: int, slots: int, seed: int = 0):
    """[N, 1, E] counts and labels: `each` rows per subject, of `slots` draws each."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(len(probability_CE)).repeat_interleave(each)
    drawn_NS = torch.multinomial(probability_CE[labels_N], slots, replacement=True, generator=generator)
    chosen_NE = torch.nn.functional.one_hot(drawn_NS, probability_CE.shape[1]).sum(1)
    return chosen_NE[:, None], labels_N


def planted(strength: float) -> torch.Tensor:
    """A subject's own expert with this probability more than the others."""
    return strength * torch.eye(SUBJECTS) + (1 - strength) / SUBJECTS


def information(strength: float) -> float:
    """I(E; C) of `planted`, nats, by its definition."""
    joint = planted(strength).double().numpy() / SUBJECTS
    positive = joint[joint > 0]
    return float((positive * np.log(positive * SUBJECTS**2)).sum())


def test_value_is_that_of_scikit_learn_on_the_slots():
    chosen_NLE, labels_N = rows(torch.rand(SUBJECTS, 5, generator=torch.Generator().manual_seed(1)), 6, 20)
    found = specialisation(chosen_NLE, labels_N, resamples=2, shuffles=2)
    slots = [(int(label), e) for row, label in zip(chosen_NLE, labels_N, strict=True) for e in range(5)
             for _ in range(int(row[0, e]))]  # fmt: skip
    subject, expert = zip(*slots, strict=True)
    expected = normalized_mutual_info_score(subject, expert, average_method="geometric")
    assert found["nmi"].value == pytest.approx(expected, abs=1e-9)
    assert found["nmi"].by_layer == [pytest.approx(expected, abs=1e-9)]
    assert found["esi_nats"].value == pytest.approx(mutual_info_score(subject, expert), abs=1e-9)


def test_an_expert_of_its_own_for_every_subject():
    found = specialisation(*rows(torch.eye(SUBJECTS), 10, 5), resamples=50, shuffles=50)
    assert found["nmi"].value == pytest.approx(1.0)
    assert found["esi_nats"].value == pytest.approx(log(SUBJECTS))
    assert found["nmi"].shuffled_95 < 0.2
    assert found["nmi"].p_value == pytest.approx(1 / 51)


def test_a_router_that_ignores_the_subject_is_like_its_control():
    found = specialisation(*rows(planted(0.0), 40, 30), resamples=200, shuffles=200)["nmi"]
    assert found.value < 0.005
    assert found.value == pytest.approx(found.shuffled_mean, abs=0.002)
    assert found.interval_95[0] < 0.001
    assert found.p_value > 0.05


def test_the_interval_covers_the_planted_association():
    truth, covered = information(0.3), 0
    for seed in range(40):
        found = specialisation(*rows(planted(0.3), 15, 20, seed), seed=seed, resamples=200, shuffles=1)
        low, high = found["esi_nats"].interval_95
        covered += low <= truth <= high
        assert low <= found["esi_nats"].value
    # Binomial(40, 0.95) falls below 34 with a chance of 0.3 %.
    assert covered >= 34


def test_layers_are_told_apart_and_the_seed_decides():
    bound, free = rows(torch.eye(SUBJECTS), 10, 8)[0], rows(planted(0.0), 10, 8)[0]
    labels_N = torch.arange(SUBJECTS).repeat_interleave(10)
    both = torch.cat([bound, free], dim=1)
    found = specialisation(both, labels_N, seed=3, resamples=20, shuffles=20)["nmi"]
    assert found.by_layer[0] == pytest.approx(1.0) and found.by_layer[1] < 0.1
    assert found.value == pytest.approx(sum(found.by_layer) / 2)
    assert found.interval_95_by_layer[1][1] < 0.1
    again = specialisation(both, labels_N, seed=3, resamples=20, shuffles=20)["nmi"]
    other = specialisation(both, labels_N, seed=4, resamples=20, shuffles=20)["nmi"]
    assert again == found and other.interval_95 != found.interval_95


def test_rows_are_what_is_drawn():
    """Ten equal tokens in a row are no ten observations: the interval does not shrink."""
    chosen_NLE, labels_N = rows(planted(0.3), 20, 1)
    widths = []
    for times in (1, 10):
        low, high = specialisation(chosen_NLE * times, labels_N, resamples=200, shuffles=1)["nmi"].interval_95
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1]) and widths[0] > 1 / sqrt(80) / 2
