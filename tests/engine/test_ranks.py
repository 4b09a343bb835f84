"""How long ranks wait for each other."""

import os
import socket
import subprocess
import sys
from datetime import timedelta

import torch

from padd_ds.engine.ranks import PATIENCE_S, Ranks, gather_objects, on_main
from tests.ranks import run_ranks
from tests.train_inputs import REPOSITORY


def patience(ranks: Ranks) -> float:
    group = torch.distributed.group.WORLD
    assert group is not None
    waits: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return waits.total_seconds()


def test_collectives_wait_longer_than_deepspeed_would() -> None:
    assert run_ranks(patience, 1) == [PATIENCE_S]


def threads_left_behind(ranks: Ranks) -> int:
    torch.set_num_threads(2)
    torch.ones(2**20).add(1)
    before = set(os.listdir("/proc/self/task"))
    large = "x" * 2**20
    assert gather_objects(large, ranks) == [large] and on_main(lambda: large, ranks) == large
    return len(set(os.listdir("/proc/self/task")) - before)


def test_large_values_of_a_rank_alone_leave_no_threads_beside_those_of_training() -> None:
    assert run_ranks(threads_left_behind, 1) == [0]


def test_a_rank_alone_needs_no_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        environment = {name: value for name, value in told.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        # The second time it finds in its environment what the first one left there.
        twice = "from padd_ds.engine.ranks import *\nfor _ in range(2): print(start_ranks().world); stop_ranks()"
        command = [sys.executable, "-c", twice]
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-2:] == ["1", "1"], done.stderr[-2000:]


START = """
from padd_ds.engine.ranks import start_ranks
from padd_ds.errors import run_cli
run_cli(lambda: print(start_ranks().world))
"""


def under_srun(tasks: int) -> subprocess.CompletedProcess[str]:
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    environment |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_NTASKS": str(tasks)}
    environment |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    command = [sys.executable, "-c", START]
    return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_one_task_of_srun_needs_no_address_and_several_do() -> None:
    alone, two = under_srun(1), under_srun(2)
    assert (alone.returncode, alone.stdout.split()[-1:]) == (0, ["1"]), alone.stderr[-2000:]
    assert two.returncode == 2 and "MASTER_ADDR is not set" in two.stderr
