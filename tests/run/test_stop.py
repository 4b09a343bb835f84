"""A run that a signal stops: saved at the step's end, and continued as if nothing had been."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from padd_ds.errors import EXIT_CODE_STOPPED
from padd_ds.run.lock import run_lock
from padd_ds.run.stop import STOPPED, StopRequest
from tests.train_inputs import make_inputs, start_training


def test_a_signal_is_remembered_inside_the_block_and_handled_as_before_behind_it() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert stop.signal_name is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_name == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, clocks apart."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def wait_for_steps(folder: Path, count: int, timeout_s: float = 120) -> None:
    deadline, path = time.monotonic() + timeout_s, folder / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, f"{folder}: no {count} steps in {timeout_s} s"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_the_undisturbed_one(tmp_path: Path) -> None:
    inputs, steps = make_inputs(tmp_path), "steps=20"
    whole = start_training(inputs, steps, f"run_dir={tmp_path}/whole", "checkpoint.every_steps=1000")
    stopped = start_training(inputs, steps, f"run_dir={tmp_path}/stopped", "--resume-or-start")
    wait_for_steps(tmp_path / "stopped", 3)
    stopped.terminate()
    _, told = stopped.communicate(timeout=120)
    assert stopped.returncode == EXIT_CODE_STOPPED, told
    done = len(metrics(tmp_path / "stopped"))
    assert f"stopped by SIGTERM after step {done}, and saved" in told
    assert done < 20 and (tmp_path / "stopped" / "checkpoints" / f"step_{done}" / "manifest.json").exists()
    assert json.loads((tmp_path / "stopped" / STOPPED).read_text()) == {"signal": "SIGTERM", "step": done}
    with run_lock(tmp_path / "stopped"):
        rival = start_training(inputs, steps, f"run_dir={tmp_path}/stopped", "--resume")
        _, refused = rival.communicate(timeout=120)
    assert rival.returncode == 2 and "another process trains in this folder" in refused, refused

    resumed = start_training(inputs, steps, f"run_dir={tmp_path}/stopped", "--resume-or-start")
    assert resumed.wait(timeout=120) == 0, resumed.communicate()[1]
    assert whole.wait(timeout=120) == 0, whole.communicate()[1]
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert not (tmp_path / "stopped" / STOPPED).exists()
