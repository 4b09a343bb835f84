"""The losses and load counts of a joint update against one response at a time, unpadded; and that a bug would show."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

from padd_ds.engine.ranks import Ranks
from padd_ds.losses.policy import POLICY_LOSSES
from padd_ds.rollout.batch import RolloutBatch
from padd_ds.stages import joint
from padd_ds.stages.joint import JointStage
from padd_ds.stages.micro_batch import MicroBatch, OldPolicy
from padd_ds.stages.routing_report import RoutingStatistics
from padd_ds.stages.stage import MetricSums
from tests.ranks import run_ranks
from tests.world import FixedChecker, joint_config, make_joint_stage, problems

CLIP = 0.2


def prepared(ranks: Ranks) -> JointStage:
    config = joint_config(
        policy={"objective": "grpo", "updates_per_rollout": 1},
        distillation={"temperature_rule": "fixed", "weight": 0.5},
        rollout={"prompts": 4, "group_size": 4, "max_new_tokens": 6},
    )
    stage = make_joint_stage(ranks, config, 1, FixedChecker(lambda text, gold: len(text) % 2 == 0))
    longer = [dataclasses.replace(one, question="1+" * (row % 4) + one.question) for row, one in enumerate(problems())]
    stage.collector = dataclasses.replace(stage.collector, problems=longer)
    return stage


def rollout(stage: JointStage) -> RolloutBatch:
    """Prompts and responses of several lengths; an untrained model hardly ever ends one itself."""
    batch = stage.collector.collect(0).batch
    length_B = torch.arange(batch.n_responses) % batch.response_ids_BR.shape[1] + 1
    shorter_BR = torch.arange(batch.response_ids_BR.shape[1]) < length_B[:, None]
    return dataclasses.replace(batch, response_mask_BR=batch.response_mask_BR & shorter_BR)


def of_the_stage(stage: JointStage, move: Callable[[], None]) -> dict[str, Any]:
    """Loss terms and load of one update, as the stage forms them, with weights that have moved since the scoring."""
    stage.student.engine.eval()
    batch = rollout(stage)
    micro_batches = stage._score(batch, 0, MetricSums())[0]
    move()
    counts = stage._counts([micro_batch.batch for micro_batch in micro_batches])
    statistics, totals = RoutingStatistics.start(stage.student), {"policy": 0.0, "kd": 0.0}
    with torch.no_grad():
        for micro_batch in micro_batches:
            terms, record, _ = stage._loss_terms(stage.student.model, micro_batch, counts, MetricSums())
            stage._count_routing(micro_batch.batch, record, (statistics,))
            totals = {name: totals[name] + float(terms[name]) for name in totals}
    return {**totals, "load": statistics.counts_LE.tolist(), "batch": batch}


@torch.no_grad()
def one_by_one(stage: JointStage, batch: RolloutBatch, move: Callable[[], None]) -> dict[str, Any]:
    """The same from the responses alone, each run without padding, in plain loops."""
    old = [alone(stage, batch, row) for row in range(batch.n_responses)]
    move()
    policy, divergences, load = [], [], 0
    for row, (old_R, _, _) in enumerate(old):
        new_R, counts_LE, logits_RV = alone(stage, batch, row)
        advantage = float(batch.advantage_B[row])
        ratios = [float(ratio) for ratio in (new_R - old_R).exp()]
        losses = [-min(r * advantage, min(max(r, 1 - CLIP), 1 + CLIP) * advantage) for r in ratios]
        policy.append(sum(losses) / len(losses))
        teacher_RV = run(stage.teacher, batch, row)[1].log_softmax(-1)
        divergences += (teacher_RV.exp() * (teacher_RV - logits_RV.log_softmax(-1))).sum(-1).tolist()
        load = load + counts_LE
    kd = 0.5 * sum(divergences) / len(divergences)
    return {"policy": sum(policy) / len(policy), "kd": kd, "load": load.tolist()}


def alone(stage: JointStage, batch: RolloutBatch, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probabilities [R], routed slots [L, E], logits [R, V]) of a response."""
    with stage.student.recording() as record:
        tokens_R, logits_RV = run(stage.student.model, batch, row)
    logprobs_R = logits_RV.log_softmax(-1).gather(-1, tokens_R[:, None])[:, 0]
    experts = stage.student.n_experts
    layers = range(len(stage.student.layers))
    counts = [torch.bincount(record.selected_SK[layer].flatten(), minlength=experts) for layer in layers]
    return logprobs_R, torch.stack(counts).double(), logits_RV


