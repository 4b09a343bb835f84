"""What a plan says is sent, held against the collectives of two real ranks."""

from pathlib import Path

import pytest

from tools.bench_plan import ON_CPU, prepare, run_case

SMALL = {"layers": 2, "width": 128, "slice": 64, "experts": 4, "top_k": 2, "vocabulary": 512}


@pytest.mark.ranks
@pytest.mark.slow
def test_bytes_sent_are_those_of_real_ranks(tmp_path: Path) -> None:
    prepare(tmp_path, SMALL, ON_CPU)
    spread = {"stage3_param_persistence_threshold": 0}  # small parameters would stay whole
    for compute in ("dispatched", "masked"):
        more = {"warmup.batch_size": 8, "model.expert_compute": compute}
        run = run_case(tmp_path, compute, ("warmup", 3, 2, spread, more), ON_CPU)
        assert run.planned_sent == pytest.approx(run.sent, rel=0.02), compute
        assert run.memory > 0
