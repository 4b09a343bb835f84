"""The weights that a whole joint step leaves, whatever its micro-batches, and what plain AdamW makes of them."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

from padd_ds.engine.ranks import Ranks
from padd_ds.engine.student import Student
from padd_ds.rollout.batch import RolloutBatch
from padd_ds.rollout.collect import Rollout
from padd_ds.stages import joint
from padd_ds.stages.joint import JointStage
from tests.ranks import run_ranks
from tests.stages.lone_responses import alone, loss_terms, prepared, rollout

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

SIZES = (1, 2, 3, 8)
ADAMW = {"lr": 0.5, "betas": (0.9, 0.95), "weight_decay": 0.01}
EPS = 1.0
"""So large that a step follows the gradient's size; AdamW's own takes the sign alone, whatever it is divided by."""


@dataclasses.dataclass
class Given:
    """Collects the same rollout every time."""

    batch: RolloutBatch

    def collect(self, step: int) -> Rollout:
        tokens, responses = float(self.batch.response_mask_BR.sum()), self.batch.n_responses
        return Rollout(batch=self.batch, metrics={"response_tokens": (tokens, responses)}, samples=[])


def stage_of(ranks: Ranks, size: int, updates: int) -> JointStage:
    stage = prepared(
        ranks,
        micro_batch_size=size,
        policy={"updates_per_rollout": updates, "clip_low": 0.2, "clip_high": 0.2, "shift_penalty": 2.0, "weight": 0.3},
        distillation={"weight": 0.15},
        optimizer={"learning_rate": ADAMW["lr"], "betas": ADAMW["betas"], "weight_decay": ADAMW["weight_decay"]},
    )
    for group in stage.student.engine.optimizer.param_groups:
        group["eps"] = EPS
    return stage


def weights(stage: JointStage) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in stage.student.model.named_parameters()}


def after_a_step(ranks: Ranks, batch: RolloutBatch, size: int, updates: int) -> dict[str, Any]:
    stage = stage_of(ranks, size, updates)
    stage.collector = Given(batch)
    metrics = dict(stage.step(0).metrics)
    biases = {str(layer): router.e_score_correction_bias.clone() for layer, router in enumerate(stage.student.routers)}
    return {"weights": weights(stage), "biases": biases, "metrics": metrics}


def after_a_step_of_two_ranks(ranks: Ranks, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Each with one of the two groups; as it is, and with a bug."""
    batch = RolloutBatch(**{name: tensor.chunk(2)[ranks.rank] for name, tensor in tensors.items()})
    found = after_a_step(ranks, batch, 2, 1)
    with world_size_left_out():
        return {"found": found, "planted": after_a_step(ranks, batch, 2, 1)}


def after_plain_adamw(ranks: Ranks, batch: RolloutBatch) -> dict[str, Any]:
    """One step on the gradient of lone responses, without DeepSpeed's optimiser."""
    stage = stage_of(ranks, 1, 1)
    stage.student.engine.eval()
    lone = [alone(stage, batch, row) for row in range(batch.n_responses)]
    parameters = dict(stage.student.model.named_parameters())
    gradients = torch.autograd.grad(sum(loss_terms(stage, batch, lone, lone)), list(parameters.values()))
    copies = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    for copy, gradient in zip(copies.values(), gradients, strict=True):
        copy.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(copies.values(), 1.0)
    torch.optim.AdamW(copies.values(), eps=EPS, **ADAMW).step()
    return {"weights": {name: copy.detach() for name, copy in copies.items()}, "grad_norm": float(norm)}


@contextmanager
def loss_divided_by_the_accumulation_steps() -> Iterator[None]:
    """On top of the division by the counts of the whole update."""
    with patch.object(Student, "backward", lambda self, loss: self.engine.backward(loss)):
        yield


@contextmanager
def each_micro_batch_a_mean_of_its_own() -> Iterator[None]:
    right = JointStage._loss_terms

    def wrong(self: JointStage, model: Any, micro_batch: Any, counts: Any, sums: Any) -> Any:
        return right(self, model, micro_batch, self._counts([micro_batch.batch]), sums)

    with patch.object(JointStage, "_loss_terms", wrong):
        yield


