"""What the scripts of slurm/ would run, without a Slurm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train_inputs import REPOSITORY


def dry_run(*command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"DRY_RUN": "1", "PADD_PYTHON": sys.executable} | variables
    return subprocess.run(["bash", *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def told(*command: str, **variables: str) -> list[str]:
    done = dry_run(*command, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_training_shows_its_command_and_its_configuration() -> None:
    for stage in ("teacher_grpo", "warmup", "joint"):
        lines = told(f"slurm/{stage}.sbatch", "steps=7", EXPORT="models/x")
        assert f"--config ds_configs/runs/{stage}.yaml steps=7 --resume-or-start" in lines[1]
        assert "# padd-export, to models/x" in lines
        assert {f"stage: {stage}", "steps: 7"} <= set(lines)


def test_a_job_that_names_a_cluster_is_planned_on_its_own_ranks_and_refused_where_it_cannot_fit() -> None:
    cluster, run = "ds_configs/clusters/h100.yaml", "ds_configs/plans/paper.yaml"
    sizes = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "8"}
    refused = dry_run("slurm/joint.sbatch", "steps=7", "--skip-damaged", CLUSTER=cluster, CONFIG=run, **sizes)
    lines = refused.stdout.splitlines()
    planned = f"-m padd_ds.plan --config {run} --cluster {cluster} --validate --nodes 2 --devices-per-node 4 steps=7"
    assert f"# {sys.executable} {planned}" in lines and "joint: 2 nodes of 4, 8 ranks" in lines
    assert refused.returncode == 2
    assert refused.stderr == f"error: {run}: does not fit {cluster}; the plan above says what does\n"


def test_a_job_with_servers_starts_them_on_its_last_nodes_and_trains_on_the_others() -> None:
    sizes = {"SLURM_JOB_NUM_NODES": "6", "SLURM_NTASKS_PER_NODE": "8", "PADD_LOGS": "L"}
    lines = told("slurm/joint.sbatch", "vllm.transport=network", "steps=7", SERVER_NODES="2", **sizes)
    options = "--config ds_configs/runs/joint.yaml vllm.transport=network steps=7 rollout.engine=vllm"
    assert lines[0] == "# 6 nodes, 8 ranks on each"
    assert lines[1] == (
        f"# the last 2 of them serve: srun {sys.executable} -m padd_ds.serve {options} "
        "vllm.servers=L/servers.txt --logs L"
    )
    assert f"{options} vllm.servers=L/servers.txt --resume-or-start" in lines[2]
    assert "  servers: L/servers.txt" in lines
    refused = dry_run("slurm/joint.sbatch", SERVER_NODES="2", **sizes)
    assert refused.returncode == 2 and "set exchange to one that all nodes see, or transport" in refused.stderr


def test_the_other_jobs_show_their_command() -> None:
    assert told("slurm/convert.sbatch", "--teacher", "T") == [f"# {sys.executable} -m padd_ds.convert --teacher T"]
    assert told("slurm/eval.sbatch", "--model", "M") == [f"# {sys.executable} -m padd_ds.evaluate --model M"]


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Variables of a job of two nodes of two ranks, whose srun tells its arguments."""
    for name, line in (("srun", 'echo "srun $*"'), ("scontrol", "echo NodeAddr=one; echo two")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "one,two", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4"}
    return job | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PADD_LOGS": str(tmp_path / "logs"), "DRY_RUN": "0"}


@pytest.mark.parametrize(("cores", "option"), [("8", "--cpus-per-task=8 "), ("", "")])
def test_the_ranks_get_the_cores_that_the_job_asked_for(slurm: dict[str, str], cores: str, option: str) -> None:
    started = told("slurm/joint.sbatch", "run_dir=absent", **slurm, SLURM_CPUS_PER_TASK=cores)[-1]
    assert started.startswith(f"srun {option}--kill-on-bad-exit=1 ") and "train.py" in started


def test_what_an_earlier_stop_left_is_deleted_wherever_the_run_is(slurm: dict[str, str], tmp_path: Path) -> None:
    left = tmp_path / "run: 2" / "stopped.json"  # a name that YAML has in quotes
    left.parent.mkdir()
    left.touch()
    told("slurm/joint.sbatch", f"run_dir='{left.parent}'", **slurm)
    assert left.parent.is_dir() and not left.exists()


def test_a_job_without_a_number_of_ranks_names_the_option(slurm: dict[str, str]) -> None:
    refused = dry_run("slurm/joint.sbatch", **slurm | {"SLURM_NTASKS": ""})
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--ntasks-per-node" in refused.stderr


@pytest.mark.parametrize("name", ["absent.jsonl", "rows.parquet", "folder.jsonl"])
def test_the_pipeline_refuses_problems_that_the_calibration_cannot_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.parquet").touch()
    (tmp_path / "folder.jsonl").mkdir()
    refused = dry_run("slurm/pipeline.sh", TEACHER="T", DATA=str(tmp_path / name), WORK="w")
    assert refused.returncode == 2 and not refused.stdout
    assert (
        refused.stderr.startswith(f"error: DATA={tmp_path / name} is no .jsonl file")
        and refused.stderr.count("\n") == 1
    )


def test_every_job_of_the_pipeline_waits_for_the_one_that_it_reads_from(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.touch()
    variables = {"TEACHER": "T", "DATA": str(data), "WORK": "w"}
    jobs = told("slurm/pipeline.sh", "--nodes", "2", **variables)
    scripts = ["teacher_grpo", "convert", "warmup", "joint", "eval", "eval"]
    behind = [None, "teacher-grpo", "convert", "warmup", "joint", "joint"]
    for job, script, before in zip(jobs, scripts, behind, strict=True):
        assert f"slurm/{script}.sbatch" in job
        assert ("--dependency" in job) == (before is not None)
        assert before is None or f"afterok:{before} " in job
        assert ("--nodes 2" in job) == (script in ("teacher_grpo", "warmup", "joint"))
        assert ("--gpus 1" in job) == (script == "eval")
    assert "EXPORT=w/models/teacher " in jobs[0] and "--teacher w/models/teacher" in jobs[1]
    assert "model.student=w/models/converted model.teacher=w/models/teacher" in jobs[2]
    tuned = told("slurm/pipeline.sh", TUNED="1", **variables)
    assert len(tuned) == 5 and "--teacher T " in tuned[0] and "--dependency" not in tuned[0]
