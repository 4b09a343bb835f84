"""Experts that rollout servers tell, with servers that answer as vLLM's do."""

import json
from pathlib import Path

import pytest

from padd_ds.engine.ranks import Ranks
from padd_ds.stages import build
from tests.ranks import run_ranks
from tests.rollout.fake_vllm import fake_interpreter
from tests.train_inputs import make_inputs, train_here


def trained(ranks: Ranks, inputs: Path, on_a_gpu: bool, option: str) -> tuple[int, str]:
    if on_a_gpu:
        build.check_experts_told = lambda: None  # type: ignore[attr-defined]
    served = ["rollout.engine=vllm", f"vllm.python={inputs}/python", f"vllm.exchange={inputs}"]
    return train_here(inputs, *served, option)


def test_a_cpu_is_told_before_any_work(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    fake_interpreter(tmp_path / "python")
    ((code, told),) = run_ranks(trained, 1, inputs, False, "routing.replay=rollout")
    assert code == 2 and "need vLLM on a GPU" in told and "routing.replay to old_policy" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("option", ["routing.replay=rollout", "vllm.tell_experts=true"])
def test_training_follows_the_servers_experts_or_tells_how_many_differ(option: str, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    fake_interpreter(tmp_path / "python")
    ((code, told),) = run_ranks(trained, 1, inputs, True, option)
    assert code == 0, told
    (step,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (step["router_flips_rollout"] == 0) == option.startswith("routing")