@contextmanager
def last_micro_batch_alone() -> Iterator[None]:
    """The gradients of those before it are lost."""
    right = Student.backward

    def wrong(self: Student, loss: torch.Tensor) -> None:
        boundary = self.engine.is_gradient_accumulation_boundary()
        right(self, loss if boundary else 0 * loss)

    with patch.object(Student, "backward", wrong):
        yield


@contextmanager
def gradients_not_clipped() -> Iterator[None]:
    right = JointStage._update

    def wrong(self: JointStage, *given: Any) -> Any:
        self.student.engine.optimizer.clip_grad = 0.0
        return right(self, *given)

    with patch.object(JointStage, "_update", wrong):
        yield


def world_size_left_out() -> Any:
    """The factor that makes up for the mean of the gradients over ranks."""
    right = joint.global_mean
    return patch.object(joint, "global_mean", lambda total, count, world: right(total, count, 1))


PLANTED = (
    loss_divided_by_the_accumulation_steps,
    each_micro_batch_a_mean_of_its_own,
    last_micro_batch_alone,
    gradients_not_clipped,
)


def compared(ranks: Ranks) -> dict[str, Any]:
    first = stage_of(ranks, 1, 1)
    batch, before = rollout(first), weights(first)
    planted = {}
    for bug in PLANTED:
        with bug():
            planted[bug.__name__] = after_a_step(ranks, batch, 2, 1)
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {
        "batch": {name: tensor for name, tensor in fields.items() if tensor is not None},
        "before": before,
        "plain": after_plain_adamw(ranks, batch),
        "one_update": {size: after_a_step(ranks, batch, size, 1) for size in (2, 8)},
        "two_updates": {size: after_a_step(ranks, batch, size, 2) for size in SIZES},
        "planted": planted,
    }


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return run_ranks(compared, 1)[0]


def distance(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight."""
    assert found.keys() == other.keys()
    return max(float((found[name] - other[name]).abs().max()) for name in found)


def test_a_step_is_one_of_plain_adamw_on_the_gradient_of_lone_responses(results: dict[str, Any]) -> None:
    plain = results["plain"]
    assert 1 < plain["grad_norm"] < 4
    for name, before in results["before"].items():
        assert (plain["weights"][name] - before).abs().max() > 1e-4, name
    for size, found in results["one_update"].items():
        assert found["metrics"]["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5), size
        assert distance(found["weights"], plain["weights"]) < 2e-6, size


def joined(ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Each rank holds a share of the experts, and all of the rest."""
    first, second = ranks
    for name in first:
        assert ".experts." in name or torch.equal(first[name], second[name]), name
    return {name: torch.cat([w, second[name]]) if ".experts." in name else w for name, w in first.items()}


def comparable(metrics: dict[str, float]) -> dict[str, float]:
    """Without times, and without the gradients of one micro-batch's terms."""
    return {
        name: value
        for name, value in metrics.items()
        if not name.startswith(("seconds_", "tokens_per_second_", "grad_norm_"))
    }


def same_metrics(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return comparable(found["metrics"]) == pytest.approx(comparable(expected["metrics"]), rel=1e-4, abs=1e-6)


def test_a_step_of_two_ranks_is_that_of_one(results: dict[str, Any]) -> None:
    ranks = run_ranks(after_a_step_of_two_ranks, 2, results["batch"])
    plain, one = results["plain"]["weights"], results["one_update"][2]
    for rank in ranks:
        assert same_metrics(rank["found"], one) and distance(rank["found"]["biases"], one["biases"]) < 2e-6
    assert distance(joined([rank["found"]["weights"] for rank in ranks]), plain) < 2e-6
    assert distance(joined([rank["planted"]["weights"] for rank in ranks]), plain) > 1e-4


def test_a_step_does_not_depend_on_the_micro_batches(results: dict[str, Any]) -> None:
    one, *others = results["two_updates"].values()
    assert one["metrics"]["ratio_deviation"] > 1e-3 and one["metrics"]["router_shift"] > 1e-3
    for other in others:
        assert same_metrics(other, one)
        assert distance(one["weights"], other["weights"]) < 2e-6
        assert distance(one["biases"], other["biases"]) < 2e-6


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_shows(results: dict[str, Any], bug: Callable[[], Any]) -> None:
    assert distance(results["planted"][bug.__name__]["weights"], results["plain"]["weights"]) > 1e-4
