"""A joint update as the stage forms it, and the same from one response at a time, unpadded, in plain loops.

Legend: B responses, R tokens of a response, L tokens with its prompt, N MoE layers, E experts, K experts per token,
V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from padd_ds.engine.ranks import Ranks
from padd_ds.rollout.batch import RolloutBatch
from padd_ds.stages.joint import JointStage
from padd_ds.stages.routing_report import RoutingStatistics
from padd_ds.stages.stage import MetricSums
from tests.world import FixedChecker, joint_config, make_joint_stage, problems


def prepared(ranks: Ranks, **overrides: Any) -> JointStage:
    """A stage whose prompts have several lengths, with the experts dealt out to all ranks."""
    checker = FixedChecker(lambda text, gold: len(text) % 2 == 0)
    stage = make_joint_stage(ranks, joint_config(**overrides), ranks.world, checker)
    longer = [dataclasses.replace(one, question="1+" * (row % 4) + one.question) for row, one in enumerate(problems())]
    stage.collector = dataclasses.replace(stage.collector, problems=longer)
    return stage


def rollout(stage: JointStage) -> RolloutBatch:
    """Responses of several lengths, each with an advantage of its own; an untrained model hardly ever ends one."""
    stage.student.engine.eval()
    batch = stage.collector.collect(1).batch
    row_B, width = torch.arange(batch.n_responses), batch.response_ids_BR.shape[1]
    shorter_BR = torch.arange(width) < (row_B % width + 1)[:, None]
    return dataclasses.replace(
        batch, response_mask_BR=batch.response_mask_BR & shorter_BR, advantage_B=1.5 * torch.sin(row_B + 1.0) - 0.4
    )


def mover(stage: JointStage) -> tuple[Callable[[], None], Callable[[], None]]:
    """(move the weights of attention and routers a little, move them back)."""
    names = ("q_proj.weight", "router.gate.weight")
    moved = {name: weight for name, weight in stage.student.model.named_parameters() if name.endswith(names)}
    before = {name: weight.detach().clone() for name, weight in moved.items()}
    assert len(moved) == 2 * len(stage.student.layers) > 0

    @torch.no_grad()
    def move() -> None:
        for name, weight in moved.items():
            weight.mul_(1.3 if name.endswith("q_proj.weight") else torch.linspace(0.5, 1.5, len(weight))[:, None])

    @torch.no_grad()
    def back() -> None:
        for name, weight in moved.items():
            weight.copy_(before[name])

    return move, back


@torch.no_grad()
def of_the_stage(stage: JointStage, batch: RolloutBatch, move: Callable[[], None]) -> dict[str, Any]:
    """Terms, shifts and loads of one update as the stage forms them, with weights that have moved since the scoring."""
    micro_batches = stage._score(batch, 0, MetricSums())[0]
    move()
    counts = stage._counts([micro_batch.batch for micro_batch in micro_batches])
    statistics, totals, shifts = RoutingStatistics.start(stage.student), {"policy": 0.0, "kd": 0.0}, {}
    for micro_batch in micro_batches:
        terms, record, shift_NBR = stage._loss_terms(stage.student.model, micro_batch, counts, MetricSums())
        stage._count_routing(micro_batch.batch, record, (statistics,))
        totals = {name: totals[name] + float(terms[name]) for name in totals}
        shifts |= by_response(micro_batch.batch, shift_NBR)
    return {
        **totals,
        "shift": shifts,
        "load": statistics.counts_LE.tolist(),
        "value_sum": statistics.value_sum_LE.tolist(),
        "value_count": statistics.value_count_LE.tolist(),
    }


def by_response(batch: RolloutBatch, shift_NBR: torch.Tensor) -> dict[str, list[list[float]]]:
    mask_BR = batch.response_mask_BR
    return {name_of(batch, row): shift_NBR[:, row, mask_BR[row]].tolist() for row in range(batch.n_responses)}


def name_of(batch: RolloutBatch, row: int) -> str:
    return str([ids.tolist() for ids in tokens_of(batch, row)])


def tokens_of(batch: RolloutBatch, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the prompt's tokens, the response's [R]), without padding."""
    prompt_ids = batch.prompt_ids_BT[row][batch.prompt_mask_BT[row].bool()]
    return prompt_ids, batch.response_ids_BR[row][batch.response_mask_BR[row]]


@dataclass(frozen=True)
class Lone:
    """A response that was run alone."""

    logits_RV: torch.Tensor
    """That predict its tokens."""
    logprobs_R: torch.Tensor
    routers_NLE: torch.Tensor
    """The routers' scores, made distributions."""
    chosen_NLK: torch.Tensor
    n_prompt: int


def alone(stage: JointStage, batch: RolloutBatch, row: int) -> Lone:
    prompt_ids, tokens_R = tokens_of(batch, row)
    with stage.student.recording() as record:
        logits_RV = run(stage.student.model, batch, row)
    layers = range(len(stage.student.layers))
    scores_NLE = torch.stack([record.scores_SE[layer] for layer in layers])
    return Lone(
        logits_RV=logits_RV,
        logprobs_R=logits_RV.log_softmax(-1).gather(-1, tokens_R[:, None])[:, 0],
        routers_NLE=scores_NLE / scores_NLE.sum(-1, keepdim=True),
        chosen_NLK=torch.stack([record.selected_SK[layer] for layer in layers]),
        n_prompt=len(prompt_ids),
    )


