"""A joint update against one response at a time, unpadded; and that a bug in it would show."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

from padd_ds.engine.ranks import Ranks
from padd_ds.losses.distillation import TEMPERATURE_RULES
from padd_ds.losses.policy import POLICY_LOSSES, PolicyLoss, PolicyTerms, rspo_sum
from padd_ds.rollout.batch import RolloutBatch
from padd_ds.stages import joint
from padd_ds.stages.joint import JointStage
from padd_ds.stages.micro_batch import MicroBatch, OldPolicy
from padd_ds.stages.routing_report import RoutingStatistics
from padd_ds.stages.stage import MetricSums
from tests.ranks import run_ranks
from tests.stages.lone_responses import mover, of_the_stage, one_by_one, prepared, rollout

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

CASES: dict[str, dict[str, Any]] = {
    "grpo": {"policy": {"clip_low": 0.2}, "distillation": {"temperature_rule": "fixed"}},
    "dr_grpo": {"policy": {"clip_low": 0.2}, "distillation": {"temperature_rule": "confident"}},
    # Wide clips, behind which no discount hides.
    "pr_grpo": {
        "policy": {"clip_low": 0.8, "shift_penalty": 10.0, "shift_floor": 0.0},
        "distillation": {"temperature_rule": "confident", "temperature": 1.2, "temperature_floor": 0.5},
    },
    "rspo": {"policy": {"clip_low": 0.8, "shift_floor": 0.85}, "distillation": {"temperature_rule": "confident"}},
}
COUNTS = ("load", "value_count")


def case(ranks: Ranks, objective: str) -> JointStage:
    policy = {"objective": objective, "updates_per_rollout": 1, "clip_high": 0.2, **CASES[objective]["policy"]}
    distillation = {"weight": 0.5, **CASES[objective]["distillation"]}
    size = {"prompts": 4, "group_size": 4, "max_new_tokens": 6}
    return prepared(ranks, micro_batch_size=4, policy=policy, distillation=distillation, rollout=size)


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
def prompt_tokens_given_the_advantage() -> Iterator[None]:
    right = RoutingStatistics.add
    with patch.object(
        RoutingStatistics, "add", lambda self, record, mask, values, _: right(self, record, mask, values, mask)
    ):
        yield


@contextmanager
def advantage_at_the_position_before() -> Iterator[None]:
    """Where the token is predicted, not where it stands."""
    right = RoutingStatistics.add
    with patch.object(
        RoutingStatistics,
        "add",
        lambda self, record, mask, values, on: right(self, record, mask, values, on.roll(-1, dims=1)),
    ):
        yield


@contextmanager
def advantage_of_another_response() -> Iterator[None]:
    right = RoutingStatistics.add
    with patch.object(
        RoutingStatistics, "add", lambda self, record, mask, values, on: right(self, record, mask, values.flip(0), on)
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


def shift_at_the_token_itself() -> Any:
    return patch.object(joint, "response_positions", lambda tensor_BL, n_response: tensor_BL[:, -n_response:])


def shift_one_token_early() -> Any:
    return patch.object(
        joint, "response_positions", lambda tensor_BL, n_response: tensor_BL.roll(1, dims=1)[:, -n_response - 1 : -1]
    )


@contextmanager
def shift_changed_by(change: Callable[[JointStage, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    right = JointStage._shift
    with patch.object(JointStage, "_shift", lambda self, *given: change(self, right(self, *given))):
        yield


def shift_of_another_response() -> Any:
    return shift_changed_by(lambda stage, shift_NBR: shift_NBR.flip(1))


def shift_summed_over_layers() -> Any:
    return shift_changed_by(lambda stage, shift_NBR: shift_NBR * len(stage.student.layers))


@contextmanager
def shift_over_the_experts_chosen_now() -> Iterator[None]:
    right = JointStage._shift

    def wrong(self: JointStage, micro_batch: MicroBatch, record: Any, sums: MetricSums) -> torch.Tensor:
        chosen = [record.selected_SK[layer] for layer in range(len(self.student.layers))]
        old = dataclasses.replace(micro_batch.old, selected_SK=chosen)
        return right(self, dataclasses.replace(micro_batch, old=old), record, sums)

    with patch.object(JointStage, "_shift", wrong):
        yield


def with_shift(change: Callable[[torch.Tensor], torch.Tensor], objective: str, loss: PolicyLoss) -> Any:
    """`loss`, with the shift changed, in place of the objective's own."""
    return patch.dict(POLICY_LOSSES, {objective: lambda *given: loss(*given[:4], change(given[4]), given[5])})


def good_responses_discounted_too() -> Any:
    return with_shift(lambda shift_BR: 10 * shift_BR, "pr_grpo", rspo_sum)


def ratio_raised_by_the_shift() -> Any:
    return with_shift(torch.neg, "pr_grpo", POLICY_LOSSES["pr_grpo"])


