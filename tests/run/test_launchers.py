"""A joint run of two ranks under the launchers that no other test starts."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import free_port
from tests.run.test_stop import metrics
from tests.train_inputs import REPOSITORY, make_inputs

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
BIN = Path(sys.executable).parent
MPIRUN = shutil.which("mpirun", path=f"{BIN}:{os.environ['PATH']}")
MPI_HERE = MPIRUN is not None and importlib.util.find_spec("mpi4py") is not None
# Open MPI would otherwise refuse to run in a container, and on a machine of one core.
MPI_VARIABLES = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def train(inputs: Path, launcher: list[str], name: str, **variables: str) -> Path:
    """The run's folder. Its experts are spread over two ranks, so that one alone would be refused."""
    run = ["padd_ds/train.py", "--config", f"{inputs}/run.yaml", f"run_dir={inputs}/{name}"]
    command = [*launcher, *run, f"deepspeed={inputs}/two.json", "log.tensorboard=false"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | variables, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return inputs / name


def test_deepspeeds_launcher_with_a_hostfile(inputs: Path) -> None:
    (inputs / "hostfile").write_text("localhost slots=2\n")
    launcher = [str(BIN / "deepspeed"), "--hostfile", f"{inputs}/hostfile", "--no_ssh", "--node_rank", "0"]
    folder = train(inputs, [*launcher, "--master_addr", "127.0.0.1", "--master_port", str(free_port())], "deepspeed")
    assert len(metrics(folder)) == 1


@pytest.mark.skipif(not MPI_HERE, reason="no mpirun or no mpi4py here; the extra [mpi] brings both")
def test_mpirun(inputs: Path) -> None:
    folder = train(
        inputs, [str(MPIRUN), "-n", "2", sys.executable], "mpi", MASTER_PORT=str(free_port()), **MPI_VARIABLES
    )
    assert len(metrics(folder)) == 1
