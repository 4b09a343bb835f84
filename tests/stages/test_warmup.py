"""The warm-up step: what it trains, what it measures, and that ranks agree."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from padd_ds.config.schema import RunConfig
from padd_ds.config.sections import OptimizerConfig, WarmupConfig
from padd_ds.conversion.targets import ConversionTargets
from padd_ds.engine.activity import experts_activity
from padd_ds.engine.ranks import Ranks
from padd_ds.losses.prior import expert_prior
from padd_ds.stages.supervision import ProblemSupervision, Supervision
from padd_ds.stages.warmup import WarmupStage, is_trained
from tests.ranks import run_ranks
from tests.tiny import tiny_student
from tests.world import deepspeed_tree, joint_config, make_student, problems
from tools.tiny_model import make_tiny_model, make_tokenizer


def warmup_config(**options: Any) -> RunConfig:
    """Every step sees all sixteen problems."""
    warmup = WarmupConfig(batch_size=16, init_tokens=16, **options)
    return joint_config(stage="warmup", warmup=warmup, optimizer=OptimizerConfig(learning_rate=5e-3))


def targets() -> ConversionTargets:
    priors = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    return ConversionTargets(
        expert_prior_LE=priors,
        prior_temperature=0.3,
        assignment_LF=torch.zeros(2, 80, dtype=torch.int32),
        activation_mean_LE=None,
        centroids=(),
        layer_map_L=torch.arange(2, dtype=torch.int32),
        cluster="random",
        router="random",
    )


def make_warmup(
    ranks: Ranks, config: RunConfig, supervision: Supervision | None = None, zero_stage: int = 2
) -> WarmupStage:
    student = make_student(
        ranks,
        config,
        deepspeed_tree(ranks.world, zero_stage),
        trainable=lambda name: is_trained(name, config.warmup.train_shared_experts),
    )
    return WarmupStage(
        student=student,
        teacher=make_tiny_model().eval().requires_grad_(False),
        supervision=supervision or ProblemSupervision(problems=problems(), tokenizer=make_tokenizer(), config=config),
        targets=targets(),
        config=config,
    )


def steps(ranks: Ranks, options: dict[str, Any]) -> dict[str, Any]:
    stage = make_warmup(ranks, warmup_config(**options))
    before = {name: tensor.detach().clone() for name, tensor in stage.student.model.named_parameters()}
    reports = [stage.step(step) for step in range(6)]
    moved = {name for name, tensor in stage.student.model.named_parameters() if not torch.equal(tensor, before[name])}
    return {"metrics": [dict(report.metrics) for report in reports], "moved": sorted(moved)}


def three_routings(ranks: Ranks) -> dict[str, Any]:
    return {routing: steps(ranks, {"routing": routing}) for routing in ("routed", "sample", "dense")}


@pytest.mark.ranks
@pytest.mark.slow
def test_only_experts_move_under_every_routing_and_ranks_report_the_same() -> None:
    first, second = run_ranks(three_routings, 2)
    for routing, result in first.items():
        assert all(".mlp.experts." in name or ".mlp.shared_experts." in name for name in result["moved"]), routing
        assert len(result["moved"]) == 2 * (3 + 3), routing
        for mine, other in zip(result["metrics"], second[routing]["metrics"], strict=True):
            shared = {name for name in mine if "second" not in name}
            assert {name: mine[name] for name in shared} == {name: other[name] for name in shared}
            assert mine["tokens_per_second_update"] > 0
        losses = [metrics["loss_lm"] for metrics in result["metrics"]]
        assert losses[-1] < losses[0], routing
        assert all(metrics["loss_init"] > 0 and metrics["loss_kd"] > 0 for metrics in result["metrics"])


def first_losses(ranks: Ranks) -> dict[str, float]:
    return dict(make_warmup(ranks, warmup_config(routing="routed")).step(0).metrics)


@pytest.mark.ranks
@pytest.mark.slow
def test_losses_equal_a_loop_over_unpadded_problems() -> None:
    tokenizer, teacher = make_tokenizer(), make_tiny_model().eval()
    student = tiny_student(vocabulary=len(tokenizer))
    cross_entropies, divergences = [], []
    for problem in problems():
        start = len(tokenizer(problem.question, add_special_tokens=False).input_ids)
        text = f"{problem.question}{problem.solution}"
        ids = torch.tensor([[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            log_q_RV = student(ids).logits[0, start - 1 : -1].log_softmax(-1)
            log_p_RV = teacher(ids).logits[0, start - 1 : -1].log_softmax(-1)
        cross_entropies += (-log_q_RV.gather(-1, ids[0, start:, None])).flatten().tolist()
        divergences += (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1).tolist()
    for metrics in run_ranks(first_losses, 2):
        assert metrics["loss_lm"] == pytest.approx(sum(cross_entropies) / len(cross_entropies), rel=1e-5)
        assert metrics["loss_kd"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-5)


def two_steps(ranks: Ranks, checkpointing: bool) -> list[dict[str, list[float]]]:
    """At each ZeRO stage, the losses and gradient norms of two steps that train the experts alone."""
    results = []
    for zero_stage in range(4):
        config = replace(warmup_config(routing="routed"), activation_checkpointing=checkpointing)
        stage = make_warmup(ranks, config, zero_stage=zero_stage)
        metrics = [stage.step(step).metrics for step in range(2)]
        names = ("loss_lm", "loss_kd", "loss_init", "grad_norm")
        results.append({name: [one[name] for one in metrics] for name in names})
    return results


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(("world", "checkpointing"), [(1, False), (2, False), (2, True)])
def test_every_zero_stage_trains_the_experts_alike(world: int, checkpointing: bool) -> None:
    *others, reference = run_ranks(two_steps, world, checkpointing)[0]
    assert reference["loss_lm"][1] < reference["loss_lm"][0]
    for other in others:
        for name, values in other.items():
            assert values == pytest.approx(reference[name], rel=1e-5), name


def divergences_of_the_first_step(ranks: Ranks) -> dict[str, float]:
    directions = ("forward", "reverse", "jsd")
    stages = {name: make_warmup(ranks, warmup_config(routing="routed", kd_direction=name)) for name in directions}
    return {name: stage.step(0).metrics["loss_kd"] for name, stage in stages.items()}


@pytest.mark.ranks
@pytest.mark.slow
def test_the_direction_of_distillation_is_the_configurations() -> None:
    found = run_ranks(divergences_of_the_first_step, 1)[0]
    assert 0 < found["jsd"] < min(found["forward"], found["reverse"])
    assert found["forward"] != pytest.approx(found["reverse"], rel=1e-3)


def init_alone(ranks: Ranks) -> list[float]:
    stage = make_warmup(ranks, warmup_config(kd_weight=0.0, init_weight=100.0, train_shared_experts=False))
    return [stage.step(step).metrics["loss_init"] for step in range(12)]


@pytest.mark.ranks
@pytest.mark.slow
def test_l_init_pulls_expert_activity_towards_the_clusters() -> None:
    losses = run_ranks(init_alone, 1)[0]
    assert losses[-1] < 0.8 * losses[0]


def test_what_is_trained() -> None:
    assert is_trained("model.layers.3.mlp.experts.w1", False)
    assert is_trained("model.layers.3.mlp.experts.gate_up_proj", False)
    assert is_trained("model.layers.3.mlp.shared_experts.up_proj.weight", True)
    assert not is_trained("model.layers.3.mlp.shared_experts.up_proj.weight", False)
    assert not is_trained("model.layers.3.mlp.gate.weight", True)
    assert not is_trained("model.layers.3.self_attn.q_proj.weight", True)


def activity(ranks: Ranks) -> torch.Tensor:
    student = make_student(ranks, warmup_config(), deepspeed_tree(ranks.world))
    x_SD = torch.randn(12, 32, generator=torch.Generator().manual_seed(1)).chunk(ranks.world)[ranks.rank]
    return experts_activity(student.layers[0], x_SD).detach()


@pytest.mark.ranks
@pytest.mark.slow
def test_activity_is_measured_on_the_tokens_of_all_expert_parallel_ranks() -> None:
    alone = run_ranks(activity, 1)[0]
    for shared in run_ranks(activity, 2):
        torch.testing.assert_close(shared, alone, rtol=1e-6, atol=0)
    assert expert_prior(alone, 0.3).sum().item() == pytest.approx(1)
