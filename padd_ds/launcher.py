"""Which rank this process is, before anything heavy is imported."""

import os

RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
"""As torchrun and deepspeed, Open MPI, MPICH, and a bare srun set them."""


WORLD_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def launched_world() -> int:
    """How many ranks a launcher started; 1 without one, and in a Slurm job's own script, which is no rank of a step."""
    found = [os.environ[name] for name in WORLD_VARIABLES if name in os.environ]
    if not found and "SLURM_STEP_ID" in os.environ:
        found = [os.environ.get("SLURM_STEP_NUM_TASKS", "1")]
    return int(found[0]) if found else 1


def launched_rank() -> int | None:
    """The rank that a launcher gave this process; None without a launcher."""
    found = (os.environ[name] for name in RANK_VARIABLES if name in os.environ)
    return next((int(rank) for rank in found), None)