def shift_left_out() -> Any:
    return with_shift(torch.zeros_like, "rspo", POLICY_LOSSES["rspo"])


def response_divided_by_its_length() -> Any:
    right = POLICY_LOSSES["dr_grpo"]

    def wrong(*given: Any) -> PolicyTerms:
        return right(*given[:5], dataclasses.replace(given[5], normalisation="response"))

    return patch.dict(POLICY_LOSSES, {"dr_grpo": wrong})


def temperature_of_the_wrong_sign() -> Any:
    return patch.dict(TEMPERATURE_RULES, {"confident": TEMPERATURE_RULES["literal"]})


@contextmanager
def temperature_of_another_response() -> Iterator[None]:
    right = joint.distillation_temperature
    with patch.object(
        joint, "distillation_temperature", lambda advantage_B, **rest: right(advantage_B.flip(0), **rest)
    ):
        yield


def teacher_not_tempered() -> Any:
    return patch.dict(TEMPERATURE_RULES, {"confident": TEMPERATURE_RULES["fixed"]})


PLANTED: dict[str, list[tuple[Callable[[], Any], tuple[str, ...]]]] = {
    "grpo": [
        (advantage_of_the_wrong_sign, ("policy",)),
        (loss_one_token_early, ("policy", "kd")),
        (last_prompt_token_unmasked, ("policy",)),
        (old_policy_scored_too_late, ("policy",)),
        (old_policy_of_an_earlier_update, ("policy",)),
        (padding_unmasked, ("policy", "kd", "load", "value_sum", "value_count")),
        (padding_counted_in_the_load, ("load",)),
        (prompt_tokens_given_the_advantage, ("value_sum", "value_count")),
        (advantage_at_the_position_before, ("value_sum", "value_count")),
        (advantage_of_another_response, ("value_sum",)),
    ],
    "dr_grpo": [(response_divided_by_its_length, ("policy",)), (temperature_of_the_wrong_sign, ("kd",))],
    "pr_grpo": [
        (shift_at_the_token_itself, ("policy", "shift")),
        (shift_one_token_early, ("policy", "shift")),
        (shift_of_another_response, ("policy", "shift")),
        (shift_summed_over_layers, ("policy", "shift")),
        (good_responses_discounted_too, ("policy",)),
        (ratio_raised_by_the_shift, ("policy",)),
        (temperature_of_the_wrong_sign, ("kd",)),
        (temperature_of_another_response, ("kd",)),
        (teacher_not_tempered, ("kd",)),
    ],
    "rspo": [
        (shift_at_the_token_itself, ("policy", "shift")),
        (shift_one_token_early, ("policy", "shift")),
        (shift_of_another_response, ("policy", "shift")),
        (shift_over_the_experts_chosen_now, ("shift",)),
        (shift_left_out, ("policy",)),
    ],
}
"""By objective: the bugs, and what each of them must change."""


def compared(ranks: Ranks) -> dict[str, Any]:
    results = {}
    for objective in CASES:
        stage = case(ranks, objective)
        batch = rollout(stage)
        move, back = mover(stage)
        expected = one_by_one(stage, batch, move)
        back()
        found, planted = of_the_stage(stage, batch, move), {}
        for bug, _ in PLANTED[objective]:
            back()
            with bug():
                planted[bug.__name__] = of_the_stage(stage, batch, move)
        results[objective] = {"expected": expected, "found": found, "planted": planted}
    return results


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return run_ranks(compared, 1)[0]


def flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    return [number for item in value for number in flat(item)] if isinstance(value, list) else [value]


def error(result: dict[str, Any], expected: dict[str, Any], quantity: str) -> float:
    """The largest difference, as a share of the largest number expected."""
    found, right = flat(result[quantity]), flat(expected[quantity])
    if len(found) != len(right):
        return math.inf
    return max(abs(a - b) for a, b in zip(found, right, strict=True)) / max(map(abs, right))


@pytest.mark.parametrize("objective", CASES)
def test_an_update_equals_loops_over_lone_responses(results: dict[str, Any], objective: str) -> None:
    expected, found = results[objective]["expected"], results[objective]["found"]
    assert abs(expected["policy"]) > 1e-2 and expected["kd"] > 0.1 and max(flat(expected["shift"])) > 0.1
    assert found["shift"].keys() == expected["shift"].keys()
    for quantity in expected:
        assert error(found, expected, quantity) <= (0 if quantity in COUNTS else 3e-5), quantity


@pytest.mark.parametrize(("objective", "bug"), [(name, bug) for name in CASES for bug, _ in PLANTED[name]])
def test_a_planted_bug_shows(results: dict[str, Any], objective: str, bug: Callable[[], Any]) -> None:
    expected, found = results[objective]["expected"], results[objective]["planted"][bug.__name__]
    for quantity in dict(PLANTED[objective])[bug]:
        assert error(found, expected, quantity) > 1e-3, quantity
