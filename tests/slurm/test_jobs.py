"""The jobs of slurm/ on a real Slurm of two nodes: `make test-slurm` starts one (tools/slurm_testbed.sh)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from padd_ds.rollout.vllm.client import Client
from tests.engine.test_ranks import START
from tests.rollout.fake_vllm import fake_interpreter
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


def submit(inputs: Path, name: str, *more: str, **variables: str) -> str:
    """The joint job of these inputs on two nodes of one rank each, its number."""
    job = ("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={inputs}/{name}.log")
    options = (f"run_dir={inputs}/{name}", f"deepspeed={inputs}/two.json", f"steps={STEPS}", *more)
    variables = {"CONFIG": f"{inputs}/run.yaml", "PADD_LOGS": f"{inputs}/{name}-logs", **variables}
    return run(*job, "slurm/joint.sbatch", *options, **variables)


def test_a_bare_srun_of_one_task_is_a_rank_alone() -> None:
    assert run("srun", "--ntasks=1", sys.executable, "-c", START).split()[-1] == "1"


def pipeline_configs(inputs: Path) -> Path:
    """A run file for every training, from the one of a joint run."""
    common = yaml.safe_load((inputs / "run.yaml").read_text()) | {"deepspeed": f"{inputs}/two.json"}
    common["data"]["fields"] = {"solution": "answer"}
    configs = inputs / "configs"
    configs.mkdir()
    for stage in ("teacher_grpo", "warmup", "joint"):
        run = common | {"stage": stage, "warmup": {"batch_size": 4}}
        if stage == "teacher_grpo":
            del run["model"]["teacher"]
        (configs / f"{stage}.yaml").write_text(yaml.safe_dump(run))
    return configs


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


def test_a_job_with_a_server_node_leaves_no_server_however_it_ends(tmp_path: Path) -> None:
    """Servers that answer as vLLM's do; one is ended on the way."""
    inputs = make_inputs(tmp_path)
    options = [f"vllm.python={fake_interpreter(tmp_path / 'python')}", f"vllm.exchange={tmp_path}"]

    def start(name: str, transport: str) -> str:
        told = [*options, f"vllm.transport={transport}", f"deepspeed={inputs}/one.json"]
        return submit(inputs, name, *told, SERVER_NODES="1")

    def servers() -> list[str]:
        found = subprocess.run(["pgrep", "--full", f"fake_vllm.py.*{inputs}"], capture_output=True, text=True)
        return found.stdout.split()

    options += ["rollout.max_staleness=1", "policy.importance_cap=2"]
    job = start("served", "files")
    wait_for_steps(tmp_path / "served", 2)
    (url,) = (tmp_path / "served-logs" / "servers.txt").read_text().split()
    Client(url, 5).end()
    wait_for(job, "COMPLETED")
    assert len(metrics(tmp_path / "served")) == STEPS and not servers()
    assert max(step["rollout_staleness"] for step in metrics(tmp_path / "served")) == 1
    assert f"{url} ended and is started again" in (tmp_path / "served-logs" / "serve-0.log").read_text()
    assert "a rollout server is started again" in (tmp_path / "served-logs" / "rank-0.log").read_text()
    assert {path.name for path in (tmp_path / "served-logs").glob("rank-*")} == {"rank-0.log"}

    job = start("killed", "network")
    wait_for_steps(tmp_path / "killed", 2)
    assert servers()
    run("kill", "-KILL", *run("pgrep", "--full", f"train.py --config {inputs}/run.yaml").split())
    wait_for(job, "FAILED", timeout_s=60)
    assert not servers()


def test_the_pipeline_goes_from_a_dense_teacher_to_evaluated_models(tmp_path: Path) -> None:
    inputs, work = make_inputs(tmp_path), tmp_path / "work"
    told = run(
        *("slurm/pipeline.sh", "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/%x.log"),
        TEACHER=str(inputs / "teacher"),
        DATA=str(inputs / "data.jsonl"),
        WORK=str(work),
        CONFIGS=str(pipeline_configs(inputs)),
        CONVERT="--experts 8 --shared-experts 2 --top-k 3 --calibration-field question,answer --calibration-tokens 256",
        CONVERT_JOB=f"--cpus-per-task=1 --output={tmp_path}/convert.log",
        EVAL=f"--data {inputs}/data.jsonl --limit 4 --max-new-tokens 4 --template plain",
        EVAL_JOB=f"--cpus-per-task=1 --output={tmp_path}/eval.log",
        PADD_LOGS=str(tmp_path / "logs"),
    )
    jobs = dict(line.split(": job ") for line in told.splitlines())
    assert list(jobs) == ["teacher-grpo", "convert", "warmup", "joint", "eval-teacher", "eval-joint"]
    for job in jobs.values():
        wait_for(job, "COMPLETED")
    for model in ("teacher", "converted", "warmed-up", "joint"):
        assert (work / "models" / model / "config.json").exists()
    for model in ("teacher", "joint"):
        assert json.loads((work / "results" / f"{model}.json").read_text())["headline"]["problems"]["problems"] == 4