def run(model: Any, batch: RolloutBatch, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [R], logits that predict them [R, V]) of a response, run alone."""
    prompt = batch.prompt_ids_BT[row][batch.prompt_mask_BT[row].bool()]
    response = batch.response_ids_BR[row][batch.response_mask_BR[row]]
    logits_LV = model(torch.cat([prompt, response])[None]).logits[0]
    return response, logits_LV[len(prompt) - 1 : -1].float()


def mover(stage: JointStage) -> tuple[Callable[[], None], Callable[[], None]]:
    """(move the weights a little, move them back)."""
    weights = [parameter for name, parameter in stage.student.model.named_parameters() if "q_proj" in name]
    before = [weight.detach().clone() for weight in weights]

    def move() -> None:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.3)

    def back() -> None:
        with torch.no_grad():
            for weight, original in zip(weights, before, strict=True):
                weight.copy_(original)

    return move, back


@contextmanager
def advantage_of_the_wrong_sign() -> Iterator[None]:
    right = POLICY_LOSSES["grpo"]
    with patch.dict(POLICY_LOSSES, {"grpo": lambda new, old, advantage, *rest: right(new, old, -advantage, *rest)}):
        yield


@contextmanager
def loss_one_token_early() -> Iterator[None]:
    """The last token of the prompt counts as the response's first."""
    right = joint.response_logits
    with patch.object(joint, "response_logits", lambda *given: right(*given).roll(1, dims=1)):
        yield


@contextmanager
def padding_counted_in_the_load() -> Iterator[None]:
    right = RoutingStatistics.add
    with patch.object(
        RoutingStatistics, "add", lambda self, record, mask, *rest: right(self, record, torch.ones_like(mask), *rest)
    ):
        yield


@contextmanager
def old_policy_scored_too_late() -> Iterator[None]:
    right = JointStage._loss_terms

    def late(self: JointStage, model: Any, micro_batch: MicroBatch, *rest: Any) -> Any:
        again = self._old_policy(micro_batch.batch, micro_batch.routing_seed, MetricSums())
        return right(self, model, dataclasses.replace(micro_batch, old=again), *rest)

    with patch.object(JointStage, "_loss_terms", late):
        yield


@contextmanager
def old_policy_of_an_earlier_update() -> Iterator[None]:
    right = JointStage._old_policy

    def stale(self: JointStage, *given: Any) -> OldPolicy:
        weights = [weight for name, weight in self.student.model.named_parameters() if "q_proj" in name]
        now = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight in weights:
                weight.mul_(0.8)
            scored = right(self, *given)
            for weight, original in zip(weights, now, strict=True):
                weight.copy_(original)
        return scored

    with patch.object(JointStage, "_old_policy", stale):
        yield


@contextmanager
def rows_changed_by(change: Callable[[RolloutBatch], dict[str, torch.Tensor]]) -> Iterator[None]:
    right = RolloutBatch.rows

    def wrong(self: RolloutBatch, index: torch.Tensor) -> RolloutBatch:
        rows = right(self, index)
        return dataclasses.replace(rows, **change(rows))

    with patch.object(RolloutBatch, "rows", wrong):
        yield


def last_prompt_token_unmasked() -> Any:
    """It counts as the response's first token."""

    def change(rows: RolloutBatch) -> dict[str, torch.Tensor]:
        return {
            "prompt_ids_BT": rows.prompt_ids_BT[:, :-1],
            "prompt_mask_BT": rows.prompt_mask_BT[:, :-1],
            "response_ids_BR": torch.cat([rows.prompt_ids_BT[:, -1:], rows.response_ids_BR], dim=1),
            "response_mask_BR": torch.cat([rows.prompt_mask_BT[:, -1:].bool(), rows.response_mask_BR], dim=1),
        }

    return rows_changed_by(change)


def padding_unmasked() -> Any:
    """What stands behind a response counts as part of it."""
    return rows_changed_by(lambda rows: {"response_mask_BR": torch.ones_like(rows.response_mask_BR)})


POLICY_BUGS = (
    advantage_of_the_wrong_sign,
    loss_one_token_early,
    last_prompt_token_unmasked,
    old_policy_scored_too_late,
    old_policy_of_an_earlier_update,
)


def compared(ranks: Ranks) -> dict[str, Any]:
    stage = prepared(ranks)
    move, back = mover(stage)
    found = of_the_stage(stage, move)
    back()
    expected = one_by_one(stage, found.pop("batch"), move)
    planted = {}
    for bug in (*POLICY_BUGS, padding_unmasked, padding_counted_in_the_load):
        back()
        with bug():
            planted[bug.__name__] = of_the_stage(stage, move)
        planted[bug.__name__].pop("batch")
    return {"found": found, "expected": expected, "planted": planted}


@pytest.mark.ranks
@pytest.mark.slow
def test_an_update_equals_loops_over_lone_responses_and_planted_bugs_do_not() -> None:
    result = run_ranks(compared, 1)[0]
    found, expected = result["found"], result["expected"]
    assert abs(expected["policy"]) > 1e-4
    assert found["policy"] == pytest.approx(expected["policy"], rel=1e-4)
    assert found["kd"] == pytest.approx(expected["kd"], rel=1e-4)
    assert found["load"] == expected["load"]
    for bug in POLICY_BUGS:
        assert result["planted"][bug.__name__]["policy"] != pytest.approx(expected["policy"], rel=1e-2), bug.__name__
    # Ten times the tolerance above: rows of one length stand together, so that there is little padding.
    assert result["planted"][padding_unmasked.__name__]["kd"] != pytest.approx(expected["kd"], rel=1e-3)
    assert result["planted"][padding_counted_in_the_load.__name__]["load"] != expected["load"]
