"""The configuration and the pure functions agree on every constant."""

from dataclasses import MISSING, fields
from typing import Any

import pytest
from pydantic import TypeAdapter

from padd_ds.config.sections import BalanceConfig, PolicyConfig, RewardConfig
from padd_ds.losses.policy import PolicyOptions
from padd_ds.moe.balance import BalanceOptions
from padd_ds.rollout.rewards import RewardOptions
from padd_ds.stages.build import options_from, policy_options
from tests.world import joint_config


@pytest.mark.parametrize(
    ("section", "options", "own"),
    [
        (PolicyConfig, PolicyOptions, {"clip_low", "clip_high", "normalisation", "constant_tokens"}),
        (BalanceConfig, BalanceOptions, set()),
        (RewardConfig, RewardOptions, {"require_end"}),
    ],
)
def test_defaults_are_the_same_on_both_sides(section: Any, options: Any, own: set[str]) -> None:
    configured = TypeAdapter(section).validate_python({})
    for field in fields(options):
        if field.name not in own:
            assert field.default is not MISSING and getattr(configured, field.name) == field.default, field.name


def test_what_the_configuration_says_arrives() -> None:
    section = TypeAdapter(BalanceConfig).validate_python({"load_rate": 0.3, "sign": "literal", "clamp": None})
    options = options_from(section, BalanceOptions)
    assert (options.load_rate, options.sign, options.clamp) == (0.3, "literal", None)


@pytest.mark.parametrize(
    ("policy", "clips", "normalisation"),
    [
        ({}, (0.2, 0.2), "response"),
        ({"objective": "gspo"}, (3e-4, 4e-4), "response"),
        ({"objective": "gspo", "clip_low": 0.1}, (0.1, 4e-4), "response"),
        ({"objective": "dr_grpo"}, (0.2, 0.2), "constant"),
        ({"normalisation": "token", "clip_high": 0.28}, (0.2, 0.28), "token"),
    ],
)
def test_an_objective_brings_its_own_defaults(
    policy: dict[str, Any], clips: tuple[float, float], normalisation: str
) -> None:
    options = policy_options(joint_config(policy=policy))
    assert ((options.clip_low, options.clip_high), options.normalisation) == (clips, normalisation)
    assert options.constant_tokens == joint_config().rollout.max_new_tokens


def test_dr_grpo_with_another_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match="dr_grpo takes constant only"):
        joint_config(policy={"objective": "dr_grpo", "normalisation": "token"})
