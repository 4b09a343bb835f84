"""The jobs of slurm/ on a real Slurm of two nodes: `make test-slurm` starts one (tools/slurm_testbed.sh)."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.run.test_stop import metrics, wait_for_steps
from tests.train_inputs import REPOSITORY, make_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SLURM_CONF" not in os.environ, reason="no Slurm here; make test-slurm starts one"),
]
STEPS = 30


def run(*command: object, **variables: str) -> str:
    """Standard output of a command that has to succeed."""
    environment = os.environ | {"PADD_PYTHON": sys.executable} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submit(inputs: Path, name: str, **variables: str) -> str:
    """The joint job of these inputs on two nodes of one rank each, its number."""
    job = ("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={inputs}/{name}.log")
    options = (f"run_dir={inputs}/{name}", f"deepspeed={inputs}/two.json", f"steps={STEPS}")
    variables = {"CONFIG": f"{inputs}/run.yaml", "PADD_LOGS": f"{inputs}/{name}-logs", **variables}
    return run(*job, "slurm/joint.sbatch", *options, **variables)


def wait_for(job: str, state: str, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while f"JobState={state}" not in (told := run("scontrol", "show", "job", job)):
        assert time.monotonic() < deadline, told
        assert state == "FAILED" or "JobState=FAILED" not in told, told
        time.sleep(0.2)


def test_a_job_that_is_stopped_twice_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    whole = submit(inputs, "whole")
    wait_for(whole, "COMPLETED")
    job = submit(inputs, "stopped", EXPORT=str(tmp_path / "student"))
    wait_for_steps(tmp_path / "stopped", 3)
    # What --signal sends before the time limit.
    run("scancel", "--signal=USR1", job)
    wait_for(job, "PENDING")
    saved = len(metrics(tmp_path / "stopped"))
    assert f"stopped by SIGUSR1 after step {saved}" in (tmp_path / "stopped-logs" / "rank-0.log").read_text()
    assert (tmp_path / "stopped" / "checkpoints" / f"step_{saved}" / "manifest.json").exists()
    wait_for_steps(tmp_path / "stopped", saved + 3)
    # What a higher-ranking job does to it.
    run("scontrol", "requeue", job)
    wait_for(job, "COMPLETED")
    assert "attempt 3" in (tmp_path / "stopped.log").read_text()
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert len(metrics(tmp_path / "whole")) == STEPS
    assert (tmp_path / "student" / "config.json").exists()
    assert {path.name for path in (tmp_path / "whole-logs").iterdir()} == {"rank-0.log", "rank-1.log"}


def test_a_rank_that_is_killed_ends_the_job_and_is_named(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    job = submit(inputs, "killed")
    wait_for_steps(tmp_path / "killed", 2)
    ranks = run("pgrep", "--full", f"train.py --config {inputs}/run.yaml").split()
    victims = [pid for pid in ranks if "SLURM_PROCID=1\0" in Path(f"/proc/{pid}/environ").read_text()]
    run("kill", "-KILL", *victims)
    wait_for(job, "FAILED", timeout_s=60)
    assert "task 1: Killed" in (tmp_path / "killed.log").read_text()
