"""The configuration and the pure functions agree on every constant."""

from dataclasses import MISSING, fields
from typing import Any

import pytest
from pydantic import TypeAdapter

from padd_ds.config.schema import BalanceConfig, PolicyConfig, RewardConfig
from padd_ds.losses.policy import PolicyOptions
from padd_ds.moe.balance import BalanceOptions
from padd_ds.rollout.rewards import RewardOptions
from padd_ds.stages.build import options_from


@pytest.mark.parametrize(
    ("section", "options", "own"),
    [
        (PolicyConfig, PolicyOptions, set()),
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
