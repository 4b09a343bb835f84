"""Gradient norms of the terms of a loss."""

from typing import Any

import pytest
import torch

from padd_ds.engine.ranks import Ranks
from padd_ds.stages.gradients import term_gradient_norms
from tests.ranks import run_ranks
from tests.stages.test_warmup import make_warmup, warmup_config
from tests.world import FixedChecker, joint_config, make_joint_stage


def test_norms_by_hand() -> None:
    one, other = (torch.nn.Parameter(torch.tensor(values)) for values in ([1.0, 2.0], [3.0]))
    terms = {
        "both": 3 * one.sum() + 4 * other.sum(),
        "one": one.square().sum() / 2,
        "neither": torch.tensor(2.0),
        "elsewhere": torch.nn.Parameter(torch.ones(1)).sum(),
    }
    norms = {name: float(norm) for name, norm in term_gradient_norms(terms, [one, other]).items()}
    assert norms == pytest.approx({"both": 34**0.5, "one": 5**0.5, "neither": 0, "elsewhere": 0})
    assert one.grad is None and other.grad is None
    (terms["both"] + terms["one"]).backward()
    assert one.grad.tolist() == [4.0, 5.0]


def steps(ranks: Ranks, every: int) -> dict[str, Any]:
    log = {"gradients_every_steps": every}
    joint = make_joint_stage(ranks, joint_config(log=log), 2, FixedChecker(lambda text, gold: len(text) % 2 == 0))
    metrics = [dict(joint.step(0).metrics)]
    weights = [{name: parameter.detach() for name, parameter in joint.student.model.named_parameters()}]
    warmup = make_warmup(ranks, joint_config(**(vars_of(warmup_config()) | {"log": log})))
    metrics.append(dict(warmup.step(0).metrics))
    weights.append({name: parameter.detach() for name, parameter in warmup.student.model.named_parameters()})
    return {"metrics": metrics, "weights": weights}


def vars_of(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("stage", "warmup", "optimizer")}


@pytest.mark.ranks
@pytest.mark.slow
def test_measuring_changes_nothing_and_names_every_term() -> None:
    off, on = (run_ranks(steps, 2, every) for every in (0, 1))
    for plain, measured in zip(off, on, strict=True):
        for names, before, after in zip(
            (("policy", "kd"), ("lm", "kd", "init")), plain["metrics"], measured["metrics"], strict=True
        ):
            added = {f"grad_norm_{name}" for name in names}
            assert set(after) - set(before) == added
            assert all(after[name] > 0 for name in added)
        for before, after in zip(plain["weights"], measured["weights"], strict=True):
            assert all(torch.equal(before[name], after[name]) for name in before)
