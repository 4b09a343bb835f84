import math

import pytest
import torch

from padd_ds.moe.shift import SHIFT_EDGES, mean_over_layers, router_distribution, router_shift, shift_counts

S, E, K = 5, 6, 2
MEASURES = ["absolute", "relative", "selected"]


@pytest.fixture
def new_SE():
    return torch.randn(S, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)


@pytest.fixture
def old_SE():
    return torch.randn(S, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(-1)


def slow_shift(new, old, measure, selected):
    if measure == "selected":
        return sum(abs(math.log(new[j] / old[j])) for j in selected) / len(selected)
    distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(new, old, strict=True)))
    return distance if measure == "absolute" else distance / math.sqrt(sum(b * b for b in old))


@pytest.mark.parametrize(
    ("measure", "expected"),
    [("absolute", math.sqrt(0.18)), ("relative", math.sqrt(0.18 / 0.38)), ("selected", math.log(2.5) / 2)],
)
def test_shift_of_one_token_by_hand(measure, expected):
    old_SE, new_SE = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
    got_S = router_shift(new_SE, old_SE, measure, torch.tensor([[0, 1]]))
    assert got_S.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_shift_matches_plain_loops(new_SE, old_SE, measure):
    selected_SK = old_SE.topk(K).indices
    rows = zip(new_SE.tolist(), old_SE.tolist(), selected_SK.tolist(), strict=True)
    expected = [slow_shift(new, old, measure, selected) for new, old, selected in rows]
    got_S = router_shift(new_SE, old_SE, measure, selected_SK)
    torch.testing.assert_close(got_S, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("measure", MEASURES)
def test_an_unmoved_router_has_exactly_no_shift(old_SE, measure):
    assert (router_shift(old_SE.clone(), old_SE, measure, old_SE.topk(K).indices) == 0).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_shift_carries_no_gradient(new_SE, old_SE, measure):
    got_S = router_shift(new_SE.requires_grad_(), old_SE, measure, old_SE.topk(K).indices)
    assert not got_S.requires_grad


@pytest.mark.parametrize("measure", MEASURES)
def test_zero_scores_stay_finite_and_bfloat16_becomes_float32(measure):
    old_SE = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).bfloat16()
    new_SE = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).bfloat16()
    got_S = router_shift(new_SE, old_SE, measure, torch.tensor([[0], [1]]))
    assert got_S.dtype == torch.float32
    assert got_S.isfinite().all()
    assert (got_S > 0).all()


def test_the_selected_measure_needs_a_selection(new_SE, old_SE):
    with pytest.raises(ValueError, match="selected"):
        router_shift(new_SE, old_SE, "selected")


def test_mean_over_layers_consumes_a_generator():
    layers = (torch.tensor([float(layer), 10.0]) for layer in range(4))
    assert mean_over_layers(layers).tolist() == [1.5, 10.0]


def test_mean_over_layers_leaves_its_inputs_alone():
    first_S = torch.tensor([1.0])
    mean_over_layers([first_S, torch.tensor([3.0])])
    assert first_S.item() == 1.0


def test_mean_over_no_layers_is_refused():
    with pytest.raises(ValueError, match="no layer"):
        mean_over_layers([])


def test_sigmoid_scores_are_divided_by_their_sum():
    got_SE = router_distribution(torch.tensor([[0.8, 0.4, 0.4]]), "sigmoid")
    torch.testing.assert_close(got_SE, torch.tensor([[0.5, 0.25, 0.25]]))


def test_softmax_scores_are_taken_as_they_are(new_SE):
    assert torch.equal(router_distribution(new_SE, "softmax"), new_SE)


def test_router_distribution_of_zero_scores_is_not_nan_and_bfloat16_is_widened():
    got_SE = router_distribution(torch.zeros(1, 3).bfloat16(), "sigmoid")
    assert got_SE.dtype == torch.float32
    assert got_SE.isfinite().all()


def test_an_unknown_score_function_is_refused(new_SE):
    with pytest.raises(ValueError, match="'tanh'"):
        router_distribution(new_SE, "tanh")


def test_shift_counts_give_the_distribution_function():
    shift_S = torch.cat([torch.zeros(3), 10 ** (-9 + 10 * torch.rand(500, generator=torch.Generator().manual_seed(0)))])
    mask_S = torch.arange(len(shift_S)) % 5 != 0
    counts = shift_counts(shift_S, mask_S)
    assert counts.sum() == mask_S.sum() and len(counts) == len(SHIFT_EDGES) + 1
    for edge, below in zip(SHIFT_EDGES, counts.cumsum(0), strict=False):
        assert below == (shift_S[mask_S] < torch.tensor(edge)).sum()
