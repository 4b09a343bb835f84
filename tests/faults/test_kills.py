"""A run of two ranks that is struck again and again ends as the undisturbed one.

`make test-faults` strikes 20 times; PADD_STRIKES sets another number.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.run.test_stop import metrics
from tests.train_inputs import REPOSITORY, make_inputs

STRIKES = int(os.environ.get("PADD_STRIKES", "3"))
STEPS = 20 * STRIKES
STOPS_WITHIN_S = 60.0


def launch(inputs: Path, name: str) -> "subprocess.Popen[str]":
    """Two ranks under torchrun, a checkpoint every three steps; output in NAME.log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["padd_ds/train.py", "--config", f"{inputs}/run.yaml", "--resume-or-start", f"run_dir={inputs}/{name}"]
    command += [f"deepspeed={inputs}/two.json", f"steps={STEPS}", "checkpoint.every_steps=3", "log.tensorboard=false"]
    with (inputs / f"{name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, text=True)


def ranks_of(launcher: "subprocess.Popen[str]") -> list[int]:
    """Process ids of the launcher's ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(child) for child in children if "train.py" in Path(f"/proc/{child}/cmdline").read_text()]


def wait_until_it_trains(launcher: "subprocess.Popen[str]", log: Path, told_before: int) -> None:
    """Until this start has told of a step."""
    deadline = time.monotonic() + 120
    while "joint step" not in (text := log.read_text()[told_before:]):
        assert launcher.poll() is None and time.monotonic() < deadline, text[-3000:]
        time.sleep(0.05)


def strike(launcher: "subprocess.Popen[str]", dice: random.Random) -> str:
    """Kill one rank, or ask all to stop, at a random moment; what the launcher has to say about it."""
    time.sleep(dice.uniform(0, 2.5))
    victims = ranks_of(launcher)
    if dice.random() < 0.3 or len(victims) < 2:
        launcher.send_signal(signal.SIGTERM)
        return ""
    rank = dice.randrange(2)
    os.kill(victims[rank], signal.SIGKILL)
    return "Signal 9 (SIGKILL)"


@pytest.mark.slow
@pytest.mark.ranks
def test_a_run_that_is_struck_at_random_moments_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    inputs, dice = make_inputs(tmp_path), random.Random(0)
    log = tmp_path / "struck.log"
    log.touch()
    for _ in range(STRIKES):
        told_before = len(log.read_text())
        launcher = launch(inputs, "struck")
        wait_until_it_trains(launcher, log, told_before)
        reason = strike(launcher, dice)
        assert launcher.wait(timeout=STOPS_WITHIN_S) != 0, "the run was over before it was struck"
        assert reason in log.read_text()[told_before:], log.read_text()[-3000:]
    last = launch(inputs, "struck")
    assert last.wait(timeout=300) == 0, log.read_text()[-3000:]
    whole = launch(inputs, "whole")
    assert whole.wait(timeout=300) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    assert metrics(tmp_path / "struck") == metrics(tmp_path / "whole")
    sampled = [(tmp_path / name / "samples.jsonl").read_text() for name in ("struck", "whole")]
    assert sampled[0] == sampled[1] != ""
    assert len(metrics(tmp_path / "whole")) == STEPS
