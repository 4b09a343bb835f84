"""Rollouts that are drawn while the one before is learnt from, with servers that answer as vLLM's do."""

import json
from pathlib import Path

import pytest

from padd_ds.engine.ranks import Ranks
from tests.ranks import run_ranks
from tests.rollout.fake_vllm import fake_interpreter
from tests.train_inputs import make_inputs, train_here


def trained(ranks: Ranks, inputs: Path) -> tuple[int, str]:
    served = ["rollout.engine=vllm", f"vllm.python={inputs}/python", f"vllm.exchange={inputs}", "vllm.sleep=false"]
    ahead = ["rollout.max_staleness=1", "policy.importance_cap=2"]
    return train_here(inputs, f"deepspeed={inputs}/two.json", "steps=3", *served, *ahead)


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_draw_one_rollout_ahead(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    fake_interpreter(tmp_path / "python")
    for code, told in run_ranks(trained, 2, inputs):
        assert code == 0, told
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["rollout_staleness"] for step in steps] == [0.0, 1.0, 1.0]
    assert not list(tmp_path.glob("padd-*"))
