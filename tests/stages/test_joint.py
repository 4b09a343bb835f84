"""A joint step on two expert-parallel ranks."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from padd_ds.config.sections import RoutingConfig
from padd_ds.data.split import normalise_question
from padd_ds.engine.ranks import Ranks
from padd_ds.moe.load import choice_flips
from padd_ds.rollout.guidance import Guidance
from padd_ds.stages.joint_metrics import add_rollout_mismatch
from padd_ds.stages.stage import MetricSums
from tests.ranks import run_ranks
from tests.world import FixedChecker, joint_config, make_joint_stage, problems

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def two_steps(ranks: Ranks, overrides: dict[str, Any]) -> dict[str, Any]:
    # One response in two is right, so that every group is likely to have spread.
    stage = make_joint_stage(ranks, joint_config(**overrides), 2, FixedChecker(lambda text, gold: len(text) % 2 == 0))
    weights = stage.student.layers[0].experts.w1.detach().clone()
    reports = [stage.step(step) for step in range(2)]
    return {
        "metrics": [dict(report.metrics) for report in reports],
        "bias": torch.stack([router.e_score_correction_bias for router in stage.student.routers]),
        "moved": float((stage.student.layers[0].experts.w1 - weights).abs().max()),
    }


def test_a_step_trains_and_gives_every_rank_the_same_bias() -> None:
    first, second = run_ranks(two_steps, 2, {})
    assert first["moved"] > 0 and second["moved"] > 0
    assert torch.equal(first["bias"], second["bias"]) and first["bias"].abs().max() > 0
    for mine, other in zip(first["metrics"], second["metrics"], strict=True):
        shared = {name for name in mine if "second" not in name}
        assert {name: mine[name] for name in shared} == {name: other[name] for name in shared}
    assert first["metrics"][0]["ratio_deviation"] > 0
    assert first["metrics"][0]["router_shift"] > 0


def weights_after(ranks: Ranks, activation_checkpointing: bool) -> dict[str, torch.Tensor]:
    config = joint_config(activation_checkpointing=activation_checkpointing, routing=RoutingConfig(noise=1.0))
    stage = make_joint_stage(ranks, config, 2, FixedChecker(lambda text, gold: len(text) % 2 == 0))
    stage.step(0)
    return {name: parameter.detach() for name, parameter in stage.student.model.named_parameters()}


def test_activation_checkpointing_routes_again_as_it_did_the_first_time() -> None:
    plain, checkpointed = (run_ranks(weights_after, 2, checkpointing)[0] for checkpointing in (False, True))
    assert plain.keys() == checkpointed.keys()
    for name, weights in plain.items():
        torch.testing.assert_close(checkpointed[name], weights, rtol=1e-5, atol=1e-7, msg=name)


def one_step_each(ranks: Ranks, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for overrides in runs:
        stage = make_joint_stage(
            ranks, joint_config(**overrides), 2, FixedChecker(lambda text, gold: len(text) % 2 == 0)
        )
        gates = torch.stack([router.gate.weight for router in stage.student.routers]).detach().clone()
        biases = torch.stack([router.e_score_correction_bias for router in stage.student.routers])
        metrics = dict(stage.step(0).metrics)
        moved = torch.stack([router.gate.weight for router in stage.student.routers]).detach() - gates
        shifted = torch.stack([router.e_score_correction_bias for router in stage.student.routers]) - biases
        results.append({"metrics": metrics, "gates": moved, "bias": float(shifted.abs().max())})
    return results


def test_every_objective_trains() -> None:
    names = ("pr_grpo", "grpo", "dr_grpo", "gspo", "rspo")
    runs = [{"policy": {"objective": name, "updates_per_rollout": 2}} for name in names]
    found = dict(zip(names, run_ranks(one_step_each, 2, runs)[0], strict=True))
    for name, result in found.items():
        assert result["metrics"]["grad_norm"] > 0 and result["metrics"]["ratio_deviation"] > 0, name
    assert found["gspo"]["metrics"]["clip_fraction"] > found["grpo"]["metrics"]["clip_fraction"]
    assert found["rspo"]["metrics"]["shift_penalty"] > 0 == found["grpo"]["metrics"]["shift_penalty"]


def test_a_reference_holds_and_a_rollout_of_the_same_engine_needs_no_correction() -> None:
    policy = {"updates_per_rollout": 2, "kl_weight": 0.5, "importance_cap": 2.0}
    plain, held = run_ranks(one_step_each, 2, [{}, {"policy": policy, "log": {"gradients_every_steps": 1}}])[0]
    assert held["metrics"]["kl_reference_nats"] > 0 and held["metrics"]["grad_norm_reference"] > 0
    assert held["metrics"]["rollout_mismatch"] < 1e-5
    assert "kl_reference_nats" not in plain["metrics"] and "rollout_mismatch" not in plain["metrics"]


def reports(ranks: Ranks) -> list[Any]:
    overrides = {"log": {"gradients_every_steps": 1}}
    stage = make_joint_stage(ranks, joint_config(**overrides), 2, FixedChecker(lambda text, gold: len(text) % 2 == 0))
    report = stage.step(0)
    return [dict(report.metrics), dict(report.routing)]


def test_a_step_tells_shares_by_reward_the_shifts_and_the_throughput() -> None:
    (metrics, routing), (other_metrics, other_routing) = run_ranks(reports, 2)
    assert other_routing == routing
    for layer in range(2):
        rewarded, unrewarded = routing["load_share_rewarded"][layer], routing["load_share_unrewarded"][layer]
        assert sum(rewarded) == pytest.approx(1) and sum(unrewarded) == pytest.approx(1)
    distance = [
        sum(abs(a - b) for a, b in zip(rewarded, unrewarded, strict=True)) / 2
        for rewarded, unrewarded in zip(routing["load_share_rewarded"], routing["load_share_unrewarded"], strict=True)
    ]
    assert metrics["load_reward_distance"] == pytest.approx(sum(distance) / 2) and metrics["load_reward_distance"] > 0
    # Every response token once, although the last update was run twice to measure its gradients.
    for counts in routing["router_shift_counts"]:
        assert sum(counts) == pytest.approx(metrics["response_tokens"] * 8)
        assert len(counts) == len(routing["router_shift_edges"]) + 1
    assert len(routing["router_shift_counts"]) == 2
    for phase in ("rollout", "scoring", "update"):
        tokens = metrics[f"tokens_per_second_{phase}"] * metrics[f"seconds_{phase}"]
        assert tokens == pytest.approx(other_metrics[f"tokens_per_second_{phase}"] * other_metrics[f"seconds_{phase}"])
    assert metrics["tokens_per_second_rollout"] * metrics["seconds_rollout"] == pytest.approx(
        metrics["response_tokens"] * 8
    )


def test_layers_are_told_apart_and_their_mean_is_the_metric() -> None:
    metrics, routing = run_ranks(reports, 2)[0]
    for name in ("router_shift", "router_flips", "router_flips_rollout"):
        first, second = routing[name]
        assert metrics[name] == pytest.approx((first + second) / 2)
    assert routing["router_shift"][0] != routing["router_shift"][1]
    assert min(routing["router_shift"]) > 0
    # Punished responses alone lose a little; a mean ratio is near 1.
    assert 0.5 < metrics["ratio_penalised"] < 1.5


def test_a_frozen_router_stays_while_its_experts_learn() -> None:
    free, frozen = run_ranks(one_step_each, 2, [{}, {"routing": RoutingConfig(train_router=False)}])[0]
    assert free["gates"].abs().max() > 0
    assert frozen["gates"].abs().max() == 0
    assert frozen["metrics"]["grad_norm"] > 0 and frozen["metrics"]["router_shift"] > 0


def corrected_advantages(ranks: Ranks) -> dict[str, Any]:
    config = joint_config(policy={"updates_per_rollout": 1, "importance_cap": 2.0})
    stage = make_joint_stage(ranks, config, 1, FixedChecker(lambda text, gold: len(text) % 2 == 0))
    stage.student.engine.eval()
    micro_batches = stage._score(stage.collector.collect(0).batch, 0, MetricSums())[0]
    found = {}
    for factor in (0.5, 1.5, 4.0):
        weights, sums = [], MetricSums()
        for micro_batch in micro_batches:
            batch = micro_batch.batch
            batch = dataclasses.replace(
                batch,
                rollout_logprobs_BR=micro_batch.old.logprobs_BR - math.log(factor),
                advantage_B=torch.arange(1.0, batch.n_responses + 1),
            )
            advantage_BR = stage._advantages(dataclasses.replace(micro_batch, batch=batch))
            add_rollout_mismatch(sums, micro_batch.old.logprobs_BR, batch)
            weights += (advantage_BR / batch.advantage_B[:, None])[batch.response_mask_BR].tolist()
        found[factor] = (weights, sums.means(ranks) | sums.largest(ranks))
    return found


def test_advantages_are_weighted_for_what_the_rollout_drew_from_up_to_the_cap() -> None:
    found = run_ranks(corrected_advantages, 1)[0]
    for factor, (weights, metrics) in found.items():
        assert len(weights) >= 8 and weights == pytest.approx([min(factor, 2.0)] * len(weights), rel=1e-5)
        # Of the ratio itself, so that a cap does not hide it.
        assert metrics["rollout_mismatch"] == pytest.approx(abs(factor - 1), rel=1e-5)
        assert metrics["rollout_ratio_max"] == pytest.approx(max(factor, 1.0), rel=1e-5)
        assert metrics["kl_rollout_nats"] == pytest.approx(factor - 1 - math.log(factor), rel=1e-4)


def test_replay_routes_as_the_old_policy_did() -> None:
    free, replayed = run_ranks(one_step_each, 2, [{}, {"routing": RoutingConfig(replay="old_policy")}])[0]
    assert free["metrics"]["router_flips"] > 0
    assert replayed["metrics"]["router_flips"] == 0
    assert replayed["metrics"]["router_shift"] > 0


def test_replay_moves_the_bias_once_for_all_updates_of_a_rollout() -> None:
    loss_free = {"balance": {"kind": "loss_free", "load_rate": 0.1}}
    runs = [loss_free, loss_free | {"routing": RoutingConfig(replay="rollout")}]
    free, replayed = run_ranks(one_step_each, 2, runs)[0]
    assert 0 < replayed["bias"] == pytest.approx(free["bias"] / 2, rel=0.05)


def spreads(ranks: Ranks) -> list[torch.Tensor]:
    found = []
    for size in (1, 2, 8):
        config = joint_config(micro_batch_size=size, optimizer={"learning_rate": 1e-12})
        stage = make_joint_stage(ranks, config, 1, FixedChecker(lambda text, gold: len(text) % 2 == 0))
        found.append(torch.tensor(stage.step(0).routing["score_spread"]))
    return found


def test_the_unit_of_the_bias_does_not_depend_on_the_micro_batches() -> None:
    one, *others = run_ranks(spreads, 1)[0]
    for other in others:
        torch.testing.assert_close(other, one, rtol=1e-6, atol=0)


def test_auxiliary_loss_moves_the_router_alone_and_the_other_kinds_the_bias() -> None:
    still = {"policy": {"weight": 0.0, "updates_per_rollout": 2}, "distillation": {"weight": 0.0}}
    runs = [still | {"balance": {"kind": kind}} for kind in ("aux_loss", "none", "loss_free", "reward_augmented")]
    runs[0] |= {"activation_checkpointing": True}
    aux, none, loss_free, reward = run_ranks(one_step_each, 2, runs)[0]
    assert aux["metrics"]["loss_aux"] > 0.9 and aux["bias"] == 0
    assert none["bias"] == 0 and loss_free["bias"] > 0 and reward["bias"] > 0
    assert aux["metrics"]["grad_norm"] > 0 == none["metrics"]["grad_norm"]
    assert aux["gates"].abs().max() > 10 * none["gates"].abs().max()


def rollout_against_forward(ranks: Ranks, share_prefill: bool) -> dict[str, Any]:
    config = joint_config(
        routing=RoutingConfig(replay="rollout"),
        rollout={
            "prompts": 4,
            "group_size": 4,
            "max_new_tokens": 6,
            "share_prefill": share_prefill,
            "prompts_per_batch": 1,
        },
    )
    stage = make_joint_stage(ranks, config, 2, FixedChecker(lambda text, gold: len(text) % 2 == 0))
    stage.student.engine.eval()
    batch = stage.collector.collect(0).batch
    assert batch.routes_BLNK is not None
    with torch.no_grad():
        _, _, record = stage._forward(stage.student.engine, batch, 0)
    unseen_BL = batch.routes_BLNK[:, :, 0, 0] < 0
    mask_S = (batch.attention_mask_BL.bool() & ~unseen_BL).flatten()
    flips = [
        int(choice_flips(record.selected_SK[layer], batch.routes_BLNK[:, :, layer].flatten(0, 1).long(), mask_S))
        for layer in range(len(stage.student.layers))
    ]
    shapes = [tuple(batch.routes_BLNK.shape[:2]), tuple(batch.attention_mask_BL.shape)]
    return {"flips": flips, "tokens": int(mask_S.sum()), "unseen": unseen_BL.sum(dim=1).tolist(), "shapes": shapes}


@pytest.mark.parametrize("share_prefill", [True, False])
def test_traced_routes_are_those_of_one_forward_pass(share_prefill: bool) -> None:
    for found in run_ranks(rollout_against_forward, 2, share_prefill):
        assert found["tokens"] > 8 * 4
        assert found["flips"] == [0, 0]
        # Only the last token that fits was never run; shorter ones of a joined batch are padding there.
        assert found["shapes"][0] == found["shapes"][1]
        assert all(1 <= count <= 6 for count in found["unseen"])


def test_flips_between_rollout_and_scoring_are_those_of_the_noise() -> None:
    runs = [{}, {"routing": RoutingConfig(noise=0.5)}, {"routing": RoutingConfig(noise=0.5, replay="rollout")}]
    still, noisy, replayed = run_ranks(one_step_each, 2, runs)[0]
    assert still["metrics"]["router_flips_rollout"] == 0
    assert noisy["metrics"]["router_flips_rollout"] > 0.05
    assert replayed["metrics"]["router_flips_rollout"] == 0


def test_replay_of_the_rollout_reaches_the_scores_and_the_updates() -> None:
    replayed = run_ranks(one_step_each, 2, [{"routing": RoutingConfig(replay="rollout")}])[0][0]
    assert replayed["metrics"]["router_flips"] == 0
    assert replayed["metrics"]["router_shift"] > 0


def one_rank_without_spread(ranks: Ranks, spread_on: list[int]) -> dict[str, Any]:
    """A step in which only the ranks of `spread_on` have groups to learn from."""
    policy = {"updates_per_rollout": 2, "drop_flat_groups": True}
    spread = ranks.rank in spread_on
    checker = FixedChecker(lambda text, gold: spread and len(text) % 2 == 0)
    stage = make_joint_stage(ranks, joint_config(policy=policy, reward={"format_weight": 0.0}), 2, checker)
    before = stage.student.layers[0].experts.w1.detach().clone()
    metrics = dict(stage.step(0).metrics)
    shared = {name: p.detach() for name, p in stage.student.model.named_parameters() if ".experts." not in name}
    moved = float((stage.student.layers[0].experts.w1 - before).abs().max())
    return {"metrics": metrics, "shared": shared, "moved": moved}


@pytest.mark.parametrize("spread_on", [[0], []], ids=["one rank has nothing to learn from", "no rank has"])
def test_a_rank_whose_groups_are_all_dropped_keeps_step_with_the_others(spread_on: list[int]) -> None:
    first, second = run_ranks(one_rank_without_spread, 2, spread_on)
    for name, weights in first["shared"].items():
        assert torch.equal(weights, second["shared"][name]), name
    assert first["metrics"]["groups_without_spread"] >= 0.5
    assert all(math.isfinite(value) for value in first["metrics"].values())
    # Without a gradient only weight decay is left.
    assert (first["moved"] > 1e-4) == (second["moved"] > 1e-4) == bool(spread_on)


def one_rank_far_shorter(ranks: Ranks, zero_stage: int) -> dict[str, Any]:
    """A step in which the first rank's responses end with their first token, and have nothing to learn from."""
    short = ranks.rank == 0
    policy = {"updates_per_rollout": 2, "drop_flat_groups": True}
    checker = FixedChecker(lambda text, gold: not short and len(text) % 2 == 0)
    config = joint_config(policy=policy, reward={"format_weight": 0.0})
    stage = make_joint_stage(ranks, config, 2, checker, zero_stage=zero_stage)
    ends = tuple(range(stage.student.model.config.vocab_size)) if short else (10**6,)
    engine = dataclasses.replace(stage.collector.engine, end_token_ids=ends)  # type: ignore[type-var]
    stage.collector = dataclasses.replace(stage.collector, engine=engine)
    return dict(stage.step(0).metrics)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_ranks_whose_rollouts_differ_as_much_as_they_can_keep_step(zero_stage: int) -> None:
    first, second = run_ranks(one_rank_far_shorter, 2, zero_stage)
    assert first["response_tokens"] == second["response_tokens"] == (1 + 6) / 2
    assert first["groups_without_spread"] >= 0.5
    agreed = {name for name in first if "second" not in name}
    assert {name: first[name] for name in agreed} == {name: second[name] for name in agreed}
    assert first["grad_norm"] > 0 and all(math.isfinite(value) for value in first.values())


