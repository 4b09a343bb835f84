import pytest
import torch

from padd_ds.errors import UserError
from padd_ds.moe.balance import BalanceOptions, BalanceState, update_balance
from padd_ds.moe.load import dead_experts, expert_counts, max_violation

L, E = 3, 4
PRINTED = BalanceOptions(
    load_rate=0.03,
    reward_rate=0.2,
    sign="literal",
    reward_bias="integrated",
    centred=False,
    clamp=None,
    scale_by_spread=False,
)


def random_updates(updates, seed=0, dtype=torch.float64):
    """Counts, advantage sums, advantage counts and spreads; some experts get nothing now and then."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        counts_LE = torch.randint(0, 4, (L, E), generator=generator)
        counts_LE[:, 0] += 1
        seen_LE = torch.minimum(counts_LE, torch.randint(0, 3, (L, E), generator=generator))
        sums_LE = torch.randn(L, E, generator=generator, dtype=dtype) * seen_LE
        yield counts_LE, sums_LE, seen_LE, 0.5 + torch.rand(L, generator=generator, dtype=dtype)


def run(options, updates, start_LE=None):
    state = BalanceState.start(torch.zeros(L, E, dtype=torch.float64) if start_LE is None else start_LE)
    for update in updates:
        state = update_balance(state, *update, options)
    return state


def slow_layer(layer, updates, options):
    """The same rules in plain Python for one layer, following the text of Stage IV."""
    integral, ema, times = [0.0] * E, [0.0] * E, [0] * E
    bias = [0.0] * E
    for counts_LE, sums_LE, seen_LE, spread_L in updates:
        counts, sums, seen = (x[layer].tolist() for x in (counts_LE, sums_LE, seen_LE))
        unit = spread_L[layer].item() if options.scale_by_spread else 1.0
        for j in range(E):
            if seen[j] > 0:
                ema[j] = options.ema_weight * sums[j] / seen[j] + (1 - options.ema_weight) * ema[j]
                times[j] += 1
        known = [j for j in range(E) if times[j]]
        signal = [ema[j] / (1 - (1 - options.ema_weight) ** times[j]) if times[j] else 0.0 for j in range(E)]
        mean = sum(signal) / max(len(known), 1) if options.centred else 0.0
        for j in range(E):
            reward = options.reward_rate * (signal[j] - mean if j in known else 0.0) * unit
            overload = counts[j] / sum(counts) - 1 / E
            step = unit * options.load_rate * (overload if options.sign == "literal" else -overload)
            limit = float("inf") if options.clamp is None else max(options.clamp * unit, abs(integral[j]))
            if options.reward_bias == "integrated":
                integral[j] = max(-limit, min(limit, integral[j] + step + reward))
                bias[j] = integral[j]
            else:
                integral[j] = max(-limit, min(limit, integral[j] + step))
                bias[j] = max(-limit, min(limit, integral[j] + reward))
    return bias


def test_one_corrective_update_by_hand():
    # shares .5 .3 .2 0 against 1/4, eta .01, spread 2; advantages 1, -1, 3 and none, their mean 1, gamma .05
    state = BalanceState.start(torch.zeros(1, 4))
    counts_LE = torch.tensor([[5, 3, 2, 0]])
    sums_LE, seen_LE = torch.tensor([[4.0, -3.0, 6.0, 0.0]]), torch.tensor([[4, 3, 2, 0]])
    state = update_balance(state, counts_LE, sums_LE, seen_LE, torch.tensor([2.0]), BalanceOptions())
    load_LE = torch.tensor([[-0.005, -0.001, 0.001, 0.005]])
    torch.testing.assert_close(state.integral_LE, load_LE)
    torch.testing.assert_close(state.bias_LE, load_LE + 2 * 0.05 * torch.tensor([[0.0, -2.0, 2.0, 0.0]]))
    torch.testing.assert_close(state.ema_LE, 0.2 * torch.tensor([[1.0, -1.0, 3.0, 0.0]]))
    assert state.updates_LE.tolist() == [[1, 1, 1, 0]]


def test_the_printed_form_is_b_plus_eta_overload_plus_gamma_ema():
    bias_LE, ema_LE = torch.zeros(L, E, dtype=torch.float64), torch.zeros(L, E, dtype=torch.float64)
    state = BalanceState.start(bias_LE)
    for u in range(1, 6):
        generator = torch.Generator().manual_seed(u)
        counts_LE = torch.randint(1, 9, (L, E), generator=generator)
        mean_LE = torch.randn(L, E, generator=generator, dtype=torch.float64)
        state = update_balance(state, counts_LE, mean_LE * counts_LE, counts_LE, torch.full((L,), 9.0), PRINTED)
        ema_LE = 0.2 * mean_LE + 0.8 * ema_LE
        overload_LE = counts_LE.double() / counts_LE.sum(-1, keepdim=True) - 1 / E
        bias_LE = bias_LE + 0.03 * overload_LE + 0.2 * ema_LE / (1 - 0.8**u)
        torch.testing.assert_close(state.bias_LE, bias_LE, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sign", ["corrective", "literal"])
@pytest.mark.parametrize("reward_bias", ["offset", "integrated"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("clamp", [0.05, None])
@pytest.mark.parametrize("scale_by_spread", [True, False])
def test_every_combination_matches_plain_loops(sign, reward_bias, centred, clamp, scale_by_spread):
    options = BalanceOptions(
        load_rate=0.1,
        sign=sign,
        reward_bias=reward_bias,
        centred=centred,
        clamp=clamp,
        scale_by_spread=scale_by_spread,
    )
    updates = list(random_updates(12))
    slow_LE = torch.tensor([slow_layer(layer, updates, options) for layer in range(L)], dtype=torch.float64)
    torch.testing.assert_close(run(options, updates).bias_LE, slow_LE, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sign", ["corrective", "literal"])
@pytest.mark.parametrize("reward_bias", ["offset", "integrated"])
def test_zero_rates_leave_the_bias_untouched(sign, reward_bias):
    # some of it beyond the clamp, as a checkpoint of another origin may be
    start_LE = 5 * torch.randn(L, E, generator=torch.Generator().manual_seed(3))
    options = BalanceOptions(load_rate=0.0, reward_rate=0.0, sign=sign, reward_bias=reward_bias, clamp=0.5)
    assert torch.equal(run(options, random_updates(5, dtype=torch.float32), start_LE).bias_LE, start_LE)


def test_even_load_without_advantage_leaves_the_bias_untouched():
    even = (torch.full((L, E), 7), torch.zeros(L, E), torch.full((L, E), 7), torch.ones(L))
    assert (run(BalanceOptions(), [even] * 3).bias_LE == 0).all()


def test_the_corrective_sign_lowers_an_overloaded_expert_and_the_literal_one_raises_it():
    update = (torch.tensor([[9, 1]]), torch.zeros(1, 2), torch.tensor([[9, 1]]), torch.ones(1))
    start = BalanceState.start(torch.zeros(1, 2))
    lowered = update_balance(start, *update, BalanceOptions(sign="corrective")).bias_LE[0]
    raised = update_balance(start, *update, BalanceOptions(sign="literal")).bias_LE[0]
    assert lowered[0] < 0 < lowered[1]
    assert torch.equal(raised, -lowered)


@pytest.mark.parametrize("reward_bias", ["offset", "integrated"])
def test_an_expert_of_good_responses_is_favoured(reward_bias):
    update = (torch.tensor([[5, 5]]), torch.tensor([[4.0, -4.0]]), torch.tensor([[5, 5]]), torch.ones(1))
    state = update_balance(BalanceState.start(torch.zeros(1, 2)), *update, BalanceOptions(reward_bias=reward_bias))
    assert state.bias_LE[0, 0] > 0 > state.bias_LE[0, 1]


def test_a_layer_without_tokens_stays_exactly_as_it_was():
    before = run(BalanceOptions(), random_updates(4))
    counts_LE, sums_LE, seen_LE, spread_L = next(iter(random_updates(1, seed=9)))
    counts_LE[1], sums_LE[1], seen_LE[1], spread_L[1] = 0, 0, 0, torch.nan
    after = update_balance(before, counts_LE, sums_LE, seen_LE, spread_L, BalanceOptions())
    for name, tensor in after.to_tensors().items():
        assert torch.equal(tensor[1], before.to_tensors()[name][1]), name
    assert not torch.equal(after.bias_LE[0], before.bias_LE[0])
    assert after.bias_LE.isfinite().all()


def test_an_expert_without_tokens_keeps_its_ema():
    before = run(BalanceOptions(), random_updates(4))
    counts_LE, seen_LE = torch.ones(L, E), torch.ones(L, E)
    counts_LE[:, 2] = seen_LE[:, 2] = 0
    after = update_balance(before, counts_LE, seen_LE * 5, seen_LE, torch.ones(L), BalanceOptions())
    assert torch.equal(after.ema_LE[:, 2], before.ema_LE[:, 2])
    assert torch.equal(after.updates_LE[:, 2], before.updates_LE[:, 2])
    assert (after.updates_LE[:, 0] == before.updates_LE[:, 0] + 1).all()


@pytest.mark.parametrize("reward_bias", ["offset", "integrated"])
def test_centring_makes_a_common_advantage_count_for_nothing(reward_bias):
    options = BalanceOptions(load_rate=0.0, reward_bias=reward_bias)
    counts_LE = torch.tensor([[8, 2, 1, 0]])
    update = (counts_LE, -1.5 * counts_LE, counts_LE, torch.ones(1))
    state = update_balance(BalanceState.start(torch.zeros(1, 4)), *update, options)
    torch.testing.assert_close(state.bias_LE, torch.zeros(1, 4), rtol=0, atol=1e-7)


def test_only_the_offset_reward_falls_again_when_advantages_end():
    counts_LE = torch.tensor([[5, 5]])
    good = (counts_LE, torch.tensor([[5.0, -5.0]]), counts_LE, torch.ones(1))
    flat = (counts_LE, torch.zeros(1, 2), counts_LE, torch.ones(1))
    start = BalanceState.start(torch.zeros(1, 2))
    peaks, ends = {}, {}
    for reward_bias in ("offset", "integrated"):
        options = BalanceOptions(reward_bias=reward_bias)
        state = start
        for update in [good] * 5:
            state = update_balance(state, *update, options)
        peaks[reward_bias] = state.bias_LE[0, 0].item()
        for update in [flat] * 30:
            state = update_balance(state, *update, options)
        ends[reward_bias] = state.bias_LE[0, 0].item()
    assert peaks["offset"] == pytest.approx(0.05)
    assert ends["offset"] < 0.01 * peaks["offset"]
    assert ends["integrated"] > peaks["integrated"] > 4 * peaks["offset"]


def test_the_bias_scales_with_the_spread():
    counts_LE, sums_LE, seen_LE, spread_L = next(iter(random_updates(1)))
    start = BalanceState.start(torch.zeros(L, E, dtype=torch.float64))
    once = update_balance(start, counts_LE, sums_LE, seen_LE, spread_L, BalanceOptions()).bias_LE
    thrice = update_balance(start, counts_LE, sums_LE, seen_LE, 3 * spread_L, BalanceOptions()).bias_LE
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("reward_bias", ["offset", "integrated"])
def test_the_clamp_holds_in_units_of_the_spread(reward_bias):
    options = BalanceOptions(load_rate=50.0, reward_rate=50.0, clamp=1.5, reward_bias=reward_bias)
    update = (torch.tensor([[9, 1, 0]]), torch.tensor([[9.0, -1.0, 0.0]]), torch.tensor([[9, 1, 0]]))
    state = BalanceState.start(torch.zeros(1, 3))
    for _ in range(5):
        state = update_balance(state, *update, torch.tensor([0.1]), options)
    assert state.bias_LE.abs().max().item() == pytest.approx(0.15)


def test_inputs_are_not_changed_in_place():
    before = run(BalanceOptions(), random_updates(2))
    copies = {name: tensor.clone() for name, tensor in before.to_tensors().items()}
    update_balance(before, *next(iter(random_updates(1, seed=5))), BalanceOptions())
    for name, tensor in before.to_tensors().items():
        assert torch.equal(tensor, copies[name]), name


def test_a_restored_state_goes_on_bitwise():
    updates = list(random_updates(6))
    tensors = {name: tensor.clone() for name, tensor in run(BalanceOptions(), updates[:3]).to_tensors().items()}
    state = BalanceState.from_tensors(tensors)
    for update in updates[3:]:
        state = update_balance(state, *update, BalanceOptions())
    for name, tensor in run(BalanceOptions(), updates).to_tensors().items():
        assert torch.equal(tensor, state.to_tensors()[name]), name


def test_a_saved_state_with_a_missing_tensor_is_refused():
    tensors = BalanceState.start(torch.zeros(L, E)).to_tensors()
    del tensors["ema_LE"]
    with pytest.raises(UserError, match="lacks ema_LE"):
        BalanceState.from_tensors(tensors)


def test_a_bfloat16_bias_is_kept_in_float32():
    state = BalanceState.start(torch.zeros(L, E).bfloat16())
    assert {tensor.dtype for tensor in state.to_tensors().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    "wrong",
    [
        {"load_rate": -0.1},
        {"reward_rate": -0.1},
        {"ema_weight": 0.0},
        {"ema_weight": 1.1},
        {"clamp": 0.0},
        {"sign": "plus"},
        {"reward_bias": "sum"},
    ],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        BalanceOptions(**wrong)


def simulate(options, *, experts=8, top_k=2, tokens=256, updates=200):
    """Counts before and after balancing scores whose means differ between experts by up to two deviations."""
    generator = torch.Generator().manual_seed(0)
    skew_E = torch.linspace(-1, 1, experts)
    state = BalanceState.start(torch.zeros(1, experts))
    history = []
    for _ in range(updates):
        scores_SE = torch.sigmoid(0.3 * (skew_E + torch.randn(tokens, experts, generator=generator)))
        selected_SK = (scores_SE + state.bias_LE[0]).topk(top_k).indices
        counts_LE = expert_counts(selected_SK, torch.ones(tokens), experts)[None]
        history.append(counts_LE[0])
        nothing = torch.zeros_like(counts_LE)
        state = update_balance(state, counts_LE, nothing, nothing, scores_SE.std(-1).mean()[None], options)
    return history[0], torch.stack(history[-20:]).sum(0)


def test_the_corrective_sign_evens_out_skewed_scores():
    first_E, last_E = simulate(BalanceOptions(load_rate=0.5))
    assert max_violation(first_E) > 0.8
    assert max_violation(last_E) < 0.1


def test_the_papers_rate_evens_out_slowly_but_surely():
    first_E, last_E = simulate(BalanceOptions())
    assert max_violation(last_E) < 0.8 * max_violation(first_E)


def test_the_literal_sign_drives_the_violation_to_its_ceiling():
    _, last_E = simulate(BalanceOptions(load_rate=0.5, sign="literal", clamp=None))
    assert max_violation(last_E).item() == pytest.approx(8 / 2 - 1)
    assert dead_experts(last_E).item() == 6


def test_the_clamp_keeps_a_runaway_short_of_the_ceiling():
    _, last_E = simulate(BalanceOptions(load_rate=0.5, sign="literal", clamp=0.5))
    assert max_violation(last_E) < 2.5


def test_loss_free_steps_by_the_sign_of_the_load_and_looks_at_no_reward():
    options = BalanceOptions(kind="loss_free", load_rate=0.01, clamp=None)
    counts_LE, sums_LE, seen_LE = torch.tensor([[5, 3, 2, 2]]), torch.tensor([[9.0, -9.0, 0.0, 0.0]]), torch.ones(1, 4)
    state = BalanceState.start(torch.zeros(1, 4))
    for times in (1, 2):
        state = update_balance(state, counts_LE, sums_LE, seen_LE, torch.tensor([2.0]), options)
        torch.testing.assert_close(state.bias_LE, times * 0.02 * torch.tensor([[-1.0, 0.0, 1.0, 1.0]]))


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="'aux_loss' is not one of reward_augmented, loss_free"):
        BalanceOptions(kind="aux_loss")
