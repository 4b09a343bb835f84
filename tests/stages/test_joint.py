"""A joint step on two expert-parallel ranks."""

from typing import Any

import pytest
import torch

from padd_ds.config.schema import RoutingConfig
from padd_ds.engine.ranks import Ranks
from tests.ranks import run_ranks
from tests.world import FixedChecker, joint_config, make_joint_stage

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
        shared = {name for name in mine if not name.startswith("seconds")}
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
