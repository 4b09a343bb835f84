"""What an objective makes of the parts of a stage."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from padd_ds.rollout.collect import Collector
from padd_ds.stages.build import make_collector, policy_options
from tests.tiny import tiny_student
from tests.world import FixedChecker, joint_config, problems
from tools.tiny_model import make_tokenizer


def collector(policy: dict[str, Any]) -> Collector:
    tokenizer = make_tokenizer()
    student: Any = SimpleNamespace(
        model=tiny_student(vocabulary=len(tokenizer)),
        layers=[],
        ranks=SimpleNamespace(rank=0, world=1, device=torch.device("cpu")),
    )
    checker: Any = FixedChecker(lambda text, gold: text.startswith(gold))
    return make_collector(joint_config(policy=policy), student, tokenizer, problems(), checker)


@pytest.mark.parametrize(
    ("policy", "scale", "normalisation"),
    [
        ({"objective": "dr_grpo"}, "none", "constant"),
        ({"objective": "dr_grpo", "advantage_scale": "std"}, "std", "constant"),
        ({"objective": "grpo"}, "std", "response"),
        ({"objective": "grpo", "advantage_scale": "none", "normalisation": "constant"}, "none", "constant"),
        ({"objective": "pr_grpo"}, "std", "response"),
        ({"objective": "gspo"}, "std", "response"),
        ({"objective": "rspo"}, "std", "response"),
    ],
)
def test_dr_grpo_alone_leaves_out_both_divisions(policy: dict[str, Any], scale: str, normalisation: str) -> None:
    options = policy_options(joint_config(policy=policy))
    assert (collector(policy).advantage_scale, options.normalisation) == (scale, normalisation)
    assert options.constant_tokens == joint_config().rollout.max_new_tokens == 6
