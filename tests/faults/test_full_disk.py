"""A disk that is full when a step is logged or saved: one error, nothing half-written, and the run goes on later."""

import errno
from pathlib import Path
from typing import Any

import pytest

from padd_ds.engine.ranks import Ranks
from tests.ranks import run_ranks
from tests.run.test_stop import metrics
from tests.train_inputs import make_inputs, train_here

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
WRITERS = {
    "log": ("padd_ds.run.loop.append_line", "metrics.jsonl"),
    "weights": ("padd_ds.engine.checkpoint.save_file", "layer_00001"),
    "deepspeed": ("torch.save", ".partial/deepspeed"),
    "manifest": ("pathlib.Path.write_text", "manifest.json"),
}
"""What a step leaves -> what writes it, and a file of it by which it is known."""


def train(ranks: Ranks, inputs: Path, name: str, steps: int, full: str | None, *more: str) -> tuple[int, str]:
    """A checkpoint after every step, the first of which finds the disk full at the part `full`."""
    with pytest.MonkeyPatch.context() as patch:
        if full is not None:
            fill_disk(patch, *WRITERS[full])
        options = [f"run_dir={inputs}/{name}", f"steps={steps}", "checkpoint.every_steps=1", *more]
        return train_here(inputs, *options)


def fill_disk(patch: pytest.MonkeyPatch, writer: str, known_by: str) -> None:
    owner, _, attribute = writer.rpartition(".")
    module: Any = pytest.importorskip(owner) if owner != "pathlib.Path" else Path
    write = getattr(module, attribute)

    def writing(*arguments: Any, **options: Any) -> Any:
        if any(known_by in str(argument) for argument in arguments if isinstance(argument, str | Path)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments, **options)

    patch.setattr(module, attribute, writing)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_from_it(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    assert run_ranks(train, 1, inputs, "run", 1, None)[0][0] == 0
    for part in WRITERS:
        code, told = run_ranks(train, 1, inputs, "run", 2, part, "--resume")[0]
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        assert code == 2 and "Traceback" not in told and len(errors) == 1, told
        assert "the disk is full" in errors[0] and "go on with --resume" in errors[0]
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_1"]
    # As a disk that filled up while a line was logged leaves it.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "loss')
    assert run_ranks(train, 1, inputs, "run", 2, None, "--resume")[0][0] == 0
    assert run_ranks(train, 1, inputs, "whole", 2, None)[0][0] == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole") and len(metrics(tmp_path / "run")) == 2