def run(model: Any, batch: RolloutBatch, row: int) -> torch.Tensor:
    """Logits that predict the response's tokens, [R, V]."""
    prompt_ids, tokens_R = tokens_of(batch, row)
    logits_LV = model(torch.cat([prompt_ids, tokens_R])[None]).logits[0]
    return logits_LV[len(prompt_ids) - 1 : -1].float()


@torch.no_grad()
def one_by_one(stage: JointStage, batch: RolloutBatch, move: Callable[[], None]) -> dict[str, Any]:
    """What `of_the_stage` gives."""
    old = [alone(stage, batch, row) for row in range(batch.n_responses)]
    move()
    new = [alone(stage, batch, row) for row in range(batch.n_responses)]
    n_experts = stage.student.n_experts
    advantages, n_prompts = batch.advantage_B.tolist(), [one.n_prompt for one in new]
    answered_NLK = [one.chosen_NLK[:, one.n_prompt :] for one in new]
    counts_BNE = [slots(chosen_NLK, n_experts) for chosen_NLK in answered_NLK]
    assert min(n_prompts) < max(n_prompts)
    policy, kd = loss_terms(stage, batch, old, new)
    return {
        "policy": float(policy),
        "kd": float(kd),
        "shift": {
            name_of(batch, row): [
                [gamma(stage, before, after, layer, index) for index in range(len(after.logprobs_R))]
                for layer in range(len(stage.student.layers))
            ]
            for row, (before, after) in enumerate(zip(old, new, strict=True))
        },
        "load": sum(slots(one.chosen_NLK, n_experts) for one in new).tolist(),
        "value_sum": sum(a * counts_NE for a, counts_NE in zip(advantages, counts_BNE, strict=True)).tolist(),
        "value_count": sum(counts_BNE).tolist(),
    }


def slots(chosen_NLK: torch.Tensor, n_experts: int) -> torch.Tensor:
    """How often each expert was chosen, [N, E]."""
    return torch.stack([torch.bincount(chosen_LK.flatten(), minlength=n_experts) for chosen_LK in chosen_NLK]).double()


def gamma(stage: JointStage, old: Lone, new: Lone, layer: int, index: int) -> float:
    """How far a layer's routing has moved where the response's token `index` is predicted."""
    position = new.n_prompt - 1 + index
    before_E, after_E = old.routers_NLE[layer, position].tolist(), new.routers_NLE[layer, position].tolist()
    if stage.config.policy.objective != "rspo":
        return math.dist(before_E, after_E)
    chosen_K = old.chosen_NLK[layer, position].tolist()
    return sum(abs(math.log(after_E[expert] / before_E[expert])) for expert in chosen_K) / len(chosen_K)


def loss_terms(
    stage: JointStage, batch: RolloutBatch, old: list[Lone], new: list[Lone]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(policy, kd); they carry the gradient that `new` does."""
    policy, divergences = [], []
    for row, (before, after) in enumerate(zip(old, new, strict=True)):
        policy.append(policy_loss(stage, before, after, float(batch.advantage_B[row])))
        temperature = teacher_temperature(stage, float(batch.advantage_B[row]))
        teacher_RV = (run(stage.teacher, batch, row) / temperature).log_softmax(-1)
        divergences += [*(teacher_RV.exp() * (teacher_RV - after.logits_RV.log_softmax(-1))).sum(-1)]
    kd = stage.config.distillation.weight * sum(divergences) / len(divergences)
    return stage.config.policy.weight * sum(policy) / len(policy), kd


def policy_loss(stage: JointStage, old: Lone, new: Lone, advantage: float) -> torch.Tensor:
    options, losses = stage.config.policy, []
    for index, log_ratio in enumerate(new.logprobs_R - old.logprobs_R.detach()):
        shift = fmean(gamma(stage, old, new, layer, index) for layer in range(len(stage.student.layers)))
        ratio = log_ratio.exp() * discount(stage, shift, advantage)
        clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
        losses.append(-torch.minimum(ratio * advantage, clipped * advantage))
    return sum(losses) / (stage.config.rollout.max_new_tokens if options.objective == "dr_grpo" else len(losses))


def discount(stage: JointStage, shift: float, advantage: float) -> float:
    options = stage.config.policy
    if options.objective == "rspo":
        return max(math.exp(-shift), options.shift_floor)
    if options.objective == "pr_grpo" and advantage < 0:
        return math.exp(-options.shift_penalty * shift)
    return 1.0


def teacher_temperature(stage: JointStage, advantage: float) -> float:
    options = stage.config.distillation
    if options.temperature_rule == "fixed":
        return options.temperature
    assert options.temperature_rule == "confident"
    phi = 1 - math.tanh(options.temperature_slope * advantage)
    return options.temperature * min(max(phi, options.temperature_floor), options.temperature_ceiling)
