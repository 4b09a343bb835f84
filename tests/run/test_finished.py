"""A run that is finished and asked for again."""

from pathlib import Path

import pytest

from padd_ds.engine.ranks import Ranks
from padd_ds.run.report import REPORT
from tests.ranks import run_ranks
from tests.train_inputs import make_inputs, train_here


def trained(ranks: Ranks, inputs: Path, *options: str) -> tuple[int, str]:
    return train_here(inputs, *options)


@pytest.mark.slow
def test_it_says_so_and_keeps_its_record(tmp_path: Path) -> None:
    inputs, run = make_inputs(tmp_path), tmp_path / "run"
    ((code, told),) = run_ranks(trained, 1, inputs)
    assert code == 0, told
    record = {name: (run / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    (run / REPORT).unlink()
    ((code, told),) = run_ranks(trained, 1, inputs, "--resume-or-start")
    assert code == 0 and "all 1 steps are done, so nothing is trained" in told
    assert (run / REPORT).exists()
    ((code, told),) = run_ranks(trained, 1, inputs, "--resume", "optimizer.learning_rate=9e-3")
    assert code == 2 and "finished at step 1, with other settings" in told and "steps above 1" in told
    assert {name: (run / name).read_bytes() for name in record} == record
    ((code, told),) = run_ranks(trained, 1, inputs, "--resume", "optimizer.learning_rate=9e-3", "steps=2")
    assert code == 0 and len((run / "metrics.jsonl").read_text().splitlines()) == 2, told