def guided_steps(ranks: Ranks, replay: str) -> list[dict[str, float]]:
    """Two steps whose own responses are all wrong, the teacher's answer being the gold one."""
    guidance = Guidance(texts={normalise_question(problem.question): [problem.answer] for problem in problems()})
    config = joint_config(reward={"format_weight": 0.0}, routing={"replay": replay})
    golds = {problem.answer for problem in problems()}
    checker = FixedChecker(lambda text, gold: text == gold and gold in golds)
    stage = make_joint_stage(ranks, config, 2, checker, guidance)
    return [dict(stage.step(step).metrics) for step in range(2)]


@pytest.mark.parametrize("replay", ["off", "rollout"])
def test_groups_that_fail_learn_from_the_teachers_responses(replay: str) -> None:
    first, second = run_ranks(guided_steps, 2, replay)
    for mine, other in zip(first, second, strict=True):
        assert mine["groups_guided"] == other["groups_guided"] > 0
        assert mine["groups_guided"] + mine["reward_correct"] <= 1
        # Rewards are the student's own; the gradient is that of groups with one right response.
        assert mine["grad_norm"] > 0 and math.isfinite(mine["loss_policy"])
    if replay == "rollout":
        # The rollout did not route the teacher's tokens, so these alone may choose anew.
        assert first[0]["router_flips_rollout"] == 0
