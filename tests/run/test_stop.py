"""A run that a signal stops: saved at the step's end, and continued as if nothing had been."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from padd_ds.engine.ranks import Ranks
from padd_ds.errors import EXIT_CODE_STOPPED
from padd_ds.run.lock import run_lock
from padd_ds.run.report import REPORT, write_run_report
from padd_ds.run.stop import STOPPED, StopRequest
from padd_ds.stages import build
from tests.ranks import run_ranks
from tests.train_inputs import make_inputs, start_training, train_here


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
    assert not (tmp_path / "stopped" / REPORT).exists()
    with run_lock(tmp_path / "stopped"):
        rival = start_training(inputs, steps, f"run_dir={tmp_path}/stopped", "--resume")
        _, refused = rival.communicate(timeout=120)
    assert rival.returncode == 2 and "another process trains in this folder" in refused, refused

    resumed = start_training(inputs, steps, f"run_dir={tmp_path}/stopped", "--resume-or-start")
    assert resumed.wait(timeout=120) == 0, resumed.communicate()[1]
    assert whole.wait(timeout=120) == 0, whole.communicate()[1]
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert not (tmp_path / "stopped" / STOPPED).exists()
    page = (tmp_path / "stopped" / REPORT).read_text()
    assert page.startswith("<!doctype html>") and "<svg" in page and "updates_per_rollout" in page
    told = []
    (tmp_path / "stopped" / "metrics.jsonl").write_text("{")
    write_run_report(tmp_path / "stopped", told.append)
    assert len(told) == 1 and "metrics.jsonl, line 1: not JSON" in told[0]


def train_signalled(ranks: Ranks, inputs: Path, number: int, while_at: str, *more: str) -> tuple[int, str, bool]:
    """A signal to the last rank while it is at a function of stages/build.py; also whether models were loaded."""
    happened = {"read_inputs": 0, "load_together": 0}

    def watched(name: str) -> Any:
        function = getattr(build, name)

        def watching(*arguments: Any, **options: Any) -> Any:
            happened[name] += 1
            if name == while_at and ranks.rank == ranks.world - 1:
                signal.raise_signal(number)
            return function(*arguments, **options)

        return watching

    with pytest.MonkeyPatch.context() as patch:
        for name in happened:
            patch.setattr(build, name, watched(name))
        code, told = train_here(inputs, f"deepspeed={inputs}/two.json", f"run_dir={inputs}/run", *more)
    return code, told, happened["load_together"] > 0


@pytest.mark.ranks
@pytest.mark.slow
def test_a_signal_while_loading_stops_all_ranks_before_the_first_step(tmp_path: Path) -> None:
    inputs, run = make_inputs(tmp_path), tmp_path / "run"
    for number, while_at in ((signal.SIGTERM, "read_inputs"), (signal.SIGUSR1, "load_together")):
        found = run_ranks(train_signalled, 2, inputs, int(number), while_at, "--resume-or-start")
        assert [code for code, _, _ in found] == [EXIT_CODE_STOPPED] * 2
        assert "before the first step; the same command with --resume goes on" in found[0][1]
        assert [loaded for _, _, loaded in found] == [while_at == "load_together"] * 2
        assert json.loads((run / STOPPED).read_text()) == {"signal": "a signal to another rank", "step": 0}
        assert not (run / "metrics.jsonl").exists()
    code, told, _ = run_ranks(train_signalled, 2, inputs, int(signal.SIGTERM), "nothing", "--resume")[0]
    assert code == 0 and len(metrics(run)) == 1, told
    assert not (run / STOPPED).exists()
