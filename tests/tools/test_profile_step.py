"""Where a step's seconds go."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.commands import REPOSITORY, run_command
from tests.train_inputs import make_inputs
from tools import profile_step
from tools.profile_step import PYTHON, Product, kind_of, of_host, products_of, report_of, seconds_alone, shares_by_kind


def test_products_are_known_by_the_shapes_of_their_factors() -> None:
    left, right, many = torch.randn(6, 4), torch.randn(4, 8), torch.randn(2, 4, 8)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for _ in range(3):
            torch.mm(left, right)
        torch.addmm(torch.randn(8), left, right)
        torch.bmm(many.transpose(1, 2), many)
    found = products_of(filter(of_host, profiled.key_averages(group_by_input_shape=True)))
    assert found == {Product(1, 6, 4, 8): 4, Product(2, 8, 4, 8): 1}
    assert Product(2, 8, 4, 8).flops == 2 * 2 * 8 * 4 * 8


def test_all_products_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large, batched = Product(1, 8, 8, 8), Product(1, 64, 64, 64), Product(3, 32, 32, 32)

    def as_long_as_its_result(action: Callable[[], Any], _: torch.device) -> tuple[Any, float]:
        result = action()
        return result, float(result.numel())

    monkeypatch.setattr(profile_step, "timed", as_long_as_its_result)
    found = seconds_alone({small: 1, large: 1, batched: 2}, torch.device("cpu"), torch.float32)
    # The smallest is not run: it counts by its operations.
    run, flops = 64 * 64 + 2 * 3 * 32 * 32, large.flops + 2 * batched.flops
    assert found == pytest.approx(run * (flops + small.flops) / flops)


def test_what_no_operation_takes_is_python() -> None:
    events = [SimpleNamespace(key=name, self_cpu_time_total=1e5) for name in ("aten::mm", "aten::copy_", "aten::mul")]
    shares = shares_by_kind(events, wall_s=1.0, on_gpu=False)
    assert (shares["matrix products"], shares["copies"], shares[PYTHON]) == pytest.approx((0.1, 0.1, 0.7))
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert kind_of("aten::_index_put_impl_") == "gathering and scattering"


def test_the_products_time_alone_is_held_against_the_steps() -> None:
    text = report_of("joint", 2.0, {"rollout": 1.5, "update": 0.5}, {"copies": 0.25}, flops=3e9, alone_s=0.5)
    assert text.startswith("joint: 2 s a step (rollout 75 %, update 25 %)\n")
    assert "| copies | 25.0 % |" in text
    assert "3 GFLOP a step; alone at the same shapes they take\n0.5 s (6 GFLOP/s), 0.250 of the step." in text


def test_the_steps_of_a_run_are_profiled(tmp_path: Path) -> None:
    config = str(make_inputs(tmp_path) / "run.yaml")
    words = ("--config", config, "--steps", "1", "--skip", "1", "steps=9", "optimizer.learning_rate=1e-9")
    told = run_command(REPOSITORY / "tools" / "profile_step.py", *words)
    assert told.returncode == 0, told.stderr
    shares = dict(re.findall(r"\| (.+) \| (-?[\d.]+) % \|", told.stdout))
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.6)
    assert float(shares["matrix products"]) > 0
    assert not (tmp_path / "run").exists()
