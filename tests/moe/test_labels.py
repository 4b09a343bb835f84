import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from padd_ds.moe.labels import esi, nmi


@pytest.fixture
def counts_CE():
    return torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(0))


def test_a_diagonal_table_is_fully_informative_by_hand():
    counts_CE = torch.eye(4, dtype=torch.int64) * 10
    assert nmi(counts_CE).item() == pytest.approx(1.0)
    assert esi(counts_CE).item() == pytest.approx(math.log(4))


def test_an_asymmetric_table_by_hand():
    # two subdomains, the first on expert 0 alone, the second on both: I = H(E) - H(E|C)
    information = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - 0.5 * math.log(2)
    counts_CE = torch.tensor([[2, 0], [1, 1]])
    entropy_E = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert esi(counts_CE).item() == pytest.approx(information)
    assert nmi(counts_CE).item() == pytest.approx(information / math.sqrt(entropy_E * math.log(2)))


def test_independent_labels_carry_no_information():
    counts_CE = torch.tensor([[1], [2], [4]]) * torch.tensor([[3, 5, 8, 13]])
    assert nmi(counts_CE).item() == pytest.approx(0.0, abs=1e-12)
    assert esi(counts_CE).item() == pytest.approx(0.0, abs=1e-12)


def test_both_match_scikit_learn(counts_CE):
    subdomains, experts = np.indices(counts_CE.shape)
    repeats = counts_CE.numpy().ravel()
    labels = (np.repeat(subdomains.ravel(), repeats), np.repeat(experts.ravel(), repeats))
    expected = normalized_mutual_info_score(*labels, average_method="geometric")
    assert nmi(counts_CE).item() == pytest.approx(expected, rel=1e-9)
    assert esi(counts_CE).item() == pytest.approx(mutual_info_score(*labels), rel=1e-9)


def test_esi_matches_plain_loops(counts_CE):
    table = counts_CE.tolist()
    total = sum(map(sum, table))
    expert = [sum(row[j] for row in table) / total for j in range(len(table[0]))]
    slow = 0.0
    for row in table:
        for j, count in enumerate(row):
            if count:
                slow += sum(row) / total * (count / sum(row)) * math.log(count / sum(row) / expert[j])
    assert esi(counts_CE).item() == pytest.approx(slow, rel=1e-12)


@pytest.mark.parametrize(
    "counts_CE",
    [torch.zeros(3, 4), torch.tensor([[1, 2, 3]]), torch.tensor([[1], [2]]), torch.tensor([[0, 5], [0, 7]])],
)
def test_degenerate_tables_give_zero(counts_CE):
    assert nmi(counts_CE).item() == 0
    assert esi(counts_CE).item() == pytest.approx(0.0, abs=1e-15)


def test_empty_rows_and_columns_and_scale_change_nothing(counts_CE):
    padded_CE = torch.nn.functional.pad(counts_CE, (0, 2, 0, 1))
    for measure in (nmi, esi):
        torch.testing.assert_close(measure(padded_CE), measure(counts_CE))
        torch.testing.assert_close(measure(7 * counts_CE), measure(counts_CE))
        assert measure(counts_CE.float()).dtype == torch.float64
