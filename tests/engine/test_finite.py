"""Losses and gradients that are not finite stop all ranks before the step."""

from typing import Any

import pytest
import torch

from padd_ds.engine.finite import FiniteWatch
from padd_ds.engine.ranks import Ranks
from padd_ds.errors import TrainingDiverged
from tests.ranks import run_ranks
from tests.world import deepspeed_tree, joint_config, make_student

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))


def bad_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """0, with a gradient of 0 times infinity."""
    return (parameter * 0).abs().sqrt().sum()


def one_step(ranks: Ranks, zero_stage: int, bad_rank: int | None) -> dict[str, Any]:
    """A step in which the gradient of a norm is undefined on one rank, while all losses are 0."""
    student = make_student(ranks, joint_config(), deepspeed_tree(1, stage=zero_stage))
    name, parameter = next((n, p) for n, p in student.model.named_parameters() if n.endswith("model.norm.weight"))
    before = parameter.detach().clone()
    told = ""
    for index in range(student.accumulation_steps):
        logits = student.engine(input_ids=torch.tensor([[5, 9, 7]]), use_cache=False).logits
        loss = logits.square().mean()
        if index == 0 and ranks.rank == bad_rank:
            loss = loss + bad_gradient(parameter)
        assert loss.isfinite()
        student.backward(loss)
        try:
            student.step()
        except TrainingDiverged as error:
            told = str(error)
    return {"told": told, "moved": bool((parameter != before).any()), "name": name}


def steps(ranks: Ranks) -> list[dict[str, Any]]:
    """A bad step and a good one at each ZeRO stage."""
    return [one_step(ranks, zero_stage, bad_rank) for zero_stage in (1, 2) for bad_rank in (1, None)]


@pytest.mark.ranks
@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_every_rank_before_the_step() -> None:
    for index, (main, other) in enumerate(zip(*run_ranks(steps, 2), strict=True)):
        if index % 2:
            assert main["moved"] and main["told"] == other["told"] == ""
            continue
        assert not main["moved"] and not other["moved"]
        assert f"the gradient of {other['name']}" in other["told"]
        assert main["told"].startswith("rank 1 failed: ") and other["told"] in main["told"]


@pytest.mark.parametrize(("value", "named"), [(torch.nan, "the loss"), (torch.inf, "the loss"), (1.0, "weight")])
def test_what_is_not_finite_is_named(value: float, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("padd_ds.engine.finite.any_rank", lambda flag, ranks: flag)
    monkeypatch.setattr("padd_ds.engine.finite.together", lambda action, ranks: action())
    model = torch.nn.Linear(2, 1)
    watch = FiniteWatch(model, torch.device("cpu"))
    watch.see_loss(torch.tensor(1.0))
    model.weight.sum().backward()
    watch.check(ALONE)
    watch.see_loss(torch.tensor(value))
    if named == "weight":
        bad_gradient(model.weight).backward()
    with pytest.raises(TrainingDiverged, match=f"{named} is not finite"):
        watch.check(ALONE)
