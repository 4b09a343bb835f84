"""Rollouts that a real server draws while the student learns from the one before."""

import json
from pathlib import Path

from tests.train_inputs import make_inputs, start_training
from tests.vllm.conftest import PYTHON, save_student


def test_responses_drawn_ahead_are_those_of_the_weights_before(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    save_student(inputs / "student")
    served = ["rollout.engine=vllm", f"vllm.python={PYTHON}", "vllm.cache_gib=0.25", "vllm.sleep=false"]
    served += ["vllm.arguments=[--enforce-eager]", "data.max_prompt_tokens=16", "rollout.max_new_tokens=12"]
    ahead = ["rollout.max_staleness=1", "policy.importance_cap=2", "optimizer.learning_rate=1e-2"]
    run = start_training(inputs, "steps=4", *served, *ahead)
    told = run.communicate()
    assert run.wait() == 0, told
    steps = [json.loads(line) for line in (inputs / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["rollout_staleness"] for step in steps] == [0.0, 1.0, 1.0, 1.0]
    # At this rate a rollout moves the weights by more than rounding.
    mismatch = [step["rollout_mismatch"] for step in steps]
    assert mismatch[0] < 1e-4 and min(mismatch[1:]) > 1e-3, mismatch
