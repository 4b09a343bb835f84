"""Which rank this process is, before anything heavy is imported."""

import os

RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
"""As torchrun and deepspeed, Open MPI, MPICH, and a bare srun set them."""


def launched_rank() -> int | None:
    """The rank that a launcher gave this process; None without a launcher."""
    found = (os.environ[name] for name in RANK_VARIABLES if name in os.environ)
    return next((int(rank) for rank in found), None)
